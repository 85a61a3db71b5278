"""LLaVA (arXiv 2304.08485), as Hugging Face's ``LlavaForConditionalGeneration``: vision tower, two-layer projector, Llama decoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from splitq_jax.errors import InputError
from splitq_jax.models.decoder import Block, Context, Decoder, DecoderConfig, causal_mask
from splitq_jax.models.layers import LARGEST, Linear, activation, check_types
from splitq_jax.models.vision import VisionConfig, VisionTower

MAX_IMAGE_TOKENS = 1 << 16
# LLaVA's tower where config.json names none
CLIP_L_336 = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
}


@dataclass(frozen=True)
class LlavaConfig:
    """A LLaVA's ``config.json``."""

    vision: VisionConfig
    text: DecoderConfig
    image_token_id: int
    vision_feature_layer: tuple[int, ...]
    vision_feature_select_strategy: str
    projector_hidden_act: str
    projector_bias: bool
    tied: bool

    def __post_init__(self) -> None:
        if not 0 <= self.image_token_id < LARGEST:
            raise InputError(f"config.json: image_token_id {self.image_token_id}; expected 0 to {LARGEST - 1}")
        if not 0 < self.tokens_per_image <= MAX_IMAGE_TOKENS:
            raise InputError(f"config.json: an image takes {self.tokens_per_image} tokens; expected 1 to {MAX_IMAGE_TOKENS}")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "LlavaConfig":
        """Read ``config.json``.

        Raises:
          InputError: another model_type, or parts that are not supported.
        """
        if config.get("model_type") != "llava":
            raise InputError(f"config.json: model_type {config.get('model_type')!r}; expected llava")
        text_config, vision_config = config.get("text_config"), config.get("vision_config")
        text_config = {} if text_config is None else text_config
        vision_config = CLIP_L_336 if vision_config is None else vision_config
        for part, fields in (("top level", config), ("text_config", text_config), ("vision_config", vision_config)):
            check_types(part, fields)
        layer = config.get("vision_feature_layer", -2)
        strategy = config.get("vision_feature_select_strategy", "default")
        if strategy not in {"default", "full"}:
            raise InputError(f"config.json: vision_feature_select_strategy {strategy!r}; expected default or full")
        # the image token's attribute has two spellings
        image_token = config.get("image_token_id", config.get("image_token_index", 32000))
        # weight tying follows the top level; where it is silent or false, the text config's flag
        tied = bool(config.get("tie_word_embeddings") or text_config.get("tie_word_embeddings", False))
        vision = VisionConfig.from_hf(vision_config)
        layers = tuple(layer) if isinstance(layer, list | tuple) else (layer,)
        if not layers or not all(type(i) is int and -vision.num_layers - 1 <= i <= vision.num_layers for i in layers):
            raise InputError(f"config.json: vision_feature_layer {layer!r}; the vision tower has layers 0 to {vision.num_layers}")
        return cls(
            vision=vision,
            text=DecoderConfig.from_hf(text_config),
            image_token_id=image_token,
            vision_feature_layer=layers,
            vision_feature_select_strategy=strategy,
            projector_hidden_act=config.get("projector_hidden_act", "gelu"),
            projector_bias=config.get("multimodal_projector_bias", True),
            tied=tied,
        )

    @property
    def num_layers(self) -> int:
        """Decoder blocks."""
        return self.text.num_layers

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The vision layers that are read, counted from 0 (before the first block)."""
        count = self.vision.num_layers + 1
        return tuple(layer % count for layer in self.vision_feature_layer)

    @property
    def drops_first(self) -> bool:
        """``default`` drops the first token, whatever it is (CLIP's class token; SigLIP's first patch, as transformers does)."""
        return self.vision_feature_select_strategy == "default"

    @property
    def tokens_per_image(self) -> int:
        """Placeholders of an image."""
        return self.vision.num_tokens - self.drops_first


@struct.dataclass
class Hidden:
    """Embedded tokens at the door of the decoder."""

    x: Float[Array, "B L D"]
    context: Context


class Llava(nn.Module):
    """The model; apply it to a float or a quantized parameter tree."""

    config: LlavaConfig

    def setup(self) -> None:
        """Create the parts; their names are the parameter tree's."""
        c = self.config
        self.vision = VisionTower(c.vision, depth=max(c.feature_layers))
        self.projector = Projector(c.text.hidden_size, c.projector_hidden_act, c.projector_bias)
        self.decoder = Decoder(c.text, c.tied)

    @nn.nowrap
    def block(self) -> Block:
        """Return the decoder block's module, to be applied to one block's parameters."""
        return Block(self.config.text, parent=None)

    @nn.nowrap
    def check(self, batch: Mapping[str, Any]) -> None:
        """Check a batch of host arrays before it is traced.

        Raises:
          InputError: arrays of another type or shape; token ids outside the vocabulary; pixel values that are not finite or of another
            size; another number of image placeholders than of image features; an image whose placeholders are not all in one sample.
        """
        c = self.config
        ids = np.asarray(batch.get("input_ids", ()))
        if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"input_ids: {ids.dtype}{list(ids.shape)}; expected integers (samples, length)")
        for name in ("attention_mask", "positions", "segments"):
            if batch.get(name) is not None and np.shape(batch[name]) != ids.shape:
                raise InputError(f"{name}: shape {np.shape(batch[name])}; expected that of input_ids, {ids.shape}")
        image = ids == c.image_token_id
        outside = ids[~image & ((ids < 0) | (ids >= c.text.vocab_size))]
        if outside.size:
            raise InputError(f"input_ids: token id {outside[0]}; the vocabulary has {c.text.vocab_size}")
        pixels = batch.get("pixel_values")
        if pixels is not None:
            size = (c.vision.num_channels, c.vision.image_size, c.vision.image_size)
            pixels = np.asarray(pixels)
            if pixels.ndim != 4 or pixels.shape[1:] != size:
                raise InputError(f"pixel_values: shape {pixels.shape}; expected (images, {', '.join(map(str, size))})")
            if not jnp.issubdtype(pixels.dtype, jnp.floating):
                raise InputError(f"pixel_values: {pixels.dtype}; expected the floats that the image processor makes")
            if not np.isfinite(pixels).all():
                raise InputError("pixel_values: not finite; check the images")
        count = 0 if pixels is None else len(pixels)
        placed = image.sum(axis=1)
        if placed.sum() != count * c.tokens_per_image or (placed % c.tokens_per_image).any():
            found = ", ".join(map(str, placed[:8]))
            raise InputError(
                f"input_ids: {found} image placeholders a sample with {count} images in all; an image takes {c.tokens_per_image}"
            )

    def features(self, pixel_values: Float[Array, "N C H W"]) -> Float[Array, "N T D"]:
        """Return the projected image tokens."""
        states = self.vision(pixel_values)
        picked = [states[i][:, 1:] if self.config.drops_first else states[i] for i in self.config.feature_layers]
        out: Float[Array, "N T D"] = self.projector(jnp.concatenate(picked, axis=-1))
        return out

    def embed(
        self,
        input_ids: Int[Array, "B L"],
        pixel_values: Float[Array, "N C H W"] | None = None,
        attention_mask: Bool[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        segments: Int[Array, "B L"] | None = None,
    ) -> Hidden:
        """Embed tokens and put the image features, in order, where the placeholders are.

        Args:
          input_ids: tokens, ``image_token_id`` for each image feature.
          pixel_values: N images, over all samples in order.
          attention_mask: False for padding; None for no padding.
          positions: of the rotary embedding; None: counted over the tokens that are not padding.
          segments: 0 for a shared prefix, s >= 1 for independent continuations of it.
        """
        ids = jnp.asarray(input_ids)
        is_image = ids == self.config.image_token_id
        valid = jnp.ones(ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask).astype(bool)
        if positions is None:
            positions = jnp.maximum(jnp.cumsum(valid.astype(jnp.int32), axis=1) - 1, 0)
        x = self.decoder.embed(jnp.where(is_image, 0, ids))
        if pixel_values is not None and len(pixel_values):
            features = self.features(jnp.asarray(pixel_values))
            flat = features.reshape(-1, features.shape[-1]).astype(x.dtype)
            slot = jnp.cumsum(is_image.reshape(-1).astype(jnp.int32)) - 1
            placed = flat[jnp.clip(slot, 0, flat.shape[0] - 1)].reshape(x.shape)
            x = jnp.where(is_image[..., None], placed, x)
        context = Context(jnp.asarray(positions), causal_mask(valid, segments), valid & ~is_image, valid)
        return Hidden(x, context)

    def embed_text(self, input_ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Embed tokens of the vocabulary; a placeholder that the model wrote itself is no image."""
        x: Float[Array, "B L D"] = self.decoder.embed(jnp.asarray(input_ids))
        return x

    def unembed(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Return the logits of hidden states after the last block."""
        logits: Float[Array, "*B V"] = self.decoder.unembed(x)
        return logits

    def __call__(
        self,
        input_ids: Int[Array, "B L"],
        pixel_values: Float[Array, "N C H W"] | None = None,
        attention_mask: Bool[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        segments: Int[Array, "B L"] | None = None,
    ) -> Float[Array, "B L V"]:
        """Return logits; see `embed` for the arguments."""
        hidden = self.embed(input_ids, pixel_values, attention_mask, positions, segments)
        logits: Float[Array, "B L V"] = self.decoder(hidden.x, hidden.context)
        return logits


class Projector(nn.Module):
    """Two linear layers between vision tower and decoder."""

    width: int
    hidden_act: str
    use_bias: bool

    @nn.compact
    def __call__(self, x: Float[Array, "N T V"]) -> Float[Array, "N T D"]:
        """Map vision features to the decoder's width."""
        h = activation(self.hidden_act)(Linear(self.width, self.use_bias, name="fc1")(x))
        out: Float[Array, "N T D"] = Linear(self.width, self.use_bias, name="fc2")(h)
        return out

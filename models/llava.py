"""LLaVA (arXiv 2304.08485), as Hugging Face's ``LlavaForConditionalGeneration``: vision tower, two-layer projector, Llama decoder."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from splitq_jax.errors import InputError
from splitq_jax.models.decoder import Decoder, DecoderConfig
from splitq_jax.models.layers import LARGEST, Linear, activation, check_types
from splitq_jax.models.model import VisionLanguageModel, check_pixels
from splitq_jax.models.names import Source, Spelling, Table
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
        activation(self.projector_hidden_act)
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
    def placeholders(self) -> tuple[int, ...]:
        """Tokens that image features replace."""
        return (self.image_token_id,)

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


class Llava(VisionLanguageModel):
    """The model; apply it to a float or a quantized parameter tree."""

    config: LlavaConfig
    # in transformers 5's memory, on its disk, and in older files: model.language_model.*, language_model.model.*,
    # vision_tower.vision_model.*
    spelling = Spelling(
        rules=(
            (r"^model\.language_model\.", "language_model.model."),
            (r"^model\.(?=(vision_tower|multi_modal_projector)\.)", ""),
            (r"^lm_head\.", "language_model.lm_head."),
            (r"^vision_tower\.vision_model\.", "vision_tower."),
        ),
        # read by nothing up to the selected vision layer
        unused=r"vision_tower\.(post_layernorm\.|head\.|embeddings\.position_ids).*|.*\.rotary_emb\.inv_freq",
        head="language_model.lm_head.weight",
        embedding="language_model.model.embed_tokens.weight",
    )

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Llava":
        """Return the model of a ``config.json``; see `LlavaConfig.from_hf`."""
        return cls(LlavaConfig.from_hf(config))

    def setup(self) -> None:
        """Create the parts; their names are the parameter tree's."""
        c = self.config
        self.vision = VisionTower(c.vision, depth=max(c.feature_layers))
        self.projector = Projector(c.text.hidden_size, c.projector_hidden_act, c.projector_bias)
        self.decoder = Decoder(c.text, c.tied)

    @nn.nowrap
    def table(self) -> dict[str, Source]:
        """Return the source of every leaf, by its path."""
        c, t = self.config, Table()
        t.tower(c.vision, max(c.feature_layers), "vision_tower")
        widths = c.vision.hidden_size * len(c.feature_layers), c.text.hidden_size
        for i, inputs in enumerate(widths, start=1):
            t.linear(f"projector/fc{i}", [f"multi_modal_projector.linear_{i}"], inputs, [c.text.hidden_size], c.projector_bias)
        t.decoder(c.text, c.tied, "language_model.model", "language_model.lm_head")
        return t.sources

    @nn.nowrap
    def is_unused(self, name: str) -> bool:
        """Say whether a tensor is read by nothing: past the selected vision layer, or unused in all LLaVAs."""
        found = re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", name)
        past = found is not None and max(self.config.feature_layers) <= int(found[1]) < self.config.vision.num_layers
        return past or super().is_unused(name)

    @nn.nowrap
    def unread(self) -> dict[str, Float[np.ndarray, "..."]]:
        """Return the tower's last norm, which transformers has and LLaVA never reads.

        Raises:
          InputError: the tower is cut after the selected layer.
        """
        c, kept = self.config, max(self.config.feature_layers)
        if kept != c.vision.num_layers:
            raise InputError(f"vision tower: {kept} of {c.vision.num_layers} layers are kept; only a whole tower can be exported")
        weight = np.ones(c.vision.hidden_size, np.float32)
        return {"vision_tower.post_layernorm.weight": weight, "vision_tower.post_layernorm.bias": 0 * weight}

    @nn.nowrap
    def example(self) -> dict[str, Any]:
        """Return a smallest batch with an image."""
        c = self.config
        pixels = jax.ShapeDtypeStruct((1, c.vision.num_channels, c.vision.image_size, c.vision.image_size), jnp.float32)
        return {"input_ids": jax.ShapeDtypeStruct((1, c.tokens_per_image), jnp.int32), "pixel_values": pixels}

    @nn.nowrap
    def check(self, batch: Mapping[str, Any]) -> None:
        """Check a batch of host arrays before it is traced.

        Raises:
          InputError: what `VisionLanguageModel.check` refuses; pixel values that are not finite or of another size; another number of
            image placeholders than of image features; an image whose placeholders are not all in one sample.
        """
        super().check(batch)
        c, pixels = self.config, batch.get("pixel_values")
        if pixels is not None:
            check_pixels(pixels, ("images", c.vision.num_channels, c.vision.image_size, c.vision.image_size), "pixel_values")
        count = 0 if pixels is None else len(pixels)
        placed = (np.asarray(batch["input_ids"]) == c.image_token_id).sum(axis=1)
        if placed.sum() != count * c.tokens_per_image or (placed % c.tokens_per_image).any():
            found = ", ".join(map(str, placed[:8]))
            raise InputError(
                f"input_ids: {found} image placeholders a sample with {count} images in all; an image takes {c.tokens_per_image}"
            )

    def features(self, pixel_values: Float[Array, "N C H W"]) -> list[Float[Array, "M D"]]:
        """Return the projected image tokens."""
        states = self.vision(pixel_values)
        picked = [states[i][:, 1:] if self.config.drops_first else states[i] for i in self.config.feature_layers]
        rows: Float[Array, "N T D"] = self.projector(jnp.concatenate(picked, axis=-1))
        return [rows.reshape(-1, rows.shape[-1])]


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

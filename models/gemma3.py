"""Gemma 3 (arXiv 2503.19786), as Hugging Face's ``Gemma3ForConditionalGeneration``: SigLIP tower, pooled projector, Gemma decoder."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from splitq_jax.errors import InputError
from splitq_jax.models.decoder import Decoder, DecoderConfig, causal_mask
from splitq_jax.models.families import normalized
from splitq_jax.models.layers import Linear, RMSNorm, check_sizes, check_types
from splitq_jax.models.llava import Llava
from splitq_jax.models.model import FamilyConfig, FixedImages
from splitq_jax.models.names import Source, Table
from splitq_jax.models.vision import VisionConfig, VisionTower


@dataclass(frozen=True)
class Gemma3Config(FamilyConfig):
    """A Gemma 3's ``config.json``.

    Attributes:
      tower_head: the files hold SigLIP's pooling head, which Gemma never reads.
    """

    vision: VisionConfig
    text: DecoderConfig
    image_token_id: int
    mm_tokens_per_image: int
    tower_head: bool
    tied: bool

    def __post_init__(self) -> None:
        check_sizes("top level", mm_tokens_per_image=self.mm_tokens_per_image, image_token_id=self.image_token_id)
        if self.pool < 1:
            raise InputError(
                f"config.json: mm_tokens_per_image {self.mm_tokens_per_image}; the vision tower has {self.vision.num_patches} patches"
            )

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Gemma3Config":
        """Read ``config.json``.

        Raises:
          InputError: another model_type, or parts that are not supported.
        """
        if config.get("model_type") != "gemma3":
            raise InputError(f"config.json: model_type {config.get('model_type')!r}; expected gemma3")
        given, config = config, normalized(config)
        vision, text = config["vision_config"], config["text_config"]
        # transformers would read any text_config as its own
        for found, kind in ((vision, "siglip_vision_model"), (text | (given.get("text_config") or {}), "gemma3_text")):
            if found["model_type"] != kind:
                raise InputError(f"config.json: model_type {found['model_type']!r} in a gemma3; expected {kind}")
        for part in ("text_config", "vision_config"):
            check_types(part, config[part])
        if text["use_bidirectional_attention"]:
            raise InputError("config.json: use_bidirectional_attention is not supported; it makes a text encoder")
        check_sizes("text_config", query_pre_attn_scalar=text["query_pre_attn_scalar"])
        return cls(
            vision=VisionConfig.from_hf(vision),
            text=DecoderConfig.from_hf(text),
            image_token_id=config["image_token_index"],
            mm_tokens_per_image=config["mm_tokens_per_image"],
            tower_head=vision["vision_use_head"],
            tied=bool(config["tie_word_embeddings"]),
        )

    @property
    def pool(self) -> int:
        """Side of the square of patches that becomes one token."""
        return self.vision.image_size // self.vision.patch_size // math.isqrt(self.mm_tokens_per_image)

    @property
    def tokens_per_image(self) -> int:
        """Placeholders of an image: ``mm_tokens_per_image`` where its root divides the grid of patches."""
        return (self.vision.image_size // self.vision.patch_size // self.pool) ** 2


class Gemma3(FixedImages):
    """The model; apply it to a float or a quantized parameter tree. Crops of pan and scan are further images."""

    config: Gemma3Config
    spelling = dataclasses.replace(
        Llava.spelling, unused=r"vision_tower\.(head\.|embeddings\.position_ids).*|.*\.(rotary_emb\.\w*inv_freq|embed_scale)"
    )

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Gemma3":
        """Return the model of a ``config.json``; see `Gemma3Config.from_hf`."""
        return cls(Gemma3Config.from_hf(config))

    def setup(self) -> None:
        """Create the parts; their names are the parameter tree's."""
        c = self.config
        self.vision = VisionTower(c.vision, c.vision.num_layers, last_norm=True)
        self.projector = Projector(c)
        self.decoder = Decoder(c.text, c.tied)

    @nn.nowrap
    def table(self) -> dict[str, Source]:
        """Return the source of every leaf, by its path."""
        c, t = self.config, Table()
        t.tower(c.vision, c.vision.num_layers, "vision_tower", last_norm=True)
        t.norm("projector/norm", "multi_modal_projector.mm_soft_emb_norm", c.vision.hidden_size)
        # a parameter, not a linear layer: it lies in the files as (in, out)
        shape = (c.vision.hidden_size, c.text.hidden_size)
        t.plain("projector/fc/kernel", "multi_modal_projector.mm_input_projection_weight", shape)
        t.decoder(c.text, c.tied, "language_model.model", "language_model.lm_head")
        return t.sources

    @nn.nowrap
    def unread(self) -> dict[str, Float[np.ndarray, "..."]]:
        """Return nothing: all that transformers has is read, but for the tower's head.

        Raises:
          InputError: the config has a head on the tower.
        """
        if self.config.tower_head:
            raise InputError("config.json: the vision tower's head is not kept; set vision_use_head to false to export")
        return {}

    @nn.nowrap
    def prepare(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Check a batch of host arrays, as the processor gives it, and return what the traced model takes.

        ``token_type_ids`` say where the images are, which the placeholders say too: they may be left out, unlike in transformers,
        which then lets no image token see a later one.

        Raises:
          InputError: see `check`.
        """
        prepared = super().prepare(batch)
        return {name: value for name, value in prepared.items() if name not in {"token_type_ids", "num_crops"}}

    @nn.nowrap
    def check(self, batch: Mapping[str, Any]) -> None:
        """Check a batch of host arrays before it is traced.

        Raises:
          InputError: what `FixedImages.check` refuses; token types that are not 1 at the placeholders and there alone.
        """
        super().check(batch)
        types, image = batch.get("token_type_ids"), self.config.image_token_id
        if types is not None and not np.array_equal(np.asarray(types) == 1, np.asarray(batch["input_ids"]) == image):
            raise InputError(f"token_type_ids: expected 1 where input_ids has the image token {image}, and only there")

    def mask(
        self, is_image: Bool[Array, "B L"], valid: Bool[Array, "B L"], segments: Int[Array, "B L"] | None
    ) -> Bool[Array, "B K L L"]:
        """Return which keys a query may see: the tokens of an image, which stand in a row, see each other both ways."""
        begins = is_image & ~jnp.pad(is_image, ((0, 0), (1, 0)))[:, :-1]
        image = jnp.where(is_image, jnp.cumsum(begins.astype(jnp.int32), axis=1), -1)
        return causal_mask(valid, segments, self.config.text.window, image)

    def features(self, pixel_values: Float[Array, "N C H W"]) -> list[Float[Array, "M D"]]:
        """Return the projected image tokens."""
        rows: Float[Array, "N T D"] = self.projector(self.vision(pixel_values)[-1])
        return [rows.reshape(-1, rows.shape[-1])]


class Projector(nn.Module):
    """Mean over squares of patches, norm, and a linear layer."""

    config: Gemma3Config

    @nn.compact
    def __call__(self, x: Float[Array, "N P V"]) -> Float[Array, "N T D"]:
        """Map vision features to the decoder's width."""
        c, k = self.config, self.config.pool
        grid, side = math.isqrt(x.shape[1]), math.isqrt(c.tokens_per_image)
        kept = x.reshape(-1, grid, grid, x.shape[-1])[:, : side * k, : side * k]
        pooled = kept.reshape(-1, side, k, side, k, x.shape[-1]).mean(axis=(2, 4)).reshape(-1, side * side, x.shape[-1])
        out: Float[Array, "N T D"] = Linear(c.text.hidden_size, name="fc")(
            RMSNorm(c.vision.layer_norm_eps, True, name="norm")(pooled)
        )
        return out

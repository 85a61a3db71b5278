"""LLaVA (arXiv 2304.08485), as Hugging Face's ``LlavaForConditionalGeneration``: vision tower, two-layer projector, Llama decoder."""

import re
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from splitq_jax.errors import InputError
from splitq_jax.models.decoder import Decoder, DecoderConfig
from splitq_jax.models.families import normalized
from splitq_jax.models.layers import LARGEST, LayerNorm, Linear, activation
from splitq_jax.models.model import FamilyConfig, FixedImages
from splitq_jax.models.names import Source, Spelling, Table
from splitq_jax.models.vision import VisionConfig, VisionTower

MAX_IMAGE_TOKENS = 1 << 16
# in transformers 5's memory, on its disk, and in older files: model.language_model.*, language_model.model.*,
# vision_tower.vision_model.*
SPELLING = Spelling(
    rules=(
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.(?=vision_tower\.|multi_modal_projector\.|image_newline$)", ""),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^vision_tower\.vision_model\.", "vision_tower."),
    ),
    # read by nothing up to the selected vision layer
    unused=r"vision_tower\.(post_layernorm\.|head\.|embeddings\.position_ids).*|.*\.rotary_emb\.inv_freq",
    head="language_model.lm_head.weight",
    embedding="language_model.model.embed_tokens.weight",
)


@dataclass(frozen=True)
class LlavaConfig(FamilyConfig):
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
        return cls(**cls.fields(normalized(config)))

    @staticmethod
    def fields(config: dict[str, Any]) -> dict[str, Any]:
        """Return the fields that LLaVA and LLaVA-OneVision share, read from a `normalized` ``config.json``."""
        layer, vision = config["vision_feature_layer"], VisionConfig.from_hf(config["vision_config"])
        layers = tuple(layer) if isinstance(layer, list | tuple) else (layer,)
        if not layers or not all(type(i) is int and -vision.num_layers - 1 <= i <= vision.num_layers for i in layers):
            raise InputError(f"config.json: vision_feature_layer {layer!r}; the vision tower has layers 0 to {vision.num_layers}")
        return {
            "vision": vision,
            "text": DecoderConfig.from_hf(config["text_config"]),
            "image_token_id": config["image_token_index"],
            "vision_feature_layer": layers,
            "vision_feature_select_strategy": config["vision_feature_select_strategy"],
            "projector_hidden_act": config["projector_hidden_act"],
            "projector_bias": config["multimodal_projector_bias"],
            "tied": config["tie_word_embeddings"],
        }

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


class LlavaBase(FixedImages):
    """The parts that LLaVA and LLaVA-OneVision share."""

    config: LlavaConfig
    spelling = SPELLING

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

    def project(self, pixel_values: Float[Array, "N C H W"]) -> Float[Array, "M D"]:
        """Return the projected features of all images, one behind the other."""
        states = self.vision(pixel_values)
        picked = [states[i][:, 1:] if self.config.drops_first else states[i] for i in self.config.feature_layers]
        rows: Float[Array, "N T D"] = self.projector(jnp.concatenate(picked, axis=-1))
        return rows.reshape(-1, rows.shape[-1])


class Llava(LlavaBase):
    """The model; apply it to a float or a quantized parameter tree."""

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Llava":
        """Return the model of a ``config.json``; see `LlavaConfig.from_hf`."""
        return cls(LlavaConfig.from_hf(config))

    def features(self, pixel_values: Float[Array, "N C H W"]) -> list[Float[Array, "M D"]]:
        """Return the projected image tokens."""
        return [self.project(pixel_values)]


class Projector(nn.Module):
    """Two linear layers between vision tower and decoder, behind a norm where ``norm_eps`` is given."""

    width: int
    hidden_act: str
    use_bias: bool
    norm_eps: float | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "N T V"]) -> Float[Array, "N T D"]:
        """Map vision features to the decoder's width."""
        if self.norm_eps is not None:
            x = LayerNorm(self.norm_eps, name="norm")(x)
        h = activation(self.hidden_act)(Linear(self.width, self.use_bias, name="fc1")(x))
        out: Float[Array, "N T D"] = Linear(self.width, self.use_bias, name="fc2")(h)
        return out

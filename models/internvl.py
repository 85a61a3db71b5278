"""InternVL (arXiv 2504.10479), as Hugging Face's ``InternVLForConditionalGeneration``: InternViT, pixel shuffle, projector, decoder.

The tiles of an image, and the view of the whole behind them, come as images of their own in ``pixel_values``.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from splitq_jax.errors import InputError
from splitq_jax.models.decoder import Decoder, DecoderConfig
from splitq_jax.models.families import normalized
from splitq_jax.models.internvit import InternViT, InternViTConfig
from splitq_jax.models.layers import LARGEST, activation
from splitq_jax.models.llava import MAX_IMAGE_TOKENS, SPELLING, Projector
from splitq_jax.models.model import FamilyConfig, FixedImages
from splitq_jax.models.names import Source, Table

PROJECTOR_EPS = 1e-5


@dataclass(frozen=True)
class InternVLConfig(FamilyConfig):
    """An InternVL's ``config.json``.

    Attributes:
      depth: blocks of the tower that are run.
      norm_last: the tower's output is normalised.
      shuffle: patches along a side that become one feature.
    """

    vision: InternViTConfig
    text: DecoderConfig
    image_token_id: int
    depth: int
    norm_last: bool
    shuffle: int
    projector_hidden_act: str
    tied: bool

    def __post_init__(self) -> None:
        activation(self.projector_hidden_act)
        if not 0 <= self.image_token_id < LARGEST:
            raise InputError(f"config.json: image_token_id {self.image_token_id}; expected 0 to {LARGEST - 1}")
        if self.vision.side % self.shuffle:
            raise InputError(
                f"config.json: {self.vision.side} patches along a side are no multiple of {self.shuffle}, 1 / downsample_ratio"
            )
        if self.tokens_per_image > MAX_IMAGE_TOKENS:
            raise InputError(f"config.json: an image takes {self.tokens_per_image} tokens; expected 1 to {MAX_IMAGE_TOKENS}")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "InternVLConfig":
        """Read ``config.json``.

        Raises:
          InputError: parts that are not supported.
        """
        whole = normalized(config)
        vision = InternViTConfig.from_hf(whole["vision_config"])
        layer, ratio = whole["vision_feature_layer"], whole["downsample_ratio"]
        if type(layer) is not int or not -vision.num_layers - 1 <= layer <= vision.num_layers:
            raise InputError(f"config.json: vision_feature_layer {layer!r}; the vision tower has layers 0 to {vision.num_layers}")
        if whole["vision_feature_select_strategy"] != "default":  # the class token has no place in a square of patches
            raise InputError(
                f"config.json: vision_feature_select_strategy {whole['vision_feature_select_strategy']!r}; expected default"
            )
        if not 0 < ratio <= 1 or not (1 / ratio).is_integer():
            raise InputError(f"config.json: downsample_ratio {ratio!r}; expected one over a whole number")
        # files from before transformers 5 say nothing at the top level, and then the text config decides
        silent = config.get("tie_word_embeddings") is None
        return cls(
            vision=vision,
            text=DecoderConfig.from_hf(whole["text_config"]),
            image_token_id=whole["image_token_id"],
            depth=layer % (vision.num_layers + 1),
            norm_last=vision.has_last_norm and layer == -1,
            shuffle=int(1 / ratio),
            projector_hidden_act=whole["projector_hidden_act"],
            tied=whole["text_config"]["tie_word_embeddings"] if silent else whole["tie_word_embeddings"],
        )

    @property
    def tokens_per_image(self) -> int:
        """Placeholders of a tile."""
        return (self.vision.side // self.shuffle) ** 2


def pixel_shuffle(x: Float[Array, "N P D"], size: int) -> Float[Array, "N Q F"]:
    """Put the features of each square of size x size patches side by side, row by row; P is a square."""
    side = math.isqrt(x.shape[1])
    squares = x.reshape(x.shape[0], side // size, size, side // size, size, -1).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(x.shape[0], (side // size) ** 2, -1)


class InternVL(FixedImages):
    """The model; apply it to a float or a quantized parameter tree."""

    config: InternVLConfig
    spelling = SPELLING

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "InternVL":
        """Return the model of a ``config.json``; see `InternVLConfig.from_hf`."""
        return cls(InternVLConfig.from_hf(config))

    def setup(self) -> None:
        """Create the parts; their names are the parameter tree's."""
        c = self.config
        self.vision = InternViT(c.vision, c.depth, c.norm_last)
        self.projector = Projector(c.text.hidden_size, c.projector_hidden_act, True, PROJECTOR_EPS)
        self.decoder = Decoder(c.text, c.tied)

    @nn.nowrap
    def table(self) -> dict[str, Source]:
        """Return the source of every leaf, by its path."""
        c, v, t = self.config, self.config.vision, Table()
        width, embeddings = v.hidden_size, "vision_tower.embeddings"
        t.patch(
            "vision/patch", f"{embeddings}.patch_embeddings.projection.weight", (width, v.num_channels, v.patch_size, v.patch_size)
        )
        t.plain("vision/patch_bias", f"{embeddings}.patch_embeddings.projection.bias", (width,))
        t.plain("vision/class", f"{embeddings}.cls_token", (1, 1, width))
        if v.has_positions:
            t.plain("vision/position", f"{embeddings}.position_embeddings", (1, v.side**2 + 1, width))
        for i in range(c.depth):
            to, source = f"vision/blocks_{i}", f"vision_tower.encoder.layer.{i}"
            t.norm(f"{to}/norm_attn", f"{source}.layernorm_before", width, v.norm == "layer_norm")
            t.linear(f"{to}/qkv", [f"{source}.attention.{n}_proj" for n in "qkv"], width, (width,) * 3, v.qkv_bias)
            if v.qk_norm:
                for n in "qk":
                    t.norm(f"{to}/norm_{n}", f"{source}.attention.{n}_norm", width)
            t.linear(f"{to}/o", [f"{source}.attention.projection_layer"], width, [width], True)
            t.plain(f"{to}/scale_attn", f"{source}.lambda_1", (width,))
            t.norm(f"{to}/norm_mlp", f"{source}.layernorm_after", width, v.norm == "layer_norm")
            t.linear(f"{to}/fc1", [f"{source}.mlp.fc1"], width, [v.intermediate_size], True)
            t.linear(f"{to}/fc2", [f"{source}.mlp.fc2"], v.intermediate_size, [width], True)
            t.plain(f"{to}/scale_mlp", f"{source}.lambda_2", (width,))
        if c.norm_last:
            t.norm("vision/norm_post", "vision_tower.layernorm", width, True)
        inputs = width * c.shuffle**2
        t.norm("projector/norm", "multi_modal_projector.layer_norm", inputs, True)
        for i, size in enumerate((inputs, c.text.hidden_size), start=1):
            t.linear(f"projector/fc{i}", [f"multi_modal_projector.linear_{i}"], size, [c.text.hidden_size], True)
        t.decoder(c.text, c.tied, "language_model.model", "language_model.lm_head")
        return t.sources

    @nn.nowrap
    def is_unused(self, name: str) -> bool:
        """Say whether a tensor is read by nothing: past the selected vision layer, or only trained with."""
        found = re.match(r"vision_tower\.encoder\.layer\.(\d+)\.", name)
        past = found is not None and self.config.depth <= int(found[1]) < self.config.vision.num_layers
        return past or name in self._unread() or super().is_unused(name)

    @nn.nowrap
    def _unread(self) -> dict[str, Float[np.ndarray, "..."]]:
        """Return the tensors outside the blocks that lie in the files and are read by nothing."""
        v, names = self.config.vision, "vision_tower.layernorm"
        ones = np.ones(v.hidden_size, np.float32)
        token = {"vision_tower.embeddings.mask_token": 0 * ones[None, None]} if v.has_mask_token else {}
        norm = {f"{names}.weight": ones, f"{names}.bias": 0 * ones} if v.has_last_norm and not self.config.norm_last else {}
        return token | norm

    @nn.nowrap
    def unread(self) -> dict[str, Float[np.ndarray, "..."]]:
        """Return what transformers has and the model never reads.

        Raises:
          InputError: the tower is cut after the selected layer.
        """
        c = self.config
        if c.depth != c.vision.num_layers:
            raise InputError(
                f"vision tower: {c.depth} of {c.vision.num_layers} layers are kept; only a whole tower can be exported"
            )
        return self._unread()

    def features(self, pixel_values: Float[Array, "N C H W"]) -> list[Float[Array, "M D"]]:
        """Return the projected image tokens."""
        rows: Float[Array, "N T D"] = self.projector(pixel_shuffle(self.vision(pixel_values), self.config.shuffle))
        return [rows.reshape(-1, rows.shape[-1])]

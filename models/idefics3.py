"""Idefics3 (arXiv 2408.12637) and SmolVLM (arXiv 2504.05299), as Hugging Face's classes: SigLIP-like tower, pixel shuffle, decoder."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from splitq_jax.errors import InputError
from splitq_jax.models.decoder import Decoder, DecoderConfig
from splitq_jax.models.families import normalized
from splitq_jax.models.layers import Linear, check_sizes, check_types
from splitq_jax.models.model import FamilyConfig, VisionLanguageModel, check_pixels
from splitq_jax.models.names import Source, Spelling, Table
from splitq_jax.models.vision import VisionConfig, VisionTower

TEXTS = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Idefics3Config(FamilyConfig):
    """An Idefics3's or SmolVLM's ``config.json``.

    Attributes:
      scale_factor: side of the square of patches that becomes one token.
      keeps_one: where all tiles are padding, the first is an image nevertheless (SmolVLM).
    """

    vision: VisionConfig
    text: DecoderConfig
    image_token_id: int
    scale_factor: int
    keeps_one: bool
    tied: bool

    def __post_init__(self) -> None:
        check_sizes("top level", image_token_id=self.image_token_id, scale_factor=self.scale_factor)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Idefics3Config":
        """Read ``config.json``.

        Raises:
          InputError: another model_type, or parts that are not supported.
        """
        kind = config.get("model_type")
        if kind not in {"idefics3", "smolvlm"}:
            raise InputError(f"config.json: model_type {kind!r}; expected idefics3 or smolvlm")
        config = normalized(config)
        text = config["text_config"]
        for part in ("text_config", "vision_config"):
            check_types(part, config[part])
        if text["model_type"] not in TEXTS:
            raise InputError(f"config.json: text model_type {text['model_type']!r}; supported are {', '.join(TEXTS)}")
        return cls(
            vision=VisionConfig.from_hf(config["vision_config"] | {"model_type": "siglip_vision_model"}),
            text=DecoderConfig.from_hf(text),
            image_token_id=config["image_token_id"],
            scale_factor=config["scale_factor"],
            keeps_one=kind == "smolvlm",
            tied=bool(config["tie_word_embeddings"]),
        )

    @property
    def tokens_per_image(self) -> int:
        """Placeholders of a tile of the config's size."""
        return self.vision.num_patches // self.scale_factor**2


class Idefics3(VisionLanguageModel):
    """The model; apply it to a float or a quantized parameter tree."""

    config: Idefics3Config
    spelling = Spelling(embedding="model.text_model.embed_tokens.weight")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Idefics3":
        """Return the model of a ``config.json``; see `Idefics3Config.from_hf`."""
        return cls(Idefics3Config.from_hf(config))

    def setup(self) -> None:
        """Create the parts; their names are the parameter tree's."""
        c = self.config
        self.vision = VisionTower(c.vision, c.vision.num_layers, last_norm=True)
        self.projector = Projector(c.text.hidden_size, c.scale_factor)
        self.decoder = Decoder(c.text, c.tied)

    @nn.nowrap
    def table(self) -> dict[str, Source]:
        """Return the source of every leaf, by its path."""
        c, t = self.config, Table()
        t.tower(c.vision, c.vision.num_layers, "model.vision_model", last_norm=True)
        inputs = c.vision.hidden_size * c.scale_factor**2
        t.linear("projector/fc", ["model.connector.modality_projection.proj"], inputs, [c.text.hidden_size])
        t.decoder(c.text, c.tied, "model.text_model")
        return t.sources

    @nn.nowrap
    def prepare(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Check a batch of host arrays, as the processor gives it, and return what the traced model takes.

        Args:
          batch: ``pixel_values`` (samples, tiles, C, H, W), a tile of zeros for none; ``pixel_attention_mask`` (samples, tiles, H, W),
            0 for padding, or None.

        Raises:
          InputError: what `VisionLanguageModel.check` refuses; pixel values or masks of another shape, or not finite; tiles that the
            pixel shuffle cannot take or that show nothing; another number of placeholders in a sample than its tiles have features.
        """
        self.check(batch)
        tiles: dict[str, np.ndarray] = {}
        placed = (np.asarray(batch["input_ids"]) == self.config.image_token_id).sum(axis=1)
        expected = np.zeros_like(placed)
        if batch.get("pixel_values") is not None:
            tiles, expected = self._tiles(np.asarray(batch["pixel_values"]), batch.get("pixel_attention_mask"), len(placed))
        if (wrong := np.flatnonzero(placed != expected)).size:
            i = wrong[0]
            raise InputError(f"input_ids: sample {i} has {placed[i]} image placeholders; its tiles take {expected[i]}")
        given = {name: np.asarray(value) for name, value in batch.items() if value is not None}
        return {name: value for name, value in given.items() if not name.startswith("pixel_")} | tiles

    @nn.nowrap
    def _tiles(self, pixels: np.ndarray, mask: Any, samples: int) -> tuple[dict[str, np.ndarray], Int[np.ndarray, " B"]]:
        """Leave padding tiles out; return the tower's input and the number of features of each sample."""
        c, p = self.config, self.config.vision.patch_size
        check_pixels(pixels, (samples, "tiles", c.vision.num_channels, "height", "width"), "pixel_values")
        rows, columns = pixels.shape[3] // p, pixels.shape[4] // p
        side = math.isqrt(rows * columns)
        if not side or side**2 != rows * columns or side % c.scale_factor:
            raise InputError(
                f"pixel_values: tiles of {rows} x {columns} patches; expected a square number of them, whose root is a multiple of "
                f"scale_factor {c.scale_factor}"
            )
        real = (pixels != 0).any(axis=(2, 3, 4))
        if c.keeps_one and real.size and not real.any():
            real[0, 0] = True
        counts = real.sum(axis=1) * (side // c.scale_factor) ** 2
        if not real.any():
            return {}, counts
        seen = np.ones(pixels.shape[:2] + pixels.shape[3:], bool) if mask is None else np.asarray(mask) != 0
        if seen.shape != pixels.shape[:2] + pixels.shape[3:]:
            raise InputError(f"pixel_attention_mask: shape {seen.shape}; expected {pixels.shape[:2] + pixels.shape[3:]}")
        patches = seen[real][:, : rows * p, : columns * p].reshape(-1, rows, p, columns, p).any(axis=(2, 4))
        if not (patches[:, 0].any(axis=1) & patches[:, :, 0].any(axis=1)).all():
            raise InputError("pixel_attention_mask: a tile shows nothing in its first row or column; padding belongs at its end")
        positions = patch_positions(patches, c.vision.image_size // p)
        return {
            "pixel_values": pixels[real],
            "patch_positions": positions.reshape(len(positions), -1),
            "patch_valid": patches.reshape(len(patches), -1),
        }, counts

    def features(
        self, pixel_values: Float[Array, "N C H W"], patch_positions: Int[Array, "N P"], patch_valid: Bool[Array, "N P"]
    ) -> list[Float[Array, "M D"]]:
        """Return the projected tokens of all tiles."""
        rows: Float[Array, "N T D"] = self.projector(self.vision(pixel_values, patch_positions, patch_valid)[-1])
        return [rows.reshape(-1, rows.shape[-1])]


class Projector(nn.Module):
    """Squares of patches side by side in one vector, and a linear layer."""

    width: int
    scale_factor: int

    @nn.compact
    def __call__(self, x: Float[Array, "N P V"]) -> Float[Array, "N T D"]:
        """Map vision features to the decoder's width."""
        s, side = self.scale_factor, math.isqrt(x.shape[1]) // self.scale_factor
        squares = x.reshape(-1, side, s, side, s, x.shape[-1]).transpose(0, 1, 3, 2, 4, 5)
        out: Float[Array, "N T D"] = Linear(self.width, name="fc")(squares.reshape(-1, side**2, s**2 * x.shape[-1]))
        return out


def patch_positions(valid: Bool[np.ndarray, "N h w"], grid: int) -> Int[np.ndarray, "N h w"]:
    """Return the row of the position embedding, one of ``grid x grid``, that lies where a patch lies in its picture; 0 for padding.

    A fraction that falls on a bound goes to one side or the other by its last bit, so every rounding here is torch's: its ``arange``
    counts single steps in double precision, but from 16 steps on eight at a time from a base in single precision.
    """
    step = 1 / grid
    count = max(math.ceil((1 - step) / step), 0)
    bounds = step + step * np.arange(count)
    whole = count // 16 * 16
    bases = bounds[:whole:8].astype(np.float32).astype(np.float64)
    bounds[:whole] = (bases[:, None] + step * np.arange(8)).reshape(-1)
    bounds = bounds.astype(np.float32)

    def places(shown: Bool[np.ndarray, "N n"]) -> Int[np.ndarray, "N n"]:
        steps = np.float32(1) / shown.sum(axis=1, keepdims=True).astype(np.float32)
        fractions = np.arange(shown.shape[1], dtype=np.float32) * steps
        return np.searchsorted(bounds, np.minimum(fractions, np.float32(1 - 1e-6)), side="right").astype(np.int32)

    rows, columns = places(valid[:, :, 0]), places(valid[:, 0])
    return np.where(valid, rows[:, :, None] * grid + columns[:, None], 0).astype(np.int32)

"""What Qwen2-VL, Qwen2.5-VL and Qwen3-VL share: the model around tower, mergers and decoder, and the input as transformers gives it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from splitq_jax.errors import InputError
from splitq_jax.models.decoder import Decoder, DecoderConfig
from splitq_jax.models.families import normalized
from splitq_jax.models.layers import LARGEST
from splitq_jax.models.model import FamilyConfig, VisionLanguageModel, check_pixels
from splitq_jax.models.mrope import Visuals, mrope_positions
from splitq_jax.models.names import Source, Spelling, Table
from splitq_jax.models.qwen_vision import QwenMerger, QwenVisionConfig, QwenVisionTower, arrange, roomy

MODALITIES = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
TOKENS = ("input_ids", "attention_mask", "positions", "segments")
INPUTS = {*TOKENS, *(name for names in MODALITIES.values() for name in names), "mm_token_type_ids", "second_per_grid_ts"}


SPELLING = Spelling(  # of Qwen2-VL and Qwen2.5-VL
    rules=((r"^model\.(?=visual\.)", ""), (r"^model\.language_model\.", "model.")),  # transformers 5's memory
    embedding="model.embed_tokens.weight",
)


@dataclass(frozen=True)
class QwenConfig(FamilyConfig):
    """A Qwen-VL's ``config.json``.

    Attributes:
      tokens_per_second: temporal positions of a second of video (Qwen2.5-VL); None where frames count one each.
    """

    vision: QwenVisionConfig
    text: DecoderConfig
    image_token_id: int
    video_token_id: int
    tied: bool
    tokens_per_second: int | None = None

    def __post_init__(self) -> None:
        if self.image_token_id == self.video_token_id or not all(0 <= i < LARGEST for i in self.placeholders):
            raise InputError(f"config.json: image and video token {self.placeholders}; expected two tokens of 0 to {LARGEST - 1}")
        if self.vision.out_size != self.text.hidden_size:
            raise InputError(
                f"config.json: image features of width {self.vision.out_size}; the decoder's is {self.text.hidden_size}"
            )

    @property
    def placeholders(self) -> tuple[int, ...]:
        """Tokens that features of images and videos replace."""
        return (self.image_token_id, self.video_token_id)


def read(config: dict[str, Any], kind: str, sections: tuple[int, int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a whole ``config.json`` and what `QwenConfig` takes of it besides the vision part.

    Args:
      config: as it lies in the folder.
      kind: its model_type.
      sections: M-RoPE's where the config names none.

    Raises:
      InputError: another model type, or parts that are not supported.
    """
    if config.get("model_type") != kind:
        raise InputError(f"config.json: model_type {config.get('model_type')!r}; expected {kind}")
    whole = normalized(config)
    text, vision = whole["text_config"], whole["vision_config"]
    if (text["model_type"], vision["model_type"]) != (f"{kind}_text", f"{kind}_vision"):
        raise InputError(f"config.json: parts {text['model_type']!r} and {vision['model_type']!r} in a {kind}")
    text["rope_parameters"] = {"mrope_section": list(sections)} | text["rope_parameters"]
    return whole, {
        "text": DecoderConfig.from_hf(text),
        "image_token_id": whole["image_token_id"],
        "video_token_id": whole["video_token_id"],
        "tied": bool(whole["tie_word_embeddings"]),
    }


class QwenNames(NamedTuple):
    """How a family's files name the parts.

    Attributes:
      tower: prefix of the tower.
      decoder: prefix of the decoder.
      mlp: layers of each of the MLP's sites.
      merger: norm and two layers of a merger.
    """

    tower: str
    decoder: str
    mlp: tuple[tuple[str, ...], tuple[str, ...]]
    merger: tuple[str, str, str]


class QwenVL(VisionLanguageModel):
    """The model; a family gives ``names``, ``spelling`` and ``from_hf``."""

    config: QwenConfig
    names: ClassVar[QwenNames]
    split_videos: ClassVar[bool] = False  # each frame has placeholders of its own, behind its time as text

    def setup(self) -> None:
        """Create the parts; their names are the parameter tree's."""
        c = self.config
        self.vision = QwenVisionTower(c.vision)
        self.projector = Projector(c.vision)
        self.decoder = Decoder(c.text, c.tied)

    @nn.nowrap
    def table(self) -> dict[str, Source]:
        """Return the source of every leaf, by its path."""
        c, t, n = self.config.vision, Table(), self.names
        width, p, norm_bias = c.hidden_size, c.patch_size, not c.gated
        patch = f"{n.tower}.patch_embed.proj"
        t.patch("vision/patch", f"{patch}.weight", (width, c.num_channels, c.temporal_patch_size, p, p))
        if c.num_positions is not None:
            t.plain("vision/patch_bias", f"{patch}.bias", (width,))
            t.plain("vision/position", f"{n.tower}.pos_embed.weight", (c.num_positions, width))
        for i in range(c.num_layers):
            to, source = f"vision/blocks_{i}", f"{n.tower}.blocks.{i}"
            t.norm(f"{to}/norm_attn", f"{source}.norm1", width, norm_bias)
            t.linear(f"{to}/qkv", [f"{source}.attn.qkv"], width, [3 * width], True)
            t.linear(f"{to}/o", [f"{source}.attn.proj"], width, [width], True)
            t.norm(f"{to}/norm_mlp", f"{source}.norm2", width, norm_bias)
            for (site, (inputs, outputs)), layers in zip(c.mlp.items(), n.mlp, strict=True):
                t.linear(f"{to}/{site}", [f"{source}.mlp.{layer}" for layer in layers], inputs, outputs, True)
        norm, fc1, fc2 = n.merger
        whole = c.unit * width
        for to, source, inputs in (
            ("projector/merger", f"{n.tower}.merger", width),
            *((f"projector/deepstack_{j}", f"{n.tower}.deepstack_merger_list.{j}", whole) for j in range(len(c.deepstack))),
        ):
            t.norm(f"{to}/norm", f"{source}.{norm}", inputs, norm_bias)
            t.linear(f"{to}/fc1", [f"{source}.{fc1}"], whole, [whole], True)
            t.linear(f"{to}/fc2", [f"{source}.{fc2}"], whole, [c.out_size], True)
        t.decoder(self.config.text, self.config.tied, n.decoder)
        return t.sources

    @nn.nowrap
    def check(self, batch: Mapping[str, Any]) -> None:
        """Check a batch of host arrays; see `prepare`."""
        self.prepare(batch)

    @nn.nowrap
    def prepare(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Check a batch as transformers' processor gives it, and return what the traced model takes.

        Args:
          batch: ``input_ids`` and, as there are, ``attention_mask``, ``segments`` (see `embed`), ``pixel_values`` (patches, C t p p)
            with ``image_grid_thw`` (images, 3), ``pixel_values_videos`` with ``video_grid_thw`` and ``second_per_grid_ts``,
            ``mm_token_type_ids`` (checked; they follow from the tokens), ``positions`` (samples, length, 3) in place of M-RoPE's.

        Raises:
          InputError: what `VisionLanguageModel.check` refuses; an array that is not known; pixel values that are not finite, of another
            size or without their grids; placeholders that are padding or that the grids do not count; token types that differ.
        """
        super().check(batch)
        given = {name: np.asarray(value) for name, value in batch.items() if value is not None}
        if isinstance(seconds := batch.get("second_per_grid_ts"), list | tuple):
            given["second_per_grid_ts"] = np.asarray(seconds, np.float32)  # as torch makes them
        if unknown := sorted(given.keys() - INPUTS):
            raise InputError(f"{unknown[0]}: not known; expected {', '.join(sorted(INPUTS))}")
        c, ids = self.config, given["input_ids"]
        valid = given["attention_mask"].astype(bool) if "attention_mask" in given else np.ones(ids.shape, bool)
        found = {name: visuals for name in MODALITIES if (visuals := self._visuals(name, given, ids)) is not None}
        kinds = (ids == c.image_token_id) + 2 * (ids == c.video_token_id)
        if (kinds[~valid] > 0).any():
            raise InputError("attention_mask: image or video placeholders are marked as padding")
        types = given.get("mm_token_type_ids", kinds)
        if types.shape != kinds.shape or (types != kinds)[valid].any():
            raise InputError("mm_token_type_ids: differ from the placeholders; expected 1 for images, 2 for videos, 0 for the rest")
        out = {name: given[name] for name in TOKENS if name in given}
        if "positions" not in out:
            out["positions"] = mrope_positions([*found.values()], valid, given.get("segments"))
        elif found and out["positions"].shape != (*ids.shape, 3):
            raise InputError(f"positions: shape {out['positions'].shape}; with pictures (samples, length, 3), or leave them out")
        if found:
            pixels, grids = ([given[MODALITIES[name][i]] for name in found] for i in (0, 1))
            out |= arrange(c.vision, np.concatenate(pixels), np.concatenate(grids))
            order = out["order"][np.argsort(np.concatenate([v.slots for v in found.values()]))]  # by placeholder
            out["order"] = np.pad(order, (0, roomy(order.size) - order.size))
        return out

    @nn.nowrap
    def _visuals(self, name: str, given: Mapping[str, np.ndarray], ids: Int[np.ndarray, "B L"]) -> Visuals | None:
        """Check one modality; None where the batch has none."""
        c, v, (pixel_name, grid_name) = self.config, self.config.vision, MODALITIES[name]
        slots = np.flatnonzero(ids == (c.image_token_id if name == "image" else c.video_token_id))
        pixels, grids = given.get(pixel_name), given.get(grid_name)
        if (pixels is None) != (grids is None):
            raise InputError(f"{pixel_name} and {grid_name}: one is missing; the image processor gives both")
        if pixels is None or grids is None:
            pixels, grids = np.zeros((0, v.patch_inputs), np.float32), np.zeros((0, 3), np.int64)
        check_pixels(pixels, ("patches", v.patch_inputs), pixel_name)
        if grids.ndim != 2 or grids.shape[1] != 3 or not np.issubdtype(grids.dtype, np.integer):
            raise InputError(f"{grid_name}: {grids.dtype}{list(grids.shape)}; expected integers (pictures, 3)")
        if (grids < 1).any() or (grids[:, 1:] % v.merge_size).any():
            raise InputError(f"{grid_name}: {grids.tolist()}; expected frames, and rows and columns in multiples of {v.merge_size}")
        counts = np.prod(grids.astype(np.int64), axis=1)
        if counts.sum() != len(pixels):
            raise InputError(f"{grid_name}: {counts.sum()} patches in all; {pixel_name} has {len(pixels)}")
        if counts.sum() != slots.size * v.unit:
            raise InputError(f"input_ids: {slots.size} {name} placeholders; {grid_name} makes {counts.sum() // v.unit} features")
        if not slots.size:
            return None
        units = grids // np.array([1, v.merge_size, v.merge_size])
        if name == "video" and self.split_videos:
            units = np.repeat(units, units[:, 0], axis=0)
            units[:, 0] = 1
        intervals = np.ones(len(units))
        if name == "video" and c.tokens_per_second is not None:
            seconds = given.get("second_per_grid_ts", intervals)
            if seconds.shape != intervals.shape or not np.isfinite(seconds).all() or (seconds <= 0).any():
                raise InputError(f"second_per_grid_ts: {seconds.tolist()}; expected {len(units)} positive numbers")
            intervals = c.tokens_per_second * seconds
        return Visuals(name, slots, units, intervals)

    def features(self, order: Int[Array, " M"], **patches: Array) -> list[Float[Array, "M D"]]:
        """Return the features in the order of the placeholders, and those that deepstack adds later; see `arrange`."""
        return [rows[order] for rows in self.projector(self.vision(**patches))]


class Projector(nn.Module):
    """The mergers: of the tower's output and of each deepstack block's."""

    config: QwenVisionConfig

    @nn.compact
    def __call__(self, states: list[Float[Array, "F T V"]]) -> list[Float[Array, "M D"]]:
        """Return the features of each state."""
        c = self.config
        out = [QwenMerger(c, name="merger")(states[0])]
        # the states come in the order of their blocks, the mergers in that of config.json
        for block, state in zip(sorted(c.deepstack), states[1:], strict=True):
            out.append(QwenMerger(c, True, name=f"deepstack_{c.deepstack.index(block)}")(state))
        return out

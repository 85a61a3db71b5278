"""LLaVA-OneVision (arXiv 2408.03326), as Hugging Face's ``LlavaOnevisionForConditionalGeneration``: a LLaVA with any-resolution tiles.

An image that is alone in its sample comes as a view of the whole and a grid of tiles; images of a sample with several are one tile
each; a video is its frames (see `splitq_jax.models.tiles`).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from splitq_jax.errors import InputError
from splitq_jax.models.families import normalized
from splitq_jax.models.layers import LARGEST
from splitq_jax.models.llava import LlavaBase, LlavaConfig
from splitq_jax.models.model import VisionLanguageModel, check_pixels
from splitq_jax.models.names import Source
from splitq_jax.models.tiles import Taps, best_resolution, image_taps, single_taps, video_taps

MAX_FEATURES = 1 << 20  # of an image, before it is shrunk


@dataclass(frozen=True)
class LlavaOnevisionConfig(LlavaConfig):
    """A LLaVA-OneVision's ``config.json``.

    Attributes:
      video_token_id: the placeholder of videos.
      resolutions: the heights and widths that an image may be fitted into.
      max_tiles: N of ``anyres_max_N``: an image of more features than so many tiles have is shrunk.
    """

    video_token_id: int
    resolutions: tuple[tuple[int, int], ...]
    max_tiles: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.video_token_id < LARGEST or self.video_token_id == self.image_token_id:
            raise InputError(f"config.json: video_token_id {self.video_token_id}; expected 0 to {LARGEST - 1}, not the image's")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "LlavaOnevisionConfig":
        """Read ``config.json``.

        Raises:
          InputError: parts that are not supported.
        """
        config = normalized(config)
        ratio, resolutions = config["vision_aspect_ratio"], config["image_grid_pinpoints"]
        tiles = re.fullmatch(r"anyres_max_([1-9]\d{0,5})", ratio)
        if tiles is None:
            raise InputError(f"config.json: vision_aspect_ratio {ratio!r}; supported is anyres_max_N")
        if not resolutions or not all(
            isinstance(pair, list | tuple) and len(pair) == 2 and all(type(n) is int and 0 < n < LARGEST for n in pair)
            for pair in resolutions
        ):
            raise InputError(f"config.json: image_grid_pinpoints {str(resolutions)[:80]}; expected pairs of heights and widths")
        return cls(
            **cls.fields(config),
            video_token_id=config["video_token_index"],
            resolutions=tuple((height, width) for height, width in resolutions),
            max_tiles=int(tiles[1]),
        )

    @property
    def placeholders(self) -> tuple[int, ...]:
        """Tokens that image and video features replace."""
        return self.image_token_id, self.video_token_id

    @property
    def side(self) -> int:
        """Features along a tile's side."""
        return self.vision.image_size // self.vision.patch_size

    def check_square(self) -> None:
        """Check that tiles and frames can be put together.

        Raises:
          InputError: a tile's features are no square.
        """
        if self.tokens_per_image != self.side**2:
            raise InputError(
                f"config.json: vision_feature_select_strategy {self.vision_feature_select_strategy!r} leaves {self.tokens_per_image} "
                f"features of a tile; tiles and frames need {self.side} x {self.side}"
            )

    def image(self, height: int, width: int, alone: bool = True) -> tuple[Taps, int]:
        """Return the placeholders of an image, and its number of tiles.

        Args:
          height: in pixels, before it is fitted.
          width: likewise.
          alone: there is no other image in the sample.

        Raises:
          InputError: features that are no square, or a resolution that is no multiple of a tile; an image that is too long.
        """
        if not alone:
            return single_taps(self.tokens_per_image), 1
        self.check_square()
        fitted, size = best_resolution(height, width, self.resolutions), self.vision.image_size
        if fitted[0] % size or fitted[1] % size:
            raise InputError(f"config.json: image_grid_pinpoints {list(fitted)}: no multiple of the vision tower's {size} pixels")
        tiles = fitted[0] // size, fitted[1] // size
        if (count := (1 + math.prod(tiles)) * self.side**2) > MAX_FEATURES:
            raise InputError(
                f"config.json: image_grid_pinpoints {list(fitted)} make {count} features of an image; {MAX_FEATURES} are supported"
            )
        return image_taps(height, width, tiles, self.side, self.max_tiles), 1 + math.prod(tiles)

    def video(self, frames: int) -> tuple[Taps, int]:
        """Return the placeholders of a video, and its number of frames.

        Raises:
          InputError: features that are no square.
        """
        self.check_square()
        return video_taps(frames, self.side), frames


class LlavaOnevision(LlavaBase):
    """The model; apply it to a float or a quantized parameter tree, and to batches that `prepare` made."""

    config: LlavaOnevisionConfig

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "LlavaOnevision":
        """Return the model of a ``config.json``; see `LlavaOnevisionConfig.from_hf`."""
        return cls(LlavaOnevisionConfig.from_hf(config))

    def setup(self) -> None:
        """Create the parts; their names are the parameter tree's."""
        super().setup()
        self.newline = self.param("newline", nn.initializers.normal(0.02), (self.config.text.hidden_size,))

    @nn.nowrap
    def table(self) -> dict[str, Source]:
        """Return the source of every leaf, by its path."""
        return super().table() | {"newline": Source(("image_newline",), ((self.config.text.hidden_size,),), "plain")}

    @nn.nowrap
    def check(self, batch: Mapping[str, Any]) -> None:
        """Check a batch of host arrays; see `prepare`."""
        self.prepare(batch)

    @nn.nowrap
    def prepare(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Check a batch as the processor gives it and lay out its tiles.

        Args:
          batch: tokens, and ``pixel_values`` (images, tiles, C, H, W), padded, or (all tiles, C, H, W), with ``image_sizes`` (heights
            and widths before they were fitted) and ``batch_num_images`` (of each sample that has any; None: every image is alone in
            its sample); ``pixel_values_videos`` (videos, frames, C, H, W).

        Returns:
          Tokens; ``pixel_values``: tiles and frames without padding; ``rows`` and ``weights``: see `Taps`.

        Raises:
          InputError: what `VisionLanguageModel.check` refuses; arrays that do not fit one another; pixel values that are not finite or
            of another size; other numbers of placeholders than of features; a picture whose placeholders are not all in one sample.
        """
        VisionLanguageModel.check(self, batch)
        given = {name: np.asarray(value) for name, value in batch.items() if value is not None}
        images, videos = (given.pop(name, np.zeros(0)) for name in ("pixel_values", "pixel_values_videos"))
        sizes, groups = given.pop("image_sizes", np.zeros((0, 2), np.int64)), given.pop("batch_num_images", None)
        given.pop("image_sizes_videos", None)  # frames are all fitted alike
        tiles, image_parts = self._images(images, sizes, groups)
        frames, video_parts = self._videos(videos)
        places = [
            _places(given["input_ids"] == token, [len(part) for part, _ in parts], what)
            for token, parts, what in zip(self.config.placeholders, (image_parts, video_parts), ("image", "video"), strict=True)
        ]
        taps, first = [], 0
        for part, count in [*image_parts, *video_parts]:
            taps.append(part.shifted(first * self.config.tokens_per_image))
            first += count
        if not taps:
            return given
        order = np.argsort(np.concatenate(places))  # images and videos, as they come in the samples
        rows, weights = (getattr(Taps.joined(taps), name)[order] for name in ("rows", "weights"))
        pixels = np.concatenate([part for part in (tiles, frames) if part.size])
        return given | {"pixel_values": pixels, "rows": rows.astype(np.int32), "weights": weights}

    @nn.nowrap
    def _images(
        self, pixels: Float[np.ndarray, "..."], sizes: Int[np.ndarray, "N 2"], groups: Int[np.ndarray, " S"] | None
    ) -> tuple[Float[np.ndarray, "T C H W"], list[tuple[Taps, int]]]:
        """Return the tiles of all images without padding, and each image's placeholders and number of tiles."""
        if not pixels.size:
            return pixels, []
        self._check_pixels(pixels, ("images", "tiles") if pixels.ndim == 5 else ("tiles",), "pixel_values")
        groups = np.ones(len(sizes), np.int64) if groups is None else groups.reshape(-1)
        if (
            not all(np.issubdtype(a.dtype, np.integer) for a in (sizes, groups))
            or sizes.shape != (groups.sum(), 2)
            or (sizes < 1).any()
        ):
            raise InputError(
                f"image_sizes: {sizes.tolist()[:8]} with batch_num_images {groups.tolist()[:8]}; expected a height and a width an image"
            )
        alone = np.repeat(groups == 1, np.maximum(groups, 0))
        parts = [self.config.image(height, width, bool(one)) for (height, width), one in zip(sizes.tolist(), alone, strict=True)]
        counts = [count for _, count in parts]
        if pixels.ndim == 5 and len(pixels) == len(parts) and pixels.shape[1] >= max(counts):
            pixels = np.concatenate([image[:count] for image, count in zip(pixels, counts, strict=True)])
        if pixels.ndim == 5 or len(pixels) != sum(counts):
            raise InputError(f"pixel_values: shape {pixels.shape}; by image_sizes the images have {counts[:8]} tiles")
        return pixels, parts

    @nn.nowrap
    def _videos(self, pixels: Float[np.ndarray, "..."]) -> tuple[Float[np.ndarray, "T C H W"], list[tuple[Taps, int]]]:
        """Return the frames of all videos, and each video's placeholders and number of frames."""
        if not pixels.size:
            return pixels, []
        self._check_pixels(pixels, ("videos", "frames"), "pixel_values_videos")
        return pixels.reshape(-1, *pixels.shape[2:]), [self.config.video(pixels.shape[1])] * len(pixels)

    @nn.nowrap
    def _check_pixels(self, pixels: Float[np.ndarray, "..."], counts: tuple[str, ...], what: str) -> None:
        vision = self.config.vision
        check_pixels(pixels, (*counts, vision.num_channels, vision.image_size, vision.image_size), what)

    def features(
        self, pixel_values: Float[Array, "T C H W"], rows: Int[Array, "M 4"], weights: Float[Array, "M 4"]
    ) -> list[Float[Array, "M D"]]:
        """Return the features of the placeholders, given what `prepare` made of the pictures."""
        tiles = self.project(pixel_values)
        tiles = jnp.concatenate([tiles, self.newline.astype(tiles.dtype)[None]])
        taps = [tiles[rows[:, i]].astype(jnp.float32) * weights[:, i : i + 1] for i in range(4)]
        return [sum(taps[1:], taps[0]).astype(tiles.dtype)]


def _places(is_placeholder: Bool[np.ndarray, "B L"], wanted: list[int], what: str) -> Int[np.ndarray, " M"]:
    """Return where the placeholders are.

    Raises:
      InputError: other numbers than the pictures take; a picture whose placeholders are not all in one sample.
    """
    placed, ends = is_placeholder.sum(axis=1), np.cumsum([0, *wanted])
    if placed.sum() != ends[-1] or not np.isin(np.cumsum(placed), ends).all():
        raise InputError(
            f"input_ids: {', '.join(map(str, placed[:8]))} {what} placeholders a sample; "
            f"the {what}s take {', '.join(map(str, wanted[:8])) or 'none'}"
        )
    return np.flatnonzero(is_placeholder)

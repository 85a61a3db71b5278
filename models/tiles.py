r"""Where the features of any-resolution tiles and of video frames go (arXiv 2408.03326), worked out on the host.

    whole view        tiles of the grid             placeholders
    [a b]             [d e | f g]                   a b a' b' | d e f g \n | d' e' f' g' \n
    [a' b']           [d' e' | f' g']

The features of the grid's tiles are put together, freed of the padding, shrunk where there are too many, and every line ends with a
learned newline. Every placeholder's feature is a weighted sum of four rows of [all tiles' features; newline], so that the traced model
sees arrays of one shape, whatever the pictures are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from splitq_jax.errors import InputError

NEWLINE = -1  # the last row of [all tiles' features; newline]
SHRINK = 1.1  # how far a picture's sides may exceed what ``anyres_max_N`` allows before it is shrunk


@dataclass(frozen=True)
class Taps:
    """Which rows of [all tiles' features; newline] make up each placeholder's feature.

    Attributes:
      rows: four of them.
      weights: of each.
    """

    rows: Int[np.ndarray, "*M 4"]
    weights: Float[np.ndarray, "*M 4"]

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, rows: Int[np.ndarray, "*M"]) -> "Taps":
        """Take rows as they are."""
        first = np.array([1, 0, 0, 0], np.float32)
        return cls(np.repeat(rows[..., None], 4, axis=-1), np.broadcast_to(first, (*rows.shape, 4)))

    @classmethod
    def resized(cls, rows: Int[np.ndarray, "H W"], height: int, width: int) -> "Taps":
        """Interpolate a grid of rows bilinearly: each new place reads its four neighbours (torch's ``align_corners=False``)."""
        sides = []
        for old, new in zip(rows.shape, (height, width), strict=True):
            scale = float(np.float32(old / max(new, 1)))  # rounded where torch rounds
            place = np.maximum((scale * (np.arange(new) + 0.5) - 0.5).astype(np.float32), 0)
            below = np.minimum(place.astype(np.int64), old - 1)
            share = place - below
            sides.append((np.stack([below, np.minimum(below + 1, old - 1)]), np.stack([1 - share, share])))
        (y, share_y), (x, share_x) = sides
        taken = rows[y[:, None, :, None], x[None, :, None, :]]  # 2 2 H W
        weights = share_y[:, None, :, None] * share_x[None, :, None, :]
        return cls(*(np.moveaxis(a.reshape(4, height, width), 0, -1) for a in (taken, weights.astype(np.float32))))

    @classmethod
    def joined(cls, parts: "Sequence[Taps]") -> "Taps":
        """Put placeholders behind each other."""
        return cls(*(np.concatenate([getattr(p, name).reshape(-1, 4) for p in parts]) for name in ("rows", "weights")))

    def shifted(self, first: int) -> "Taps":
        """Count the rows from another one; the newline stays where it is."""
        return Taps(np.where(self.rows == NEWLINE, NEWLINE, self.rows + first), self.weights)


def best_resolution(height: int, width: int, resolutions: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the (height, width) that keeps most of an image's pixels and, of those, wastes fewest; of equals the first."""

    def kept(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, pixels - resolution[0] * resolution[1]

    return max(resolutions, key=kept)


def image_taps(height: int, width: int, tiles: tuple[int, int], side: int, max_tiles: int) -> Taps:
    """Return the placeholders of an image that is cut into tiles; its rows are counted from its first tile's.

    Args:
      height: of the image, in pixels, before it was fitted.
      width: likewise.
      tiles: of its grid, one above the other and side by side; before them comes a view of the whole.
      side: features along a tile's side.
      max_tiles: an image of more features than so many tiles have is shrunk.

    Raises:
      InputError: an image so long that nothing of it is left.
    """
    down, across = tiles
    rows = side**2 * (1 + np.arange(down * across)).reshape(down, 1, across, 1) + np.arange(side**2).reshape(1, side, 1, side)
    rows = rows.reshape(down * side, across * side)
    if width / height > rows.shape[1] / rows.shape[0]:  # padded above and below, else left and right
        padding = (rows.shape[0] - int(round(height * (rows.shape[1] / width), 7))) // 2
        rows = rows[padding : rows.shape[0] - padding]
    else:
        padding = (rows.shape[1] - int(round(width * (rows.shape[0] / height), 7))) // 2
        rows = rows[:, padding : rows.shape[1] - padding]
    excess = math.sqrt(rows.size / (max_tiles * side**2))
    new_height, new_width = (int(n // excess) for n in rows.shape) if excess > SHRINK else rows.shape
    if rows.size and not new_height * new_width:
        raise InputError(f"image_sizes: an image of {height} x {width} pixels is too long; nothing is left of it")
    grid = Taps.resized(rows, new_height, new_width)
    newlines = Taps.of(np.full((new_height, 1), NEWLINE))
    lines = Taps(np.concatenate([grid.rows, newlines.rows], axis=1), np.concatenate([grid.weights, newlines.weights], axis=1))
    return Taps.joined([Taps.of(np.arange(side**2)), lines])


def single_taps(features: int) -> Taps:
    """Return the placeholders of an image that is one tile, and a newline."""
    return Taps.of(np.array([*range(features), NEWLINE]))


def video_taps(frames: int, side: int) -> Taps:
    """Return the placeholders of a video: its frames, their sides halved, and a newline; rows are counted from its first frame's."""
    half = math.ceil(side / 2)
    grids = np.arange(frames * side**2).reshape(frames, side, side)
    return Taps.joined([*(Taps.resized(grid, half, half) for grid in grids), Taps.of(np.array([NEWLINE]))])

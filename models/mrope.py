"""Multimodal rotary positions (M-RoPE, arXiv 2409.12191): each token's place in time, height and width, counted on the host.

tokens      a  b | image, 1 x 2 x 3 features |  c  d
time        0  1 | 2  2  2  2  2  2          |  5  6
height      0  1 | 2  2  2  3  3  3          |  5  6      the text goes on after the longer side
width       0  1 | 2  3  4  2  3  4          |  5  6
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from splitq_jax.errors import InputError


@dataclass(frozen=True)
class Visuals:
    """The images, the videos or the single frames of a batch, one after another.

    Attributes:
      name: what an error calls one.
      slots: the placeholders among the batch's tokens, counted row after row.
      grids: features of each along time, height and width; together they are as many as the slots.
      intervals: temporal positions from a frame of each to its next.
    """

    name: str
    slots: Int[np.ndarray, " M"]
    grids: Int[np.ndarray, "N 3"]
    intervals: Float[np.ndarray, " N"]


def mrope_positions(
    visuals: Sequence[Visuals], valid: Bool[np.ndarray, "B L"], segments: Int[np.ndarray, "B L"] | None = None
) -> Int[np.ndarray, "B L 3"]:
    """Return the positions of every token, 0 for padding.

    Args:
      visuals: what the placeholders stand for.
      valid: tokens that are not padding.
      segments: 0 for a shared prefix, s >= 1 for independent continuations of it, each of which goes on where the prefix ends.

    Raises:
      InputError: placeholders of one picture that do not stand together.
    """
    groups = np.zeros(valid.shape, np.int64) if segments is None else segments
    offset = np.zeros((valid.size, 3), np.int64)  # from where the picture starts
    advance = valid.reshape(-1).astype(np.int64)  # from a token to what comes after it
    row = np.stack([np.indices(valid.shape)[0].reshape(-1), groups.reshape(-1)], axis=-1)
    for v in visuals:
        ends = np.cumsum(np.prod(v.grids, axis=1))
        for i, ((t, h, w), interval, end) in enumerate(zip(v.grids, v.intervals, ends, strict=True)):
            slots = v.slots[end - t * h * w : end]
            if slots[-1] - slots[0] + 1 != slots.size or (row[slots] != row[slots[0]]).any():
                raise InputError(
                    f"input_ids: the {slots.size} placeholders of {v.name} {i} do not stand together in one sample; "
                    "other tokens lie between them, or the grids are in another order"
                )
            time = (np.arange(t).astype(interval.dtype) * interval).astype(np.int64)
            offset[slots] = np.stack(np.meshgrid(time, np.arange(h), np.arange(w), indexing="ij"), axis=-1).reshape(-1, 3)
            advance[slots] = 0
            advance[slots[-1]] = max(h, w)
    steps, start = advance.reshape(valid.shape), np.zeros(valid.shape, np.int64)
    for s in np.unique(groups):
        seen = np.where((groups == 0) | (groups == s), steps, 0)
        start = np.where(groups == s, np.cumsum(seen, axis=1) - seen, start)
    positions = start[..., None] + offset.reshape(*valid.shape, 3)
    return np.where(valid[..., None], positions, 0).astype(np.int32)

"""What the Mosaic GPU kernel of `splitq_jax.kernels.gpu_matmul` works on: operands, tiles, shared memory, a thread block's share."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

STEP = 128  # input channels in a slot of the ring
SIDE_STEP = 64  # and of the narrow operand: its segments are multiples of this
ROWS = 64  # of an accumulator; what leaves the registers does so in pieces of as many rows
SHARED_BYTES = 227 * 1024  # of a processor


class Operands(NamedTuple):
    """What the kernel reads.

    Attributes:
      x: int8 codes or bfloat16 tokens.
      planes: the weight's words, in the order of ``x``'s type, in steps of `STEP`.
      scale: float32, per output channel (G = 1), or per group of input channels.
      token_scale: float32, or None for 1.
      side: the narrow operand, bfloat16, or None.
      side_words: what it is multiplied by, 4-bit codes in the order of bfloat16 and steps of `SIDE_STEP`, one segment of ``side`` after the other.
      side_scale: float32, per output channel, of the first segments; the others have none.
      bias: or None.
    """

    x: Array
    planes: tuple[Int[Array, "S N _"], ...]
    scale: Float[Array, "G N"]
    token_scale: Float[Array, " M"] | None
    side: Float[Array, "M R"] | None
    side_words: tuple[Int[Array, "S N _"], ...]
    side_scale: tuple[Float[Array, "1 N"], ...]
    bias: Float[Array, " N"] | None


@dataclass(frozen=True)
class Tile:
    """How a product is cut.

    Attributes:
      tokens: of a thread block.
      rows: output channels of a warpgroup, 64 or 128.
      across: warpgroups along the output channels; no more than 2 where ``along`` is 1: they would wait for registers for ever.
      along: warpgroups that deal a tile's input channels among them.
      splits: thread blocks that do.
    """

    tokens: int
    rows: int
    across: int
    along: int
    splits: int

    @property
    def channels(self) -> int:
        """Output channels of a thread block."""
        return self.rows * self.across

    @property
    def chunk(self) -> int:
        """Tokens that leave the registers together."""
        return min(32, self.tokens)


class Memory(NamedTuple):
    """Shared memory of a thread block: the ring, the narrow operand's ring, what leaves, partial sums, and their barriers."""

    x: Any
    planes: tuple[Any, ...]
    full: Any
    empty: Any
    out: Any
    scale: Any = None
    side: Any = None
    words: Any = None
    side_full: Any = None
    side_empty: Any = None
    sums: Any = None
    summed: Any = None


@dataclass(frozen=True)
class Work:
    """A thread block's share.

    Attributes:
      bits, tile: as in `Tile` and `kernel`.
      group: input channels that share a scale, None where each output channel has one scale.
      slots, side_slots: of the rings; multiples of ``tile.along``, so that a slot always meets the same warpgroups.
      token, channel, split: where the tile begins, and which part of the input channels it multiplies.
      first, steps: that part, in steps.
      side: how many steps each segment has.
      registers: the module that works on registers: `hopper`, or `hopper_interpreted` off the hardware.
    """

    bits: int
    tile: Tile
    group: int | None
    slots: int
    side_slots: int
    token: Any
    channel: Any
    split: Any
    first: Any
    steps: Any
    side: tuple[int, ...]
    registers: Any

    def side_steps(self, count: int) -> Any:
        """Return ``count`` in the first split, which alone multiplies the narrow operand, else 0."""
        return count if self.tile.splits == 1 else jnp.where(self.split == 0, count, 0)

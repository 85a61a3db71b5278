"""What the TPU kernel for many tokens knows and keeps: a plan for every site, by rule from its shapes and from the chip's memory."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, DTypeLike, Float

from splitq_jax.kernels import tiles
from splitq_jax.kernels.operands import side_width
from splitq_jax.kernels.tiles import LANES, up

if TYPE_CHECKING:
    from splitq_jax.linear import SplitWeight
else:
    SplitWeight = Any

ROWS = 8  # of a tile
MXU = 256  # rows of what it holds
FEW = LANES // 2  # tokens that leave half of the lanes empty


class Narrow(NamedTuple):
    """One side group: its channels, where its columns of ``side`` begin, and the bits of its codes."""

    size: int
    at: int
    bits: int


@dataclass(frozen=True)
class Plan:
    """What the kernel knows.

    Attributes:
      tokens: of a step, a multiple of the lanes of a tile.
      lanes: of a token, in whole tiles.
      channels: of the main group.
      padded: columns of its codes.
      bits: of its codes.
      n1: segments.
      n2: channels of a segment.
      mixes: whether there is a P1; without it the last segment may be shorter.
      together: segments of one product.
      window: channels of a token that such a product reads.
      sides: the side groups.
      side_start: the first channel that may be one of theirs.
      rank: columns of U, 0 without branches.
      u_bits: of U's codes.
      residual_bits: of MAC's residual.
      at: where U's columns of ``side`` begin.
    """

    tokens: int
    lanes: int
    channels: int
    padded: int
    bits: int
    n1: int
    n2: int
    mixes: bool
    together: int
    window: int
    sides: tuple[Narrow, ...]
    side_start: int
    rank: int
    u_bits: int
    residual_bits: int
    at: int

    @property
    def products(self) -> int:
        """Products that pick all segments."""
        return -(-self.n1 // self.together)

    @property
    def picked_rows(self) -> int:
        """Rows of one of them, each segment in whole tiles."""
        return self.together * up(self.n2, ROWS)

    @property
    def rows(self) -> int:
        """Rows of all transformed channels, and of what padding their last tile may spill."""
        return up(max(self.channels, 0 if self.mixes else self.products * self.picked_rows), LANES) + ROWS


def plan_of(x: Float[Array, "M D"], w: SplitWeight, interpret: bool) -> Plan | None:
    """Return the plan, None where XLA has to transform.

    That is for few tokens, for float32 or where the user asks for products in float32, for dense transforms of many channels, and where
    VMEM does not hold it all.
    """
    main, t, b = w.groups[0], w.groups[0].transform, w.branches
    asked: str | None = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    exact = asked not in {None, "default", "bfloat16", "fastest"} and not interpret
    if x.shape[0] <= FEW or x.dtype != jnp.bfloat16 or exact:
        return None
    channels, width = main.w.rows, x.shape[1]
    n2 = LANES if t.p2 is None else t.p2.shape[0]
    if t.p1 is None and n2 > MXU:
        return None
    n1, picks, lanes = -(-channels // n2), w.perm is not None, up(width, LANES)

    def window(together: int) -> int:
        # the channels are ascending; a product of whole tiles begins where one does
        reach = together * n2 + (width - channels if picks else 0) + (0 if together * n2 % LANES == 0 else LANES - 1)
        return min(up(reach, LANES), lanes)

    def cost(together: int) -> int:
        # few rows take as long as it takes to load the MXU
        return -(-n1 // together) * -(-window(together) // MXU) * max(together * up(n2, ROWS), LANES)

    together = min(range(1, max(1, min(MXU // n2, n1)) + 1), key=cost)
    sides, at = [], 0
    for g in w.groups[1:]:
        sides.append(Narrow(g.w.rows, at, g.a_bits))
        at += g.w.padded_rows
    for tokens in (2 * LANES, LANES) if x.shape[0] > LANES else (LANES,):
        plan = Plan(
            tokens=tokens,
            lanes=lanes,
            channels=channels,
            padded=main.w.padded_rows,
            bits=main.a_bits,
            n1=n1,
            n2=n2,
            mixes=t.p1 is not None,
            together=together,
            window=window(together),
            sides=tuple(sides),
            side_start=0 if picks else channels // LANES * LANES,
            rank=0 if b is None else b.rank,
            u_bits=0 if b is None else b.u.bits,
            residual_bits=w.residual_bits,
            at=at,
        )
        if _memory(plan, side_width(w)) <= tiles.chip().vmem:
            return plan
    return None


class Kept(NamedTuple):
    """What the kernel keeps in VMEM.

    Attributes:
      turned: tokens in lanes.
      picks: what picks and transforms some segments each.
      p1: ``P1^T (x) I_8``.
      u: U's codes, turned.
      segments: main channels after P2, a tile's lanes at a time; segments fill whole tiles.
      channels: main channels after P1, close by; then what their codes leave of them.
      codes: of the main channels, then of what they leave.
      narrow: the branches' share of ``side``, turned.
    """

    turned: Any
    picks: Any
    p1: Any
    u: Any
    segments: Any
    channels: Any
    codes: Any
    narrow: Any


def kept(plan: Plan, operand: DTypeLike) -> Kept:
    """Return what the kernel keeps, transforms as ``operand``."""
    halves, all_rows = plan.tokens // LANES, plan.rows - ROWS
    mixed = ROWS * (plan.n1 if plan.mixes else 1)
    segments = plan.products * plan.picked_rows if plan.mixes else ROWS
    rank = up(max(plan.rank, 1), 16)
    return Kept(
        turned=pltpu.VMEM((plan.lanes, plan.tokens), jnp.bfloat16),
        picks=pltpu.VMEM((plan.products, plan.picked_rows, plan.window), operand),
        p1=pltpu.VMEM((mixed, mixed), operand),
        u=pltpu.VMEM((rank, all_rows), jnp.bfloat16),
        segments=pltpu.VMEM((halves, segments, LANES), jnp.float32),
        channels=pltpu.VMEM((halves, plan.rows, LANES), jnp.float32),
        codes=pltpu.VMEM((all_rows if plan.rank else 16, plan.tokens), jnp.bfloat16),
        narrow=pltpu.VMEM((rank, plan.tokens), jnp.float32),
    )


def _memory(plan: Plan, width: int) -> int:
    """Return bytes of VMEM: what is kept, and a step's operands twice, one in use, one on its way."""
    held = 0
    for array in kept(plan, jnp.bfloat16):
        *others, rows, columns = array.shape
        held += math.prod(others) * up(rows, ROWS) * up(columns, LANES) * jnp.dtype(array.dtype).itemsize
    moved = plan.tokens * (2 * plan.lanes + plan.padded + 2 * width + 4 * LANES)
    # the rest is the compiler's: products before they are stored
    return held + 2 * moved + 4 * plan.tokens * 4 * MXU + 8 * tiles.MIB

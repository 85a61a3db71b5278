"""Many tokens on TPU: one kernel picks their channels, transforms them and makes codes, steps and the narrow operand.

XLA picks lanes by turning all tokens around, and turns them again between a Kronecker product's factors; `tpu_prefill_kernel` does it in
VMEM. What it needs to know is planned here.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, DTypeLike, Float

from splitq_jax.kernels import tiles
from splitq_jax.kernels.operands import Activations, gate_scales, mac_mask, side_width
from splitq_jax.kernels.tiles import LANES, up
from splitq_jax.kernels.tpu_prefill_kernel import ROWS, Given, Kept, Narrow, Plan, Side, run
from splitq_jax.kernels.tpu_words import stored_type
from splitq_jax.transforms import apply

if TYPE_CHECKING:
    from splitq_jax.linear import SplitWeight
else:
    SplitWeight = Any

MXU = 256  # rows of what it holds
FEW = LANES // 2  # tokens that leave half of the lanes empty


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
    for tokens in (2 * LANES, LANES):
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


def _kept(plan: Plan, operand: DTypeLike) -> Kept:
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
    kept = 0
    for array in _kept(plan, jnp.bfloat16):
        *others, rows, columns = array.shape
        size = up(rows, ROWS) * up(columns, LANES) * jnp.dtype(array.dtype).itemsize
        for n in others:
            size *= n
        kept += size
    moved = plan.tokens * (2 * plan.lanes + plan.padded + 2 * width + 4 * LANES)
    # the rest is the compiler's: products before they are stored
    return kept + 2 * moved + 4 * plan.tokens * 4 * MXU + 8 * tiles.MIB


def quantize_activations(
    plan: Plan, x: Float[Array, "M D"], w: SplitWeight, is_text: Bool[Array, " M"] | None, *, interpret: bool
) -> Activations:
    """See `api.quantize_activations`."""
    tokens, steps = x.shape[0], -(-x.shape[0] // plan.tokens)
    padded = steps * plan.tokens
    given = _given(plan, jnp.pad(x, ((0, padded - tokens), (0, plan.lanes - x.shape[1]))), w, is_text, tokens)
    specs = jax.tree.map(lambda a: pl.BlockSpec(a.shape, lambda i: (0,) * a.ndim), given)
    specs = specs._replace(
        x=pl.BlockSpec((plan.tokens, plan.lanes), lambda i: (i, 0)),
        mask=None if given.mask is None else pl.BlockSpec((1, plan.tokens), lambda i: (0, i)),
    )
    r = side_width(w)
    out = Activations(
        jax.ShapeDtypeStruct((padded, plan.padded), stored_type(plan.bits)),
        jax.ShapeDtypeStruct((padded, 1), jnp.float32),
        jax.ShapeDtypeStruct((padded, r), jnp.bfloat16) if r else None,
    )
    # transforms are multiplied as XLA would multiply them, who takes float32 as bfloat16 on TPU and as it is on CPU
    operand = jnp.float32 if interpret else jnp.bfloat16
    (a,) = pl.pallas_call(
        partial(run, plan, interpret),
        name="splitq_prefill",
        out_shape=[out],
        grid=(steps,),
        in_specs=[specs],
        out_specs=[jax.tree.map(lambda o: pl.BlockSpec((plan.tokens, o.shape[1]), lambda i: (i, 0)), out)],
        scratch_shapes=[_kept(plan, operand)],
        # in order: the first step makes what all use
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=tiles.chip().vmem),
        interpret=interpret,
    )(given)
    return Activations(*(None if o is None else o[:tokens] for o in a))


def _given(plan: Plan, x: Float[Array, "P L"], w: SplitWeight, is_text: Bool[Array, " M"] | None, tokens: int) -> Given:
    main, t, filled = w.groups[0], w.groups[0].transform, plan.products * plan.together * plan.n2
    perm = (jnp.arange(w.shape[0]) if w.perm is None else w.perm).astype(jnp.int32)

    def by_product(a: Array, fill: int) -> Array:
        return jnp.pad(a, (0, filled - plan.channels), constant_values=fill).reshape(plan.products, 1, -1)

    p2 = jnp.eye(plan.n2, dtype=jnp.float32) if t.p2 is None else t.p2
    p2 = jnp.pad(p2.T, ((0, up(plan.n2, ROWS) - plan.n2), (0, 0)))
    start, side_perm, sides = plan.channels, [], []
    for g in w.groups[1:]:
        k = g.w.rows
        extra = up(k, 16) - k
        side_perm.append(jnp.pad(perm[start : start + k], (0, extra), constant_values=-1)[:, None])
        dense = apply(g.transform, jnp.eye(k, dtype=jnp.float32))
        sides.append(Side(jnp.pad(dense.T, ((0, extra), (0, extra))), None if g.a_clip is None else g.a_clip[None, :]))
        start += k
    u = mask = None
    gates: list[Array | None] = [None, None]
    if w.branches is not None:
        u = w.branches.u
        rows = [None if scale is None else (u.scale * scale).T for scale in gate_scales(w.branches)]
        gates = [None if a is None else jnp.pad(a, ((0, up(plan.rank, 16) - plan.rank), (0, 0))) for a in rows]
    if gates[1] is not None:
        mask = jnp.pad(mac_mask(w, is_text, tokens).T, ((0, 0), (0, x.shape[0] - tokens)))
    return Given(
        x=x,
        mask=mask,
        perm=by_product(perm[: plan.channels], -1),
        d=by_product(jnp.ones((plan.channels,), jnp.float32) if t.d is None else t.d, 0),
        p2=jax.scipy.linalg.block_diag(*[p2] * plan.together),
        p1=None if t.p1 is None else t.p1.T,
        clip=None if main.a_clip is None else main.a_clip[None, :],
        side_perm=jnp.concatenate(side_perm) if side_perm else None,
        sides=tuple(sides),
        u=None if u is None else u.words[0],
        cws=gates[0],
        mac=gates[1],
    )

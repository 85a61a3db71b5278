"""Many tokens on TPU: one kernel picks their channels, transforms them and makes codes, steps and the narrow operand.

XLA picks lanes by turning all tokens around, and turns them again between a Kronecker product's factors; `tpu_prefill_kernel` does it in
VMEM. What it knows and keeps is in `tpu_prefill_plan`.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from splitq_jax.kernels import tiles
from splitq_jax.kernels.operands import Activations, as_matrix, gate_scales, mac_mask, side_width
from splitq_jax.kernels.tiles import up
from splitq_jax.kernels.tpu_prefill_kernel import Given, Side, run
from splitq_jax.kernels.tpu_prefill_plan import ROWS, Plan, kept
from splitq_jax.kernels.tpu_words import stored_type

if TYPE_CHECKING:
    from splitq_jax.linear import SplitWeight
else:
    SplitWeight = Any


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
        scratch_shapes=[kept(plan, operand)],
        compiler_params=tiles.compiler_params("arbitrary"),  # in order: the first step makes what all use
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
        sides.append(
            Side(jnp.pad(as_matrix(g.transform, k).T, ((0, extra), (0, extra))), None if g.a_clip is None else g.a_clip[None, :])
        )
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

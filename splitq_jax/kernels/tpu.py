"""The kernels' jobs on TPU, in Pallas: what is refused, what is made ready for the kernels, and the calls."""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, DTypeLike, Float

from splitq_jax.kernels import tiles, tpu_prefill, tpu_prefill_plan
from splitq_jax.kernels.operands import Activations, gate_scales, keeps_floats, reseat, segments, side_width, transformed, widen
from splitq_jax.kernels.tpu_matmul import Filler, Side, matmul
from splitq_jax.kernels.tpu_quantizer import body, fill, picked, plan_of
from splitq_jax.kernels.tpu_words import pad_rows, stored_type
from splitq_jax.numerics import FLOAT_BITS
from splitq_jax.packing import SLAB, TILE_ROWS, slab_rows
from splitq_jax.qtensor import QTensor, from_codes, pad_words

if TYPE_CHECKING:
    from splitq_jax.linear import SplitWeight
else:
    SplitWeight = Any


def refuses(job: str, w: SplitWeight | QTensor, tokens: int) -> str | None:
    """Return why a job is left to the reference, None where it is taken."""
    if tokens == 0:
        return "no tokens"
    if isinstance(w, QTensor):
        return _refuses_matrix(w)
    main, *side = (g.w for g in w.groups)
    narrow = [] if w.branches is None else [w.branches.u, w.branches.v]
    if reason := _refuses_matrix(main):
        return reason
    if any(m.bits not in {4, 8} for m in (*side, *narrow)):
        return "side groups or branches of other than 4 or 8 bits"
    if main.group != main.rows and not keeps_floats(w):
        return "codes of activations beside scales per group of rows"
    if keeps_floats(w) and w.branches is not None and w.branches.mac is not None:
        return "MAC with activations that stay floats"
    if keeps_floats(w) and any(g.a_bits < FLOAT_BITS for g in w.groups[1:]):
        return "codes of side groups beside activations that stay floats"
    return None


def _refuses_matrix(w: QTensor) -> str | None:
    if w.bits not in {3, 4}:
        return f"weights of {w.bits} bits"
    if w.elements:
        return "words laid out for another platform"
    if w.scale is not None and w.scale.shape[0] > 1 and w.group % 32:
        return f"groups of {w.group} rows"
    return None


def quantize_activations(
    x: Float[Array, "M D"], w: SplitWeight, is_text: Bool[Array, " M"] | None, *, interpret: bool
) -> Activations:
    """See `api.quantize_activations`; one kernel does it all, or XLA transforms and one kernel does the rest."""
    if keeps_floats(w):
        return _float_activations(x, w)
    given, w = w, _tiled_site(w)
    if whole := tpu_prefill_plan.plan_of(x, w, interpret):
        a = tpu_prefill.quantize_activations(whole, x, w, is_text, interpret=interpret)
    else:
        a = _quantized_after_xla(x, w, is_text, interpret)
    return Activations(a.values[:, : given.groups[0].w.padded_rows], a.scale, reseat(a.side, w, given))


def _quantized_after_xla(x: Float[Array, "M D"], w: SplitWeight, is_text: Bool[Array, " M"] | None, interpret: bool) -> Activations:
    main, r = w.groups[0].w, side_width(w)
    plan, by_token, others = plan_of(x, w, is_text)
    tokens = x.shape[0]
    rows = min(tiles.up(tokens, 32), 256)
    while rows > 32 and 16 * rows * w.shape[0] > tiles.chip().vmem:  # tokens twice, codes and what they leave
        rows //= 2
    padded = tiles.up(tokens, rows)
    by_token = [pad_rows(a, padded) for a in by_token]
    outs = [
        jax.ShapeDtypeStruct((padded, main.padded_rows), stored_type(w.groups[0].a_bits)),
        jax.ShapeDtypeStruct((padded, 1), jnp.float32),
        *([jax.ShapeDtypeStruct((padded, r), jnp.bfloat16)] if r else []),
    ]
    values, scale, *side = pl.pallas_call(
        partial(body, plan, interpret, len(by_token) + len(others)),
        name="splitq_quantize",
        out_shape=outs,
        grid=(padded // rows,),
        in_specs=[
            *(pl.BlockSpec((rows, a.shape[1]), lambda i: (i, 0)) for a in by_token),
            *(pl.BlockSpec(a.shape, lambda i: (0, 0)) for a in others),
        ],
        out_specs=[pl.BlockSpec((rows, o.shape[1]), lambda i: (i, 0)) for o in outs],
        compiler_params=tiles.compiler_params("parallel"),
        interpret=interpret,
    )(*by_token, *others)
    return Activations(values[:tokens], scale[:tokens], side[0][:tokens] if side else None)


def _float_activations(x: Float[Array, "M D"], w: SplitWeight) -> Activations:
    main, *others = transformed(picked(x, w), w)
    parts = [widen(x_j, g.w.padded_rows) for x_j, g in zip(others, w.groups[1:], strict=True)]
    if w.branches is not None:
        cws, _ = gate_scales(w.branches)
        parts.append(widen(main @ w.branches.u.decode() * cws, w.branches.v.padded_rows))
    side = jnp.concatenate(parts, axis=1).astype(jnp.bfloat16) if parts else None
    return Activations(widen(main, w.groups[0].w.padded_rows).astype(jnp.bfloat16), None, side)


def quantized_matmul(
    a: Activations, w: SplitWeight, bias: Float[Array, " N"] | None, *, dtype: DTypeLike, interpret: bool
) -> Float[Array, "M N"]:
    """See `api.quantized_matmul`."""
    given, w = w, _tiled_site(w)
    main = w.groups[0].w
    a = a._replace(values=widen(a.values, main.padded_rows), side=reseat(a.side, given, w))
    tokens, bits = a.values.shape[0], w.groups[0].a_bits
    return matmul(main, _sides(w), bias, tokens, bits, ready=a, filler=None, dtype=dtype, interpret=interpret)


def decode_matmul(
    x: Float[Array, "M D"],
    w: SplitWeight,
    is_text: Bool[Array, " M"] | None,
    bias: Float[Array, " N"] | None,
    *,
    dtype: DTypeLike,
    interpret: bool,
) -> Float[Array, "M N"]:
    """See `api.decode_matmul`; XLA transforms, one kernel does the rest."""
    if keeps_floats(w):
        return quantized_matmul(_float_activations(x, w), w, bias, dtype=dtype, interpret=interpret)
    w = _tiled_site(w)
    tokens = tiles.up(x.shape[0], 16 if x.shape[0] > 8 else 8)
    plan, by_token, others = plan_of(x, w, is_text)
    filler = Filler(partial(fill, plan), (*(pad_rows(a, tokens) for a in by_token), *others))
    main, bits = w.groups[0].w, w.groups[0].a_bits
    y = matmul(main, _sides(w), bias, tokens, bits, ready=None, filler=filler, dtype=dtype, interpret=interpret)
    return y[: x.shape[0]]


def weight_only_matmul(
    x: Float[Array, "M K"], w: QTensor, bias: Float[Array, " N"] | None, *, dtype: DTypeLike, interpret: bool
) -> Float[Array, "M N"]:
    """See `api.weight_only_matmul`."""
    w = _tiled(w)
    a = Activations(widen(x, w.padded_rows).astype(jnp.bfloat16), None, None)
    return matmul(w, [], bias, x.shape[0], FLOAT_BITS, ready=a, filler=None, dtype=dtype, interpret=interpret)


# --- whole tiles


def _tiled(w: QTensor, rows: int = 0) -> QTensor:
    """Return the matrix with words in whole tiles, or as ``rows`` rows: as it is for wide sites, a copy for narrow ones."""
    if w.bits == 3 and slab_rows(w.rows) != SLAB:
        w = from_codes(w.codes(), w.scale, 4)
    if w.padded_rows % TILE_ROWS or w.padded_rows < rows:
        w = pad_words(w, rows or 2 * TILE_ROWS)
    return w


def _tiled_site(w: SplitWeight) -> SplitWeight:
    groups = tuple(replace(g, w=_tiled(g.w)) for g in w.groups)
    rows = groups[0].w.padded_rows
    b = w.branches
    return replace(w, groups=groups, branches=None if b is None else replace(b, u=_tiled(b.u, rows), v=_tiled(b.v)))


def _sides(w: SplitWeight) -> list[Side]:
    return [Side(s.w.words[0], s.columns, s.w.bits) for s in segments(w)]

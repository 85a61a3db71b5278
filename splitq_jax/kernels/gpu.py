"""The kernels' jobs on NVIDIA Hopper, by `splitq_jax.kernels.gpu_matmul`.

Weights are read in the order of the tensor cores' registers (`relayout`), made once, where a model is quantized or restored: what comes in
the layout of `splitq_jax.packing` is computed right, but laid out anew at every call. Many tokens are transformed and quantized by XLA,
which fuses that into a few passes over them, few tokens by `splitq_jax.kernels.gpu_quantizer`. Neither is part of the product: there a
thread block sees a tile of the channels, so it would read, and transform, whole tokens once a tile.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float

from splitq_jax.kernels import gpu_quantizer, reference
from splitq_jax.kernels.fragment import PLANES, fragment_step, pack_fragments
from splitq_jax.kernels.gpu_matmul import matmul, token_tile
from splitq_jax.kernels.gpu_tile import SIDE_STEP, STEP, Operands
from splitq_jax.kernels.operands import Activations, dense_sides, keeps_floats, reseat, segments, widen
from splitq_jax.qtensor import QTensor

if TYPE_CHECKING:
    from splitq_jax.linear import SplitWeight
else:
    SplitWeight = Any

INT8, BFLOAT16 = 4, 2  # elements of a register, by which `QTensor.elements` names the layouts


def refuses(job: str, w: SplitWeight | QTensor, tokens: int) -> str | None:
    """Return why a job goes to the reference, None where it does not."""
    main = w if isinstance(w, QTensor) else w.groups[0].w
    if tokens == 0:
        return "no tokens"
    if main.bits not in PLANES:
        return f"weights of {main.bits} bits"
    if _scale(main).shape[0] > 1 and not (isinstance(w, QTensor) or keeps_floats(w)):
        return "codes of activations beside scales per group of rows"
    if _scale(main).shape[0] > 1 and main.group not in (32, 64) and main.group % STEP:
        return f"groups of {main.group} rows"
    if not isinstance(w, QTensor):
        other = [s.w.bits for s in segments(w) if s.w.bits != 4]
        if other:
            return f"narrow weights of {other[0]} bits"
    return None


@overload
def relayout(w: SplitWeight) -> SplitWeight: ...
@overload
def relayout(w: QTensor) -> QTensor: ...
def relayout(w: SplitWeight | QTensor) -> SplitWeight | QTensor:
    """Return the same weight as the kernels read it; unchanged where they refuse it."""
    if refuses("quantized_matmul", w, 1):
        return w
    if isinstance(w, QTensor):
        return _fragments(w, BFLOAT16, STEP)
    laid = _relayout_site(w)
    return replace(dense_sides(laid), quantizer=laid.quantizer or gpu_quantizer.lay_out(laid, [g.transform for g in w.groups]))


def _relayout_site(w: SplitWeight) -> SplitWeight:
    main, *others = w.groups
    groups = [replace(main, w=_fragments(main.w, BFLOAT16 if keeps_floats(w) else INT8, STEP))]
    groups += [replace(g, w=_fragments(g.w, BFLOAT16, SIDE_STEP)) for g in others]
    branches = None if w.branches is None else replace(w.branches, v=_fragments(w.branches.v, BFLOAT16, SIDE_STEP))
    return replace(w, groups=tuple(groups), branches=branches)


def _fragments(w: QTensor, elements: int, step: int) -> QTensor:
    if w.elements == elements and fragment_step(w.words, w.bits) == step:
        return w
    return QTensor(pack_fragments(w.codes(), w.bits, elements, step), w.scale, w.bits, w.rows, elements)


def _scale(w: QTensor) -> Float[Array, "G N"]:
    assert w.scale is not None  # only codes reach this
    return w.scale.astype(jnp.float32)


def _group_scale(laid: QTensor) -> tuple[Float[Array, "G N"], int | None]:
    """Return scales for all padded rows, and how many rows share one, None where all do."""
    scale = _scale(laid)
    if scale.shape[0] == 1:
        return scale, None
    return jnp.pad(scale, ((0, -(-laid.padded_rows // laid.group) - scale.shape[0]), (0, 0))), laid.group


def quantize_activations(
    x: Float[Array, "M D"], w: SplitWeight, is_text: Bool[Array, " M"] | None, *, interpret: bool = False
) -> Activations:
    """Transform, split and quantize tokens, and compute the narrow operand (see `api.quantize_activations`).

    Tokens that stay floats become bfloat16, the tensor cores' type.
    """
    if x.shape[0] <= gpu_quantizer.TOKENS and (laid := relayout(w)).quantizer is not None:
        a = gpu_quantizer.quantize_activations(x, laid, is_text, interpret)
        return a._replace(values=_fit(a.values, w.groups[0].w), side=reseat(a.side, laid, w))
    a = reference.quantize_activations(x, w, is_text)
    values = a.values if a.scale is not None else a.values.astype(jnp.bfloat16)
    return Activations(values, a.scale, None if a.side is None else a.side.astype(jnp.bfloat16))


def quantized_matmul(
    a: Activations, w: SplitWeight, bias: Float[Array, " N"] | None, *, dtype: DTypeLike, interpret: bool = False
) -> Float[Array, "M N"]:
    """Multiply prepared tokens by a site (see `api.quantized_matmul`)."""
    laid = _relayout_site(w)
    main, narrow = laid.groups[0].w, segments(laid)
    scale, group = _group_scale(main)
    side = reseat(a.side, w, laid)
    operands = Operands(
        x=_fit(a.values if a.scale is not None else a.values.astype(jnp.bfloat16), main),
        planes=main.words,
        scale=scale,
        token_scale=None if a.scale is None else a.scale[:, 0].astype(jnp.float32),
        side=None if side is None else side.astype(jnp.bfloat16),
        side_words=tuple(s.w.words[0] for s in narrow),
        side_scale=tuple(s.columns.astype(jnp.float32) for s in narrow if s.columns is not None),
        bias=None if bias is None else bias.astype(jnp.float32),
    )
    return matmul(operands, main.bits, group, dtype, interpret=interpret)


def decode_matmul(
    x: Float[Array, "M D"],
    w: SplitWeight,
    is_text: Bool[Array, " M"] | None,
    bias: Float[Array, " N"] | None,
    *,
    dtype: DTypeLike,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """Quantize and multiply (see `api.decode_matmul`): two steps here, for the reason that the module gives.

    Tokens are padded to what the product takes where that costs nothing, on their way into the quantizer.
    """
    m, w = x.shape[0], relayout(w)
    padding = (0, -m % token_tile(m))
    x = jnp.pad(x, (padding, (0, 0)))
    is_text = None if is_text is None else jnp.pad(is_text, padding)
    a = quantize_activations(x, w, is_text, interpret=interpret)
    return quantized_matmul(a, w, bias, dtype=dtype, interpret=interpret)[:m]


def weight_only_matmul(
    x: Float[Array, "M K"], w: QTensor, bias: Float[Array, " N"] | None, *, dtype: DTypeLike, interpret: bool = False
) -> Float[Array, "M N"]:
    """Multiply float tokens by packed codes (see `api.weight_only_matmul`); tokens become bfloat16."""
    laid = _fragments(w, BFLOAT16, STEP)
    scale, group = _group_scale(laid)
    bias = None if bias is None else bias.astype(jnp.float32)
    operands = Operands(widen(x.astype(jnp.bfloat16), laid.padded_rows), laid.words, scale, None, None, (), (), bias)
    return matmul(operands, laid.bits, group, dtype, interpret=interpret)


def _fit(x: Float[Array, "M _"], w: QTensor) -> Float[Array, "M _"]:
    """Make ``x``, zero beyond the weight's rows, as wide as the weight's padded rows."""
    return x if x.shape[1] == w.padded_rows else widen(x[:, : w.rows], w.padded_rows)

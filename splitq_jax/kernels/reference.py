"""The kernels' meaning in plain XLA: what runs on CPU, and what every other backend must give up to the order of float sums."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float

from splitq_jax.kernels.operands import (
    Activations,
    Segment,
    gate_scales,
    mac_mask,
    picked,
    segments,
    transformed,
    widen,
)
from splitq_jax.numerics import FLOAT_BITS, encode, scale_of
from splitq_jax.qtensor import QTensor, integer_dot

if TYPE_CHECKING:
    from splitq_jax.linear import SplitWeight
else:
    SplitWeight = Any


def quantize_activations(x: Float[Array, "M D"], w: SplitWeight, is_text: Bool[Array, " M"] | None) -> Activations:
    """Transform, split and quantize tokens, and compute the narrow operand (see `api.quantize_activations`)."""
    main, *others = transformed(picked(x, w), w)
    values, scale = quantize(main, w.groups[0].a_bits, w.groups[0].a_clip)
    parts = []
    for group, x_j in zip(w.groups[1:], others, strict=True):
        codes, step = quantize(x_j, group.a_bits, group.a_clip)
        parts.append(codes if step is None else codes.astype(step.dtype) * step)
    if w.branches is not None:
        u, (cws, mac) = w.branches.u, gate_scales(w.branches)
        narrow = jnp.zeros((x.shape[0], w.branches.rank), jnp.float32)
        if cws is not None:
            narrow += matmul(values, scale, u) * cws
        if mac is not None:
            x_hat = values if scale is None else values.astype(scale.dtype) * scale
            residual, step = quantize(main - x_hat, w.residual_bits, None)
            narrow += matmul(residual, step, u) * mac * mac_mask(w, is_text, x.shape[0])
        parts.append(narrow)
    padded = [widen(part, s.w.padded_rows) for part, s in zip(parts, segments(w), strict=True)]
    side = jnp.concatenate(padded, axis=1) if padded else None
    return Activations(widen(values, w.groups[0].w.padded_rows), scale, side)


def quantize(x: Float[Array, "M K"], bits: int, clip: Float[Array, " 2"] | None) -> tuple[Array, Float[Array, "M 1"] | None]:
    """Return int8 codes and the step of each token, or the tokens themselves and None from 16 bits on."""
    if bits >= FLOAT_BITS:
        return x, None
    scale = scale_of(x, bits, clip)
    # codes cannot hold NaN, and XLA's maxima of many leave it out on CPU
    broken = jax.lax.platform_dependent(
        x,
        cpu=lambda x: jnp.any(jnp.isnan(x), axis=1, keepdims=True),
        default=lambda x: jnp.zeros((x.shape[0], 1), bool),
    )
    scale = jnp.where(broken, jnp.nan, scale)
    return encode(x, scale, bits), scale


def matmul(values: Array, scale: Float[Array, "M 1"] | None, w: QTensor) -> Float[Array, "M N"]:
    """Multiply codes or floats by a matrix with scales per column or per group of rows: an integer product, rescaled once."""
    values = values[:, : w.rows]
    if w.scale is None:
        return (values if scale is None else values.astype(scale.dtype) * scale) @ w.words[0]
    if scale is None or w.scale.shape[0] > 1:
        floats = values if scale is None else values.astype(scale.dtype) * scale
        return floats @ w.decode().astype(floats.dtype)
    return integer_dot(values, w.codes()).astype(scale.dtype) * scale * w.scale


def quantized_matmul(a: Activations, w: SplitWeight, bias: Float[Array, " N"] | None, dtype: DTypeLike) -> Float[Array, "M N"]:
    """Multiply prepared tokens by a site (see `api.quantized_matmul`)."""
    y = matmul(a.values, a.scale, w.groups[0].w)
    if a.side is not None:
        y += a.side.astype(y.dtype) @ jnp.concatenate([rows_of(s) for s in segments(w)], axis=0).astype(y.dtype)
    if bias is not None:
        y += bias.astype(y.dtype)[None, :]
    return y.astype(dtype)


def rows_of(segment: Segment) -> Float[Array, "r N"]:
    """Return a segment's rows of ``B``, zeros where its words are padded."""
    w = segment.w
    if w.bits >= FLOAT_BITS:
        return w.words[0]
    codes = w.codes().astype(jnp.float32)
    rows = codes if segment.columns is None else codes * segment.columns
    return jnp.pad(rows, ((0, w.padded_rows - w.rows), (0, 0)))


def decode_matmul(
    x: Float[Array, "M D"],
    w: SplitWeight,
    is_text: Bool[Array, " M"] | None,
    bias: Float[Array, " N"] | None,
    dtype: DTypeLike,
) -> Float[Array, "M N"]:
    """Quantize and multiply (see `api.decode_matmul`)."""
    return quantized_matmul(quantize_activations(x, w, is_text), w, bias, dtype)


def weight_only_matmul(
    x: Float[Array, "M K"], w: QTensor, bias: Float[Array, " N"] | None, dtype: DTypeLike
) -> Float[Array, "M N"]:
    """Multiply float tokens by packed codes (see `api.weight_only_matmul`)."""
    y = matmul(x.astype(jnp.float32), None, w)
    return (y if bias is None else y + bias.astype(y.dtype)[None, :]).astype(dtype)

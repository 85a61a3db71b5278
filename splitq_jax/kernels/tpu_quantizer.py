"""In a TPU kernel: tokens that XLA has transformed become codes, steps and the narrow operand."""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from splitq_jax.kernels import operands, tiles
from splitq_jax.kernels.operands import gate_scales, mac_mask, transformed, widen
from splitq_jax.kernels.tpu_words import dot, expand, operand_type
from splitq_jax.site import split

if TYPE_CHECKING:
    from splitq_jax.linear import SplitWeight
else:
    SplitWeight = Any

TINY = 1.1754943508222875e-38
PICKED_BY_PRODUCTS = 512  # tokens up to which that is faster


class Plan(NamedTuple):
    """What the quantizer's body needs to know; the arrays come as references in the order of `plan_of`.

    Attributes:
      groups: (bits, has clips) of each group.
      u_bits: of the codes of ``U``, 0 where the site has no branch.
      branches: whether it has CWS, and MAC.
      residual_bits: of MAC's residual.
      widths: columns of ``side`` of each side group.
      operand: the type in which codes meet ``U``.
    """

    groups: tuple[tuple[int, bool], ...]
    u_bits: int
    branches: tuple[bool, bool]
    residual_bits: int
    widths: tuple[int, ...]
    operand: Any


def picked(x: Float[Array, "M D"], w: SplitWeight) -> list[Float[Array, "M K"]]:
    """`operands.picked`; few tokens in bfloat16 by products with 0 and 1, for a TPU takes longer to pick 4,096 lanes of 16 tokens.

    The main group's channels are ascending, with at most the side's many left out before each. So the outputs of a tile of lanes lie
    within that tile and the next ones, and the products are narrow. Channels in another order give NaN.
    """
    if w.perm is None or x.shape[0] > PICKED_BY_PRODUCTS or x.dtype != jnp.bfloat16:
        return operands.picked(x, w)
    width, main, lanes = x.shape[1], w.groups[0].w.rows, tiles.LANES
    blocks, reach = -(-main // lanes), 1 + -(-(width - main) // lanes)  # tiles of lanes: of outputs, and that one of them reads
    first = lanes * jnp.arange(blocks)[:, None]
    # what fills the last tile is cut off below
    offset = jnp.pad(w.perm[:main], (0, blocks * lanes - main), constant_values=lanes * (blocks - 1)).reshape(blocks, lanes) - first
    tiled = jnp.pad(x, ((0, 0), (0, (blocks + reach - 1) * lanes - width))).reshape(x.shape[0], -1, lanes)
    windows = jnp.concatenate([tiled[:, i : i + blocks] for i in range(reach)], axis=2)  # M blocks reach*lanes
    ones = jnp.arange(reach * lanes)[None, :, None] == offset[:, None, :]  # blocks reach*lanes lanes
    y = jnp.einsum("mbi,bio->mbo", windows, ones.astype(x.dtype)).reshape(x.shape[0], -1)[:, :main]
    y = jnp.where(jnp.all((offset >= 0) & (offset < reach * lanes)), y, jnp.nan)
    side = x @ (jnp.arange(width)[:, None] == w.perm[None, main:]).astype(x.dtype)
    return [y, *split(side, tuple(g.w.rows for g in w.groups[1:]), axis=-1)]


def plan_of(x: Float[Array, "M D"], w: SplitWeight, is_text: Bool[Array, " M"] | None) -> tuple[Plan, list[Array], list[Array]]:
    """Return the plan, the arrays with a row per token, and the others."""
    by_token = transformed(picked(x, w), w)
    main = w.groups[0]
    by_token[0] = widen(by_token[0], main.w.padded_rows)
    others = [g.a_clip[None, :] for g in w.groups if g.a_clip is not None]
    scales: tuple[Array | None, Array | None] = (None, None)
    if w.branches is not None:
        u, scales = w.branches.u, gate_scales(w.branches)
        others += [u.words[0], *(u.scale * scale for scale in scales if scale is not None)]
    branches = (scales[0] is not None, scales[1] is not None)
    if branches[1]:
        by_token.append(mac_mask(w, is_text, x.shape[0]))
    groups = tuple((g.a_bits, g.a_clip is not None) for g in w.groups)
    widths = tuple(g.w.padded_rows for g in w.groups[1:])
    operand = operand_type(tiles.chip(), max(main.a_bits, w.residual_bits))
    u_bits = 0 if w.branches is None else w.branches.u.bits
    return Plan(groups, u_bits, branches, w.residual_bits, widths, operand), by_token, others


def _quantize(plan: Plan, refs: list[Any], interpret: bool) -> tuple[Array, Array, list[tuple[int, Array]]]:
    """Return int8 codes and steps of the main group, and the parts of ``side`` with the columns that they start at."""
    xs = [ref[...] for ref in refs[: len(plan.groups)]]
    mask = refs[len(plan.groups)][...] if plan.branches[1] else None
    rest = iter(refs[len(plan.groups) + (mask is not None) :])
    quantized = []
    for x, (bits, has_clip) in zip(xs, plan.groups, strict=True):
        quantized.append(_encode(x, bits, next(rest)[...] if has_clip else None))
    codes, step = quantized[0]
    parts: list[tuple[int, Array]] = []
    at = 0
    for (side_codes, side_step), width in zip(quantized[1:], plan.widths, strict=True):
        parts.append((at, side_codes * side_step))
        at += width
    if plan.u_bits:
        operand = plan.operand if plan.u_bits <= 4 else jnp.int8
        u, narrow = expand(next(rest)[...], plan.u_bits, operand), None
        if plan.branches[0]:
            narrow = dot(_as(codes, operand), u, interpret).astype(jnp.float32) * next(rest)[...] * step
        if plan.branches[1]:
            residual, residual_step = _encode(xs[0] - codes * step, plan.residual_bits, None)
            sent = dot(_as(residual, operand), u, interpret).astype(jnp.float32) * next(rest)[...] * (residual_step * mask)
            narrow = sent if narrow is None else narrow + sent
        parts.append((at, narrow))
    return codes, step, parts


def step_of(absmax: Float[Array, "*B"], bits: int) -> Float[Array, "*B"]:
    """Return the step of `numerics.scale_of`."""
    step = absmax / (2.0 ** (bits - 1) - 1)
    return jnp.where(step <= TINY, 1.0, step)


def _encode(x: Float[Array, "M K"], bits: int, clip: Float[Array, "1 2"] | None) -> tuple[Float[Array, "M K"], Float[Array, "M 1"]]:
    """`numerics.scale_of` and `numerics.encode`; the codes stay floats."""
    top = 2.0 ** (bits - 1) - 1
    if clip is None:
        absmax = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    else:
        high = jnp.maximum(jnp.max(x, axis=1, keepdims=True), 0.0)
        low = jnp.maximum(-jnp.min(x, axis=1, keepdims=True), 0.0)
        absmax = jnp.maximum(clip[:, 0:1] * high, clip[:, 1:2] * low)
    # plus 0, or NaN: some maxima leave NaN out
    step = step_of(absmax, bits) + jnp.sum(x * 0.0, axis=1, keepdims=True)
    # one division a token instead of one a channel: a quotient may come out a rounding away, which moves exact ties only
    return jnp.clip(jnp.round(x * (1.0 / step)), -top - 1, top), step


def _as(codes: Float[Array, "M K"], dtype: Any) -> Array:
    """Cast whole numbers."""
    if jnp.issubdtype(dtype, jnp.floating):
        return codes.astype(dtype)
    return codes.astype(jnp.int32).astype(dtype)


def _write_side(ref: Any, parts: list[tuple[int, Array]]) -> None:
    ref[...] = jnp.zeros(ref.shape, ref.dtype)  # between the parts lie the columns that meet padding
    for at, part in parts:
        ref[:, at : at + part.shape[1]] = part.astype(ref.dtype)


def body(plan: Plan, interpret: bool, ins: int, *refs: Any) -> None:
    """Write codes, steps and ``side`` to memory: the kernel of `quantize_activations`."""
    values, scale, *side = refs[ins:]
    codes, step, parts = _quantize(plan, list(refs[:ins]), interpret)
    values[...] = _as(codes, values.dtype)
    scale[...] = step
    if parts:
        _write_side(side[0], parts)


def fill(plan: Plan, refs: list[Any], x_buffer: Any, step_ref: Any, side_ref: Any, interpret: bool) -> None:
    """Leave codes, steps and ``side`` where the product finds them: the filler of `decode_matmul`."""
    codes, step, parts = _quantize(plan, refs, interpret)
    x_buffer[...] = _as(codes, x_buffer.dtype)
    step_ref[...] = step
    if parts:
        _write_side(side_ref, parts)

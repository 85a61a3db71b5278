"""The kernels for TPU, in Pallas.

One body serves all products: tokens stay in VMEM while the packed weight passes once, block after block of output channels, fetched ahead
by hand (the grid's own pipeline would wait for all tokens first and prefetch a block only in the last step before it). Weights of 4
bits are 4-bit integers after a `bitcast`; of 3 bits after eleven operations per four words. Up to 4-bit activations meet them in the
MXU's native s4 mode (e4m3 on generation 7, which has no integer mode; products and sums below 2^24 are exact there), 8-bit activations
as s8, floats as bfloat16. The narrow operand is one more product, in bfloat16, before the result leaves the registers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from splitq_jax.kernels import tiles
from splitq_jax.kernels.operands import Activations, keeps_floats, mac_mask, row_scale, segments, side_width, transformed, widen
from splitq_jax.numerics import FLOAT_BITS
from splitq_jax.packing import SLAB, TILE_ROWS, slab_rows
from splitq_jax.qtensor import QTensor, from_codes, pad_words

if TYPE_CHECKING:
    from splitq_jax.linear import SplitWeight
else:
    SplitWeight = Any

UPPER, LOWEST = -0x11111112, 0x11111111  # of each nibble, see `splitq_jax.packing`
TINY = 1.1754943508222875e-38


def refuses(job: str, w: SplitWeight | QTensor, tokens: int) -> str | None:
    """Return why a job is left to the reference, None where it is taken."""
    if isinstance(w, QTensor):
        return _refuses_matrix(w)
    main, *side = (g.w for g in w.groups)
    narrow = [m for b in (w.cws, w.mac) if b is not None for m in (b.u, b.v)]
    if reason := _refuses_matrix(main):
        return reason
    if any(m.bits not in {4, 8} for m in (*side, *narrow)):
        return "side groups or branches of other than 4 or 8 bits"
    if main.group != main.rows:
        return "a split site with grouped scales"
    if keeps_floats(w) and w.mac is not None:
        return "MAC with activations that stay floats"
    return None


def _refuses_matrix(w: QTensor) -> str | None:
    if w.bits not in {3, 4}:
        return f"weights of {w.bits} bits"
    if w.elements:
        return "words laid out for another platform"
    if w.scale is not None and w.scale.shape[0] > 1 and w.group % 32:
        return f"groups of {w.group} rows"
    return None


# --- in the kernel: words to operands


def _nibbles(words: Int[Array, "W n"], bits: int) -> Int[Array, "V n"]:
    """Return words of eight 4-bit integers: the codes, or for 3 bits twice the codes."""
    if bits == 4:
        return words
    slabs = words.reshape(-1, 24, words.shape[1])  # a plane is a tile of 8 words
    planes = [slabs[:, 8 * p : 8 * p + 8] for p in range(3)]
    last = ((planes[0] & LOWEST) << 1) | ((planes[1] & LOWEST) << 2) | ((planes[2] & LOWEST) << 3)
    return jnp.concatenate([*(p & UPPER for p in planes), last], axis=1).reshape(-1, words.shape[1])


def _decode(words: Array, bits: int, dtype: DTypeLike) -> Array:
    """Return a block of codes (for 3 bits twice the codes) as the product takes them."""
    codes = words if bits == 8 else pltpu.bitcast(_nibbles(words, bits), jnp.int4)
    return codes if codes.dtype == dtype else codes.astype(dtype)


def _dot(x: Array, w: Array, interpret: bool) -> Array:
    """Multiply, accumulated in int32 or float32."""
    if x.dtype == jnp.int4 and interpret:  # XLA on CPU has no product of int4
        x, w = x.astype(jnp.int8), w.astype(jnp.int8)
    wide = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=wide)


def _rounded(x: Array, interpret: bool) -> Array:
    """Round to bfloat16."""
    if interpret:  # XLA on CPU would leave a rounding to bfloat16 and back out
        x = jax.lax.reduce_precision(x, 8, 7)
    return x.astype(jnp.bfloat16)


def _operand_type(on: tiles.Chip, a_bits: int) -> Any:
    """Return the type in which activations of so many bits meet the weight."""
    if a_bits >= FLOAT_BITS:
        return jnp.bfloat16
    if a_bits > 4:
        return jnp.int8
    return jnp.float8_e4m3fn if on.generation >= 7 else jnp.int4


def _bytes(dtype: Any) -> float:
    return 0.5 if dtype == jnp.int4 else jnp.dtype(dtype).itemsize


def _stored_type(a_bits: int) -> Any:
    return jnp.bfloat16 if a_bits >= FLOAT_BITS else jnp.int8 if a_bits > 4 else jnp.int4


# --- the product


class _Side(NamedTuple):
    words: Array
    columns: Float[Array, "1 N"] | None
    bits: int


class _Filler(NamedTuple):
    """What makes the tokens' operands in VMEM, where they do not come ready from HBM."""

    body: Callable[..., None]
    args: tuple[Array, ...]


def _matmul(
    w: QTensor,
    side: list[_Side],
    bias: Float[Array, " N"] | None,
    tokens: int,
    a_bits: int,
    *,
    ready: Activations | None,
    filler: _Filler | None,
    dtype: DTypeLike,
    interpret: bool,
) -> Float[Array, "M N"]:
    """Run the product over all blocks; the tokens' operands are ``ready`` or made by ``filler``."""
    on = tiles.chip()
    n = w.words[0].shape[1]
    columns = tiles.up(n, tiles.LANES)
    words = widen(w.words[0], columns)
    rows = w.padded_rows
    stored, operand = _stored_type(a_bits), _operand_type(on, a_bits)
    t = tiles.tiles(on, tokens, rows, columns, _bytes(stored), w.bits / 8, _bytes(operand))
    if w.scale is None:
        raise TypeError("a weight without scales")
    r = sum(s.words.shape[0] * (32 // s.bits if s.bits < 8 else 1) for s in side)

    def by_columns(array: Array) -> tuple[Array, pl.BlockSpec]:
        return widen(array, columns), pl.BlockSpec((array.shape[0], t.columns), lambda g, n, m: (0, n))

    def by_rows(array: Array) -> tuple[Array, pl.BlockSpec]:
        chunks = t.block // t.rows
        return _pad_rows(array, t.tokens), pl.BlockSpec((t.rows, array.shape[1]), lambda g, n, m: (g * chunks + m, 0))

    inputs = [(words, pl.BlockSpec(memory_space=pl.ANY)), by_columns(w.scale)]
    for s in side:
        inputs += [by_columns(a) for a in (s.words, s.columns) if a is not None]
    if bias is not None:
        inputs.append(by_columns(bias.astype(jnp.float32)[None, :]))
    if filler is not None:
        inputs += [(a, pl.BlockSpec(a.shape, lambda g, n, m: (0, 0))) for a in filler.args]
    elif ready is not None:
        inputs.append((_pad_rows(ready.values.astype(stored), t.tokens), pl.BlockSpec(memory_space=pl.ANY)))
        if ready.scale is not None:
            inputs.append(by_rows(ready.scale))
        if ready.side is not None:
            inputs.append(by_rows(ready.side.astype(jnp.bfloat16)))

    steps = (t.tokens // t.block, columns // t.columns, t.block // t.rows)
    scratch = [
        pltpu.VMEM((t.depth, words.shape[0], t.columns), words.dtype),
        pltpu.SemaphoreType.DMA((t.depth, t.pieces)),
        pltpu.VMEM((t.block, rows), stored),
        pltpu.SemaphoreType.DMA((steps[2],)),
        pltpu.VMEM((2, t.rows, t.columns), dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.VMEM((rows, t.columns), operand),
        pltpu.VMEM((max(r, 16), t.columns), jnp.bfloat16),
        pltpu.VMEM((t.rows, 1), jnp.float32),
        pltpu.VMEM((t.rows, max(r, 16)), jnp.bfloat16),
    ]
    flops = 2 * t.tokens * columns * (rows + r)
    moved = words.nbytes + t.tokens * (rows + columns * jnp.dtype(dtype).itemsize)
    body = _Product(
        bits=w.bits,
        group=w.group if w.scale.shape[0] > 1 else 0,
        side=tuple((s.bits, s.columns is not None) for s in side),
        has_bias=bias is not None,
        integers=a_bits < FLOAT_BITS,
        fill=filler.body if filler else None,
        tiles=t,
        steps=steps,
        interpret=interpret,
    )
    y = pl.pallas_call(
        body.run,
        name="splitq_matmul",
        out_shape=jax.ShapeDtypeStruct((t.tokens, columns), dtype),
        grid=steps,
        in_specs=[spec for _, spec in inputs],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 3, vmem_limit_bytes=on.vmem),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=int(moved), transcendentals=0),
        interpret=interpret,
    )(*[array for array, _ in inputs])
    return y if y.shape == (tokens, n) else y[:tokens, :n]


@dataclass(frozen=True)
class _Product:
    """The body of all products.

    Attributes:
      bits: of the weight's codes.
      group: rows that share a scale, 0 where all do.
      side: (bits, has column scales) of each segment of ``B``.
      has_bias: whether a bias is added.
      integers: whether tokens have steps.
      fill: makes the tokens' operands in VMEM; None where they come from HBM.
      tiles: the tiles.
      steps: of the grid: blocks of tokens, blocks of columns, rows of a block of tokens.
      interpret: whether this is not a TPU.
    """

    bits: int
    group: int
    side: tuple[tuple[int, bool], ...]
    has_bias: bool
    integers: bool
    fill: Callable[..., None] | None
    tiles: tiles.Tiles
    steps: tuple[int, int, int]
    interpret: bool

    def run(self, *refs: Any) -> None:
        """Do one step of the grid."""
        t, (_, column_steps, row_steps) = self.tiles, self.steps
        *inputs, out, w_buffer, w_sems, x_buffer, x_sems, y_buffer, y_sems, w_ready, b_ready, s_own, t_own = refs
        ins = iter(inputs)
        words, scale = next(ins), next(ins)
        sides = [(bits, next(ins), next(ins) if has_columns else None) for bits, has_columns in self.side]
        bias = next(ins) if self.has_bias else None
        rest = list(ins)
        g, n, m = (pl.program_id(i) for i in range(3))
        block, blocks = g * column_steps + n, self.steps[0] * column_steps
        step, last = block * row_steps + m, blocks * row_steps - 1
        piece = t.columns // t.pieces
        slot = jax.lax.rem(step, 2)
        # decoded once for all rows, unless that is done beside the MXU for nothing, or happens once anyway
        # groups fill the MXU by halves or less: many tokens meet weights that carry their scales, rounded to bfloat16
        scaled = self.group > 0 and t.tokens > 256
        keep = scaled or (row_steps > 1 and w_ready.dtype == jnp.bfloat16)
        step_size = 0.5 if self.bits == 3 else 1.0  # 3-bit codes come doubled
        keep_side = row_steps > 2

        def part(p: Any) -> Any:
            return pl.ds(pl.multiple_of(p * piece, tiles.LANES), piece)

        def fetch_w(index: Any, p: Any) -> Any:
            at = pl.multiple_of(jax.lax.rem(index, column_steps) * t.columns + p * piece, tiles.LANES)
            buffer = jax.lax.rem(index, t.depth)
            target = w_buffer.at[buffer, :, part(p)]
            return pltpu.make_async_copy(words.at[:, pl.ds(at, piece)], target, w_sems.at[buffer, p])

        def fetch_x(chunk: Any) -> Any:
            source = rest[0].at[pl.ds(g * t.block + chunk * t.rows, t.rows)]
            return pltpu.make_async_copy(source, x_buffer.at[pl.ds(chunk * t.rows, t.rows)], x_sems.at[chunk])

        every = pl.ds(0, t.columns)

        def store(at_step: Any, at: Any) -> Any:
            """Write columns of a step's result."""
            at_block, buffer = at_step // row_steps, jax.lax.rem(at_step, 2)
            row = (at_block // column_steps) * t.block + jax.lax.rem(at_step, row_steps) * t.rows
            column = pl.multiple_of(jax.lax.rem(at_block, column_steps) * t.columns + at.start, tiles.LANES)
            target = out.at[pl.ds(row, t.rows), pl.ds(column, at.size)]
            return pltpu.make_async_copy(y_buffer.at[buffer, :, at], target, y_sems.at[buffer])

        def narrow(at: Any) -> Array:
            """Return some columns of ``B``."""
            parts = []
            for bits, ref, column_scale in sides:
                if column_scale is None:
                    parts.append(_decode(ref[:, at], bits, jnp.bfloat16))
                    continue
                rows = _decode(ref[:, at], bits, jnp.float32) * column_scale[:, at]
                parts.append(_rounded(rows, self.interpret))
            return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)

        def compute(at: Any) -> None:
            """Compute some columns of this step's result."""
            x = x_buffer[pl.ds(m * t.rows, t.rows)]
            w = w_ready[:, at] if keep else _decode(w_buffer[jax.lax.rem(block, t.depth), :, at], self.bits, w_ready.dtype)
            x = x if x.dtype == w.dtype else x.astype(w.dtype)
            if scaled:
                y = _dot(x, w, self.interpret)
            elif self.group:
                y = jnp.zeros((t.rows, at.size), jnp.float32)
                for i in range(scale.shape[0]):
                    rows = slice(i * self.group, (i + 1) * self.group)
                    y += _dot(x[:, rows], w[rows], self.interpret) * (scale[i : i + 1, at] * step_size)
            else:
                y = _dot(x, w, self.interpret).astype(jnp.float32) * (scale[:, at] * step_size)
            if self.integers:
                y *= s_own[...] if self.fill else rest[1][...]
            if sides:
                b = b_ready[:, at] if keep_side else narrow(at)
                y += _dot(t_own[...] if self.fill else rest[-1][...], b, self.interpret)
            if bias is not None:
                y += bias[:, at]
            y_buffer[slot, :, at] = y.astype(y_buffer.dtype)

        def decode(at: slice) -> None:
            if keep:
                w_ready[:, at] = _decode(w_buffer[jax.lax.rem(block, t.depth), :, at], self.bits, w_ready.dtype)

        def begin() -> None:
            if self.fill is None:
                fetch_x(0).start()
            pl.when(g == 0)(fetch_first)
            if self.fill is None:
                for chunk in range(1, row_steps):
                    fetch_x(chunk).start()
            else:
                self.fill(rest, x_buffer, s_own, t_own, self.interpret)

        def fetch_first() -> None:
            for i in range(min(t.depth - 1, blocks)):
                fetch_block(i)

        def fetch_block(index: Any) -> None:
            for p in range(t.pieces):
                fetch_w(index, p).start()

        def arrive(p: Any) -> None:
            fetch_w(block, p).wait()
            codes = w_buffer[jax.lax.rem(block, t.depth), :, part(p)]
            if scaled:
                decoded = _decode(codes, self.bits, jnp.float32)
                for i in range(scale.shape[0]):
                    rows = slice(i * self.group, (i + 1) * self.group)
                    w_ready[rows, part(p)] = _rounded(decoded[rows] * (scale[i : i + 1, part(p)] * step_size), self.interpret)
            elif keep:
                w_ready[:, part(p)] = _decode(codes, self.bits, w_ready.dtype)

        def in_one() -> None:
            for p in range(t.pieces):
                pl.when(m == 0)(partial(arrive, p))
            compute(every)
            store(step, every).start()

        def in_pieces() -> None:
            def one(p: Any, _: None) -> None:
                pl.when(m == 0)(partial(arrive, p))
                compute(part(p))
                store(step, part(p)).start()

            jax.lax.fori_loop(0, t.pieces, one, None)

        def keep_narrow() -> None:
            b_ready[...] = narrow(every)

        pl.when((n == 0) & (m == 0))(begin)
        pl.when((m == 0) & (block + t.depth - 1 < blocks))(lambda: fetch_block(block + t.depth - 1))
        if keep_side and sides:
            pl.when(m == 0)(keep_narrow)
        if self.fill is None:
            pl.when(n == 0)(lambda: fetch_x(m).wait())
        pl.when(step >= 2)(lambda: store(step - 2, every).wait())
        # the first step computes what has arrived, the last one writes what is ready
        edge = (step == 0) | (step == last)
        if t.pieces == 1:
            in_one()
        else:
            pl.when(~edge)(in_one)
            pl.when(edge)(in_pieces)
        pl.when((step == last) & (step > 0))(lambda: store(step - 1, every).wait())
        pl.when(step == last)(lambda: store(step, every).wait())


# --- the quantizer


class _Quantizer(NamedTuple):
    """What the quantizer's body needs to know; the arrays come as references in the order of `_quantizer`.

    Attributes:
      groups: (bits, has clips) of each group.
      u: (bits of the codes, columns of ``side``) of CWS and of MAC, None for one that the site lacks.
      residual_bits: of MAC's residual.
      widths: columns of ``side`` of each side group.
      operand: the type in which codes meet ``U``.
    """

    groups: tuple[tuple[int, bool], ...]
    u: tuple[tuple[int, int] | None, tuple[int, int] | None]
    residual_bits: int
    widths: tuple[int, ...]
    operand: Any


def _quantizer(
    x: Float[Array, "M D"], w: SplitWeight, is_text: Bool[Array, " M"] | None
) -> tuple[_Quantizer, list[Array], list[Array]]:
    """Return the plan, the arrays with a row per token, and the others."""
    by_token = list(transformed(x, w))
    main = w.groups[0]
    by_token[0] = widen(by_token[0], main.w.padded_rows)
    others = [g.a_clip[None, :] for g in w.groups if g.a_clip is not None]
    us: list[tuple[int, int] | None] = []
    for branch in (w.cws, w.mac):
        us.append(None if branch is None else (branch.u.bits, branch.v.padded_rows))
        if branch is not None:
            rows = row_scale(branch.v)
            others += [branch.u.words[0], branch.u.scale if rows is None else branch.u.scale * rows]
    if w.mac is not None:
        by_token.append(mac_mask(w, is_text, x.shape[0]))
    groups = tuple((g.a_bits, g.a_clip is not None) for g in w.groups)
    widths = tuple(g.w.padded_rows for g in w.groups[1:])
    operand = _operand_type(tiles.chip(), max(main.a_bits, w.residual_bits))
    return _Quantizer(groups, (us[0], us[1]), w.residual_bits, widths, operand), by_token, others


def _quantize(plan: _Quantizer, refs: list[Any], tokens: int, interpret: bool) -> tuple[Array, Array, list[tuple[int, Array]]]:
    """Return int8 codes and steps of the main group, and the parts of ``side`` with the columns that they start at."""
    xs = [ref[...] for ref in refs[: len(plan.groups)]]
    mask = refs[len(plan.groups)][...] if plan.u[1] is not None else None
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
    for i, u in enumerate(plan.u):
        if u is None:
            continue
        words, scale = next(rest)[...], next(rest)[...]
        values, value_step = (codes, step) if i == 0 else _encode(xs[0] - codes * step, plan.residual_bits, None)
        operand = plan.operand if u[0] <= 4 else jnp.int8
        narrow = _dot(_as(values, operand), _decode(words, u[0], operand), interpret).astype(jnp.float32) * scale * value_step
        parts.append((at, narrow if i == 0 else narrow * mask))
        at += u[1]
    return codes, step, parts


def _encode(x: Float[Array, "M K"], bits: int, clip: Float[Array, "1 2"] | None) -> tuple[Float[Array, "M K"], Float[Array, "M 1"]]:
    """`numerics.scale_of` and `numerics.encode`; the codes stay floats."""
    top = 2.0 ** (bits - 1) - 1
    if clip is None:
        absmax = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    else:
        high = jnp.maximum(jnp.max(x, axis=1, keepdims=True), 0.0)
        low = jnp.maximum(-jnp.min(x, axis=1, keepdims=True), 0.0)
        absmax = jnp.maximum(clip[:, 0:1] * high, clip[:, 1:2] * low)
    step = absmax / top
    step = jnp.where(step > TINY, step, 1.0)
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


def _quantizer_body(plan: _Quantizer, interpret: bool, ins: int, *refs: Any) -> None:
    values, scale, *side = refs[ins:]
    codes, step, parts = _quantize(plan, list(refs[:ins]), values.shape[0], interpret)
    values[...] = _as(codes, values.dtype)
    scale[...] = step
    if parts:
        _write_side(side[0], parts)


def _fill(plan: _Quantizer, refs: list[Any], x_buffer: Any, step_ref: Any, side_ref: Any, interpret: bool) -> None:
    codes, step, parts = _quantize(plan, refs, x_buffer.shape[0], interpret)
    x_buffer[...] = _as(codes, x_buffer.dtype)
    step_ref[...] = step
    if parts:
        _write_side(side_ref, parts)


# --- the jobs


def quantize_activations(
    x: Float[Array, "M D"], w: SplitWeight, is_text: Bool[Array, " M"] | None, *, interpret: bool
) -> Activations:
    """See `api.quantize_activations`; XLA transforms, one kernel does the rest."""
    if keeps_floats(w):
        return _float_activations(x, w)
    given, w = w, _tiled_site(w)
    main, r = w.groups[0].w, side_width(w)
    plan, by_token, others = _quantizer(x, w, is_text)
    tokens = x.shape[0]
    rows = min(tiles.up(tokens, 32), 256)
    padded = tiles.up(tokens, rows)
    by_token = [_pad_rows(a, padded) for a in by_token]
    outs = [
        jax.ShapeDtypeStruct((padded, main.padded_rows), _stored_type(w.groups[0].a_bits)),
        jax.ShapeDtypeStruct((padded, 1), jnp.float32),
        *([jax.ShapeDtypeStruct((padded, r), jnp.bfloat16)] if r else []),
    ]
    values, scale, *side = pl.pallas_call(
        partial(_quantizer_body, plan, interpret, len(by_token) + len(others)),
        name="splitq_quantize",
        out_shape=outs,
        grid=(padded // rows,),
        in_specs=[
            *(pl.BlockSpec((rows, a.shape[1]), lambda i: (i, 0)) for a in by_token),
            *(pl.BlockSpec(a.shape, lambda i: (0, 0)) for a in others),
        ],
        out_specs=[pl.BlockSpec((rows, o.shape[1]), lambda i: (i, 0)) for o in outs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=tiles.chip().vmem),
        interpret=interpret,
    )(*by_token, *others)
    values, scale, *side = (a[:tokens] for a in (values, scale, *side))
    return Activations(values[:, : given.groups[0].w.padded_rows], scale, _reseat(side[0], w, given) if r else None)


def _float_activations(x: Float[Array, "M D"], w: SplitWeight) -> Activations:
    main, *others = transformed(x, w)
    parts = [widen(x_j, g.w.padded_rows) for x_j, g in zip(others, w.groups[1:], strict=True)]
    if w.cws is not None:
        rows = row_scale(w.cws.v)
        narrow = main @ w.cws.u.decode()
        parts.append(widen(narrow if rows is None else narrow * rows, w.cws.v.padded_rows))
    side = jnp.concatenate(parts, axis=1).astype(jnp.bfloat16) if parts else None
    return Activations(widen(main, w.groups[0].w.padded_rows).astype(jnp.bfloat16), None, side)


def quantized_matmul(
    a: Activations, w: SplitWeight, bias: Float[Array, " N"] | None, *, dtype: DTypeLike, interpret: bool
) -> Float[Array, "M N"]:
    """See `api.quantized_matmul`."""
    given, w = w, _tiled_site(w)
    main = w.groups[0].w
    a = a._replace(values=widen(a.values, main.padded_rows), side=_reseat(a.side, given, w))
    tokens, bits = a.values.shape[0], w.groups[0].a_bits
    return _matmul(main, _sides(w), bias, tokens, bits, ready=a, filler=None, dtype=dtype, interpret=interpret)


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
    plan, by_token, others = _quantizer(x, w, is_text)
    filler = _Filler(partial(_fill, plan), (*(_pad_rows(a, tokens) for a in by_token), *others))
    main, bits = w.groups[0].w, w.groups[0].a_bits
    y = _matmul(main, _sides(w), bias, tokens, bits, ready=None, filler=filler, dtype=dtype, interpret=interpret)
    return y[: x.shape[0]]


def weight_only_matmul(
    x: Float[Array, "M K"], w: QTensor, bias: Float[Array, " N"] | None, *, dtype: DTypeLike, interpret: bool
) -> Float[Array, "M N"]:
    """See `api.weight_only_matmul`."""
    w = _tiled(w)
    a = Activations(widen(x, w.padded_rows).astype(jnp.bfloat16), None, None)
    return _matmul(w, [], bias, x.shape[0], FLOAT_BITS, ready=a, filler=None, dtype=dtype, interpret=interpret)


# --- whole tiles


def _tiled(w: QTensor, rows: int = 0) -> QTensor:
    """Return the matrix with words in whole tiles, ``rows`` rows or more: as it is for wide sites, a copy for narrow ones."""
    if w.bits == 3 and slab_rows(w.rows) != SLAB:
        w = from_codes(w.codes(), w.scale, 4)
    if w.padded_rows % TILE_ROWS or w.padded_rows < rows:
        w = pad_words(w, max(rows, 2 * TILE_ROWS))
    return w


def _tiled_site(w: SplitWeight) -> SplitWeight:
    groups = tuple(replace(g, w=_tiled(g.w)) for g in w.groups)
    rows = groups[0].w.padded_rows
    cws, mac = (None if b is None else replace(b, u=_tiled(b.u, rows), v=_tiled(b.v)) for b in (w.cws, w.mac))
    return replace(w, groups=groups, cws=cws, mac=mac)


def _reseat(side: Float[Array, "M R"] | None, source: SplitWeight, target: SplitWeight) -> Float[Array, "M S"] | None:
    """Move the segments of ``side`` from the widths of one layout of a site to those of another."""
    if side is None or side_width(source) == side_width(target):
        return side
    parts, at = [], 0
    for old, new in zip(segments(source), segments(target), strict=True):
        parts.append(widen(side[:, at : at + old.w.rows], new.w.padded_rows))
        at += old.w.padded_rows
    return jnp.concatenate(parts, axis=1)


def _sides(w: SplitWeight) -> list[_Side]:
    return [_Side(s.w.words[0], s.columns, s.w.bits) for s in segments(w)]


def _pad_rows(x: Array, rows: int) -> Array:
    return x if x.shape[0] == rows else jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))

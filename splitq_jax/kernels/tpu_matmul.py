"""The product on TPU: one body for all.

Tokens stay in VMEM while the packed weight passes once, block after block of output channels, fetched ahead
by hand (the grid's own pipeline would wait for all tokens first and prefetch a block only in the last step before it). Weights of 4
bits are 4-bit integers after a `bitcast`; of 3 bits after eleven operations per four words. Up to 4-bit activations meet them in the
MXU's native s4 mode (e4m3 on generation 7, which has no integer mode; products and sums below 2^24 are exact there), 8-bit activations
as s8, floats as bfloat16. The narrow operand is one more product, in bfloat16, before the result leaves the registers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, DTypeLike, Float

from splitq_jax.kernels import tiles
from splitq_jax.kernels.operands import Activations, widen
from splitq_jax.kernels.tpu_words import bytes_of, dot, expand, operand_type, pad_rows, rounded, stored_type
from splitq_jax.numerics import FLOAT_BITS
from splitq_jax.qtensor import QTensor


class Side(NamedTuple):
    """Packed rows of the narrow weight, and their scales per column where they have any."""

    words: Array
    columns: Float[Array, "1 N"] | None
    bits: int


class Filler(NamedTuple):
    """What makes the tokens' operands in VMEM, where they do not come ready from HBM."""

    body: Callable[..., None]
    args: tuple[Array, ...]


def matmul(
    w: QTensor,
    side: list[Side],
    bias: Float[Array, " N"] | None,
    tokens: int,
    a_bits: int,
    *,
    ready: Activations | None,
    filler: Filler | None,
    dtype: DTypeLike,
    interpret: bool,
) -> Float[Array, "M N"]:
    """Run the product over all blocks; the tokens' operands are ``ready`` or made by ``filler``."""
    on = tiles.chip()
    n = w.words[0].shape[1]
    columns = tiles.up(n, tiles.LANES)
    words = widen(w.words[0], columns)
    rows = w.padded_rows
    stored, operand = stored_type(a_bits), operand_type(on, a_bits)
    t = tiles.tiles(on, tokens, rows, columns, bytes_of(stored, on), w.bits / 8, bytes_of(operand, on))
    if w.scale is None:
        raise TypeError("a weight without scales")
    r = sum(s.words.shape[0] * (32 // s.bits if s.bits < 8 else 1) for s in side)

    def by_columns(array: Array) -> tuple[Array, pl.BlockSpec]:
        return widen(array, columns), pl.BlockSpec((array.shape[0], t.columns), lambda g, n, m: (0, n))

    def by_rows(array: Array) -> tuple[Array, pl.BlockSpec]:
        chunks = t.block // t.rows
        return pad_rows(array, t.tokens), pl.BlockSpec((t.rows, array.shape[1]), lambda g, n, m: (g * chunks + m, 0))

    inputs = [(words, pl.BlockSpec(memory_space=pl.ANY)), by_columns(w.scale)]
    for s in side:
        inputs += [by_columns(a) for a in (s.words, s.columns) if a is not None]
    if bias is not None:
        inputs.append(by_columns(bias.astype(jnp.float32)[None, :]))
    if filler is not None:
        inputs += [(a, pl.BlockSpec(a.shape, lambda g, n, m: (0, 0))) for a in filler.args]
    elif ready is not None:
        inputs.append((pad_rows(ready.values.astype(stored), t.tokens), pl.BlockSpec(memory_space=pl.ANY)))
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
                    parts.append(expand(ref[:, at], bits, jnp.bfloat16))
                    continue
                rows = expand(ref[:, at], bits, jnp.float32) * column_scale[:, at]
                parts.append(rounded(rows, self.interpret))
            return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)

        def compute(at: Any) -> None:
            """Compute some columns of this step's result."""
            x = x_buffer[pl.ds(m * t.rows, t.rows)]
            w = w_ready[:, at] if keep else expand(w_buffer[jax.lax.rem(block, t.depth), :, at], self.bits, w_ready.dtype)
            x = x if x.dtype == w.dtype else x.astype(w.dtype)
            if scaled:
                y = dot(x, w, self.interpret)
            elif self.group:
                y = jnp.zeros((t.rows, at.size), jnp.float32)
                for i in range(scale.shape[0]):
                    rows = slice(i * self.group, (i + 1) * self.group)
                    y += dot(x[:, rows], w[rows], self.interpret) * (scale[i : i + 1, at] * step_size)
            else:
                y = dot(x, w, self.interpret).astype(jnp.float32) * (scale[:, at] * step_size)
            if self.integers:
                y *= s_own[...] if self.fill else rest[1][...]
            if sides:
                b = b_ready[:, at] if keep_side else narrow(at)
                y += dot(t_own[...] if self.fill else rest[-1][...], b, self.interpret)
            if bias is not None:
                y += bias[:, at]
            y_buffer[slot, :, at] = y.astype(y_buffer.dtype)

        def decode(at: slice) -> None:
            if keep:
                w_ready[:, at] = expand(w_buffer[jax.lax.rem(block, t.depth), :, at], self.bits, w_ready.dtype)

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
                decoded = expand(codes, self.bits, jnp.float32)
                for i in range(scale.shape[0]):
                    rows = slice(i * self.group, (i + 1) * self.group)
                    w_ready[rows, part(p)] = rounded(decoded[rows] * (scale[i : i + 1, part(p)] * step_size), self.interpret)
                filled = scale.shape[0] * self.group
                if filled < w_ready.shape[0]:  # padding meets zeros of the tokens, but what lies in memory may be NaN
                    w_ready[filled:, part(p)] = jnp.zeros((w_ready.shape[0] - filled, piece), w_ready.dtype)
            elif keep:
                w_ready[:, part(p)] = expand(codes, self.bits, w_ready.dtype)

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

"""The product on TPU: one body for all.

Tokens stay in VMEM while the packed weight passes once, block after block of output channels. All is fetched by hand: the grid's own
pipeline has the first step wait for all of its operands, and takes the scalar unit longer. Weights of 4 bits are 4-bit integers after a
`bitcast`; of 3 bits after eleven operations per four words. Up to 4-bit activations meet them in the MXU's native s4 mode (e4m3 on
generation 7, which has no integer mode; products and sums below 2^24 are exact there), 8-bit activations as s8, floats as bfloat16. The
narrow operand is one more product, in bfloat16, before the result leaves the registers.
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
from splitq_jax.kernels.tpu_words import dot, expand, operand_type, pad_rows, rounded, stored_type
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


class _Columns(NamedTuple):
    """What belongs to output channels: all of them in HBM, or a block of them, ``depth`` times, in VMEM."""

    words: Any
    scale: Any
    side: tuple[tuple[Any, Any | None], ...]
    bias: Any | None


class _Kept(NamedTuple):
    """What the kernel keeps in VMEM.

    Attributes:
      columns: blocks of the weight, one in use, the others on their way.
      columns_sem: a semaphore a block.
      tokens: a block of tokens; where a filler makes them, its results.
      tokens_sem: a semaphore for what arrives together.
      y: results, one made while another is written.
      y_sem: their semaphores.
      w: the weight as the product takes it, where that is kept.
      b: ``B``, where that is kept.
    """

    columns: _Columns
    columns_sem: Any
    tokens: Activations
    tokens_sem: Any
    y: Any
    y_sem: Any
    w: Any
    b: Any


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
    if w.scale is None:
        raise TypeError("a weight without scales")
    on = tiles.chip()
    n = w.words[0].shape[1]
    columns = tiles.up(n, tiles.LANES)
    rows, r = w.padded_rows, sum(s.words.shape[0] * (32 // s.bits if s.bits < 8 else 1) for s in side)
    stored, operand = stored_type(a_bits), operand_type(on, a_bits)
    # in VMEM a 4-bit integer takes a byte, a token's step a row of lanes
    token_bytes = rows * jnp.dtype(stored).itemsize + 2 * r + 4 * tiles.LANES
    t = tiles.tiles(on, tokens, rows, columns, token_bytes, w.bits / 8, jnp.dtype(operand).itemsize)
    steps = (t.tokens // t.block, columns // t.columns, t.block // t.rows)
    group = w.group if w.scale.shape[0] > 1 else 0
    # groups fill the MXU by halves or less: many tokens meet weights that carry their scales, rounded to bfloat16
    scaled = group > 0 and t.tokens > 256
    # decoded once for all rows, unless that is done beside the MXU for nothing, or happens once anyway
    keeps_w = scaled or (steps[2] > 1 and operand == jnp.bfloat16)

    by_column = jax.tree.map(
        partial(widen, columns=columns),
        _Columns(
            words=w.words[0],
            scale=w.scale,
            side=tuple((s.words, s.columns) for s in side),
            bias=None if bias is None else bias.astype(jnp.float32)[None, :],
        ),
    )
    given: Any = filler.args if filler else None
    if ready is not None:
        ready = ready._replace(
            values=ready.values.astype(stored), side=None if ready.side is None else ready.side.astype(jnp.bfloat16)
        )
        given = jax.tree.map(lambda a: pad_rows(a, t.tokens), ready)
    kept = _Kept(
        columns=jax.tree.map(lambda a: pltpu.VMEM((t.depth, a.shape[0], t.columns), a.dtype), by_column),
        columns_sem=pltpu.SemaphoreType.DMA((t.depth,)),
        tokens=Activations(
            values=pltpu.VMEM((t.block, rows), stored),
            scale=pltpu.VMEM((t.block, 1), jnp.float32) if a_bits < FLOAT_BITS else None,
            side=pltpu.VMEM((t.block, r), jnp.bfloat16) if r else None,
        ),
        tokens_sem=pltpu.SemaphoreType.DMA((steps[2], t.pieces)),
        y=pltpu.VMEM((2, t.rows, t.columns), dtype),
        y_sem=pltpu.SemaphoreType.DMA((2,)),
        w=pltpu.VMEM((rows, t.columns), operand) if keeps_w else None,
        b=pltpu.VMEM((r, t.columns), jnp.bfloat16) if r and (t.pieces > 1 or steps[2] > 2) else None,
    )
    product = _Product(
        bits=w.bits,
        operand=operand,
        group=group,
        scaled=scaled,
        side_bits=tuple(s.bits for s in side),
        fill=filler.body if filler else None,
        tiles=t,
        steps=steps,
        interpret=interpret,
    )
    moved = w.words[0].nbytes + t.tokens * (rows + columns * jnp.dtype(dtype).itemsize)
    in_place = pl.BlockSpec(memory_space=pl.ANY)
    y = pl.pallas_call(
        lambda *refs: _Step(product, *refs).run(),
        name="splitq_matmul",
        out_shape=jax.ShapeDtypeStruct((t.tokens, columns), dtype),
        grid=steps,
        # what a filler reads XLA leaves in VMEM
        in_specs=[
            jax.tree.map(lambda _: in_place, by_column),
            jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.VMEM) if filler else in_place, given),
        ],
        out_specs=in_place,
        scratch_shapes=[kept],
        compiler_params=tiles.compiler_params("arbitrary", "arbitrary", "arbitrary"),
        cost_estimate=pl.CostEstimate(flops=2 * t.tokens * columns * (rows + r), bytes_accessed=int(moved), transcendentals=0),
        interpret=interpret,
    )(by_column, given)
    return y if y.shape == (tokens, n) else y[:tokens, :n]


@dataclass(frozen=True)
class _Product:
    """What all steps know.

    Attributes:
      bits: of the weight's codes.
      operand: the type in which the product takes them.
      group: rows that share a scale, 0 where all do.
      scaled: whether the weight carries those scales in the product.
      side_bits: of each segment of ``B``.
      fill: makes the tokens' operands in VMEM; None where they come from HBM.
      tiles: the tiles.
      steps: of the grid: blocks of tokens, blocks of columns, rows of a block of tokens.
      interpret: whether this is not a TPU.
    """

    bits: int
    operand: Any
    group: int
    scaled: bool
    side_bits: tuple[int, ...]
    fill: Callable[..., None] | None
    tiles: tiles.Tiles
    steps: tuple[int, int, int]
    interpret: bool


class _Step:
    """One step of the grid."""

    def __init__(self, product: _Product, by_column: _Columns, given: Any, out: Any, kept: _Kept) -> None:
        self.product, self.by_column, self.given, self.out, self.kept = product, by_column, given, out, kept
        self.tiles, (_, self.column_steps, self.row_steps) = product.tiles, product.steps
        self.g, self.n, self.m = (pl.program_id(i) for i in range(3))
        self.block, self.blocks = self.g * self.column_steps + self.n, product.steps[0] * self.column_steps
        self.step, self.last = self.block * self.row_steps + self.m, self.blocks * self.row_steps - 1
        self.piece, self.every = self.tiles.rows // self.tiles.pieces, pl.ds(0, self.tiles.rows)
        self.keeps_b = self.row_steps > 2 and kept.b is not None

    def run(self) -> None:
        """Do it."""
        t, block, step, every = self.tiles, self.block, self.step, self.every
        pl.when((self.n == 0) & (self.m == 0))(self.begin)
        pl.when((self.m == 0) & (block + t.depth - 1 < self.blocks))(lambda: self.fetch_columns(block + t.depth - 1))
        pl.when(self.m == 0)(self.take_columns)
        pl.when(step >= 2)(lambda: self.store(step - 2, every).wait())
        # the first step computes what has arrived, the last one writes what is ready
        edge = (step == 0) | (step == self.last)
        if t.pieces == 1:
            self.in_one()
        else:
            pl.when(~edge)(self.in_one)
            pl.when(edge)(self.in_pieces)
        pl.when((step == self.last) & (step > 0))(lambda: self.store(step - 1, every).wait())
        pl.when(step == self.last)(lambda: self.store(step, every).wait())

    # --- the ways in and out

    def column_copies(self, index: Any) -> list[Any]:
        """Return the copies that fetch a block of columns."""
        t = self.tiles
        column = index if self.product.steps[0] == 1 else jax.lax.rem(index, self.column_steps)
        at = pl.ds(pl.multiple_of(column * t.columns, tiles.LANES), t.columns)
        buffer = _modulo(index, t.depth)
        pairs = zip(jax.tree.leaves(self.by_column), jax.tree.leaves(self.kept.columns), strict=True)
        return [pltpu.make_async_copy(a.at[:, at], b.at[buffer], self.kept.columns_sem.at[buffer]) for a, b in pairs]

    def fetch_columns(self, index: Any) -> None:
        for copy in self.column_copies(index):
            copy.start()

    def token_copies(self, chunk: Any, p: Any) -> list[Any]:
        """Return the copies that fetch a piece of a step's tokens."""
        at = chunk * self.tiles.rows + p * self.piece
        source, target = pl.ds(self.g * self.tiles.block + at, self.piece), pl.ds(at, self.piece)
        pairs = zip(jax.tree.leaves(self.given), jax.tree.leaves(self.kept.tokens), strict=True)
        return [pltpu.make_async_copy(a.at[source], b.at[target], self.kept.tokens_sem.at[chunk, p]) for a, b in pairs]

    def begin(self) -> None:
        """Send for a block of tokens, and for the first columns."""
        if self.product.fill is not None:
            pl.when(self.g == 0)(self.fetch_first_columns)
            self.product.fill(self.given, *self.kept.tokens, self.product.interpret)
            return
        for i in range(self.row_steps * self.tiles.pieces):
            for copy in self.token_copies(*divmod(i, self.tiles.pieces)):
                copy.start()
            if i == 0:  # what the first step needs comes first
                pl.when(self.g == 0)(self.fetch_first_columns)

    def fetch_first_columns(self) -> None:
        for i in range(min(self.tiles.depth - 1, self.blocks)):
            self.fetch_columns(i)

    def take_tokens(self, p: Any) -> None:
        """Wait for a piece of this step's tokens."""
        if self.product.fill is None:

            @pl.when(self.n == 0)
            def _() -> None:
                for copy in self.token_copies(self.m, p):
                    copy.wait()

    def take_columns(self) -> None:
        """Wait for this block's columns, and decode what is kept of them."""
        for copy in self.column_copies(self.block):
            copy.wait()
        if self.keeps_b:
            self.kept.b[...] = self.narrow()
        w, columns = self.kept.w, self.columns()
        if w is None:
            return
        if not self.product.scaled:
            w[...] = self.expanded(w.dtype)
            return
        decoded, group, groups = self.expanded(jnp.float32), self.product.group, columns.scale.shape[0]
        for i in range(groups):
            rows = slice(i * group, (i + 1) * group)
            w[rows] = rounded(decoded[rows] * (columns.scale[i : i + 1] * self.step_size), self.product.interpret)
        if groups * group < w.shape[0]:  # padding meets zeros of the tokens, but what lies in memory may be NaN
            w[groups * group :] = jnp.zeros((w.shape[0] - groups * group, w.shape[1]), w.dtype)

    def store(self, step: Any, at: Any) -> Any:
        """Return the copy that writes rows of a step's result."""
        t, block, buffer = self.tiles, step // self.row_steps, _modulo(step, 2)
        row = (block // self.column_steps) * t.block + jax.lax.rem(step, self.row_steps) * t.rows + at.start
        column = pl.multiple_of(jax.lax.rem(block, self.column_steps) * t.columns, tiles.LANES)
        target = self.out.at[pl.ds(row, at.size), pl.ds(column, t.columns)]
        return pltpu.make_async_copy(self.kept.y.at[buffer, at], target, self.kept.y_sem.at[buffer])

    # --- the product

    @property
    def step_size(self) -> float:
        """Of the codes as they are expanded: 3-bit codes come doubled."""
        return 0.5 if self.product.bits == 3 else 1.0

    def columns(self) -> _Columns:
        """Return this block's columns."""
        buffer = _modulo(self.block, self.tiles.depth)
        columns: _Columns = jax.tree.map(lambda ref: ref.at[buffer], self.kept.columns)
        return columns

    def expanded(self, dtype: DTypeLike) -> Array:
        return expand(self.columns().words[...], self.product.bits, dtype)

    def narrow(self) -> Array:
        """Return ``B``."""
        parts = []
        for bits, (words, scale) in zip(self.product.side_bits, self.columns().side, strict=True):
            if scale is None:
                parts.append(expand(words[...], bits, jnp.bfloat16))
            else:
                parts.append(rounded(expand(words[...], bits, jnp.float32) * scale[...], self.product.interpret))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)

    def in_one(self) -> None:
        """Compute the step's result and send it off."""
        for p in range(self.tiles.pieces):
            self.take_tokens(p)
        self.compute(self.every, self.keeps_b)
        self.store(self.step, self.every).start()

    def in_pieces(self) -> None:
        """Do the same, a piece of the tokens at a time."""
        if self.kept.b is not None and not self.keeps_b:
            self.kept.b[...] = self.narrow()

        def one(p: Any, _: None) -> None:
            at = pl.ds(pl.multiple_of(p * self.piece, self.piece), self.piece)
            self.take_tokens(p)
            self.compute(at, True)
            self.store(self.step, at).start()

        jax.lax.fori_loop(0, self.tiles.pieces, one, None)

    def compute(self, at: Any, kept_b: bool) -> None:
        """Compute some rows of the step's result."""
        interpret, group, columns = self.product.interpret, self.product.group, self.columns()
        rows = pl.ds(self.m * self.tiles.rows + at.start, at.size)
        values, scale, side = jax.tree.map(lambda ref: ref[rows], self.kept.tokens)
        w = self.expanded(self.product.operand) if self.kept.w is None else self.kept.w[...]
        values = values if values.dtype == w.dtype else values.astype(w.dtype)
        if self.product.scaled:
            y = dot(values, w, interpret)
        elif group:
            y = jnp.zeros((at.size, self.tiles.columns), jnp.float32)
            for i in range(columns.scale.shape[0]):
                share = slice(i * group, (i + 1) * group)
                y += dot(values[:, share], w[share], interpret) * (columns.scale[i : i + 1] * self.step_size)
        else:
            y = dot(values, w, interpret).astype(jnp.float32) * (columns.scale[...] * self.step_size)
        if scale is not None:
            y *= scale
        if side is not None:
            y += dot(side, self.kept.b[...] if kept_b else self.narrow(), interpret)
        if columns.bias is not None:
            y += columns.bias[...]
        self.kept.y[_modulo(self.step, 2), at] = y.astype(self.kept.y.dtype)


def _modulo(index: Any, size: int) -> Any:
    """Return ``index`` modulo ``size``, neither below 0: one operation where ``size`` is a power of two."""
    return index & (size - 1) if size & (size - 1) == 0 else jax.lax.rem(index, size)

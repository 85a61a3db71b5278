"""What the warpgroups that multiply do in the Mosaic GPU kernel of `splitq_jax.kernels.gpu_matmul`.

``o`` is `Operands` of references to global memory, ``out`` a reference too; ``across`` and ``along`` are the warpgroup's place in the tile.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from splitq_jax.kernels import hopper
from splitq_jax.kernels.gpu_tile import ROWS, SIDE_STEP, STEP, Memory, Work

_Pieces: TypeAlias = dict[tuple[int, int], Array]  # sums by the row and the token where they begin


def multiply(o: Any, out: Any, memory: Memory, work: Work, across: Any, along: Any) -> None:
    """Compute the sums of one warpgroup, join them with those of its companions, and store them."""
    tile = work.tile
    if work.group is None:
        channels = pl.ds(work.channel + across * tile.rows, tile.rows)
        y = _per_channel(o, memory, work, across, along) * _down(
            work.registers.load_vector(o.scale.at[0, channels], hopper.ROWS), tile.tokens
        )
    else:
        y = _per_group(memory, work, work.group, across, along)
    y = _side(o, memory, work, across, along, y)
    places = [(i, j) for i in range(0, tile.rows, ROWS) for j in range(0, tile.tokens, tile.chunk)]
    pieces = {(i, j): y[i : i + ROWS, j : j + tile.chunk] for i, j in places}
    if tile.along == 1:
        _store(o, out, memory, work, across, pieces)
        return

    def part(other: Any, piece: tuple[int, int]) -> Any:
        row, token = piece
        return memory.sums.at[other, across, pl.ds(row, ROWS), pl.ds(token, tile.chunk)]

    @pl.when(along > 0)
    def _() -> None:
        for piece, y in pieces.items():
            part(along - 1, piece)[...] = y
        plgpu.barrier_arrive(memory.summed.at[across])

    others = range(tile.along - 1)

    @pl.when(along == 0)
    def _() -> None:
        plgpu.barrier_wait(memory.summed.at[across])
        total = {
            piece: sum((work.registers.load(part(other, piece), hopper.ACCUMULATOR, optimized=False) for other in others), y)
            for piece, y in pieces.items()
        }
        _store(o, out, memory, work, across, total)


def _per_channel(o: Any, memory: Memory, work: Work, across: Any, along: Any) -> Float[Array, "R T"]:
    """Sum products over this warpgroup's steps, and rescale them by token."""
    tile, is_integer = work.tile, memory.x.dtype == jnp.int8

    def products(accumulator: Any) -> None:
        def step(slot: Any) -> None:
            work.registers.wgmma(accumulator, _weights(memory, work, slot, across), memory.x.at[slot])
            work.registers.wgmma_wait()

        _steps(memory.full, memory.empty, work.slots, work.steps, tile.along, along, 0, step)

    sums = work.registers.summed((tile.rows, tile.tokens), jnp.int32 if is_integer else jnp.float32, products)
    if not is_integer:
        return sums
    y = (sums >> (8 - work.bits)).astype(jnp.float32)  # exact: the operand's codes are multiples of this power of two
    token_scale = work.registers.load_vector(o.token_scale.at[pl.ds(work.token, tile.tokens)], hopper.COLUMNS)
    return y * lax.broadcast_in_dim(token_scale, y.shape, (1,))


def _per_group(memory: Memory, work: Work, group: int, across: Any, along: Any) -> Float[Array, "R T"]:
    """Sum products group by group, each rescaled before it joins the sum."""
    tile = work.tile
    width = min(STEP, group)

    def step(slot: Any, y: Array) -> Array:
        weights = _weights(memory, work, slot, across)
        for i in range(STEP // width):
            columns = slice(i * width, (i + 1) * width)

            def products(accumulator: Any, columns: slice = columns) -> None:
                work.registers.wgmma(accumulator, weights[:, columns], memory.x.at[slot, :, columns])

            scale = work.registers.load_vector(memory.scale.at[slot, i, pl.ds(across * tile.rows, tile.rows)], hopper.ROWS)
            y += work.registers.summed((tile.rows, tile.tokens), jnp.float32, products) * _down(scale, tile.tokens)
        return y

    start = work.registers.zeros((tile.rows, tile.tokens))
    return _steps(memory.full, memory.empty, work.slots, work.steps, tile.along, along, 0, step, start)


def _side(o: Any, memory: Memory, work: Work, across: Any, along: Any, y: Float[Array, "R T"]) -> Float[Array, "R T"]:
    """Add the narrow product to the sums, in the same registers.

    A segment's scale is ``m 2^e`` per channel with m in [1, 2): the power joins the codes, exactly, and the sums are divided by m before
    and multiplied by m after, so there need not be a second accumulator.
    """
    tile, before = work.tile, 0
    rows = pl.ds(across * tile.rows, tile.rows)
    channels = pl.ds(work.channel + across * tile.rows, tile.rows)
    for number, count in enumerate(work.side):
        power = mantissa = None
        if number < len(o.side_scale):
            power, mantissa = power_and_mantissa(work.registers.load_vector(o.side_scale[number].at[0, channels], hopper.ROWS))

        def products(accumulator: Any, power: Any = power, count: int = count, before: int = before) -> None:
            def step(slot: Any) -> None:
                words = work.registers.load(memory.words.at[slot, rows], hopper.plane_layout(2))
                codes = work.registers.bfloat16_operand((words,), 4)
                operand = codes if power is None else codes * _down(power.astype(jnp.bfloat16), SIDE_STEP)
                work.registers.wgmma(accumulator, operand, memory.side.at[slot])
                work.registers.wgmma_wait()

            rings = memory.side_full, memory.side_empty, work.side_slots
            _steps(*rings, work.side_steps(count), tile.along, along, before, step)

        if mantissa is not None:
            y = work.registers.accumulated(y * _down(1 / mantissa, tile.tokens), products) * _down(mantissa, tile.tokens)
        else:
            y = work.registers.accumulated(y, products)
        before += count
    return y


def power_and_mantissa(scale: Float[Array, " R"]) -> tuple[Float[Array, " R"], Float[Array, " R"]]:
    """Write float32 scales as powers of two times mantissas in [1, 2), exactly."""
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    power, mantissa = bits & -0x00800000, bits & 0x007FFFFF | 0x3F800000  # sign and exponent; fraction
    return lax.bitcast_convert_type(power, jnp.float32), lax.bitcast_convert_type(mantissa, jnp.float32)


def _steps(
    full: Any, empty: Any, slots: int, count: Any, companions: int, mine: Any, before: int, body: Callable[..., Any], *start: Any
) -> Any:
    """Run ``body(slot, *carry)`` on every ``companions``-th filled slot of a ring, and give the slots back."""
    offset = lax.rem(mine + companions - before % companions, companions)  # the first of these steps that is this warpgroup's

    def step(i: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        slot = lax.rem(before + offset + i * companions, slots)
        plgpu.barrier_wait(full.at[slot])
        result = body(slot, *carry)
        plgpu.barrier_arrive(empty.at[slot])
        return (result,) if carry else ()

    done = lax.fori_loop(0, lax.div(count - offset + companions - 1, companions), step, start)
    return done[0] if start else None


def _weights(memory: Memory, work: Work, slot: Any, across: Any) -> Array:
    rows = pl.ds(across * work.tile.rows, work.tile.rows)
    planes = tuple(
        work.registers.load(plane.at[slot, rows], hopper.plane_layout(words), optimized=words > 1)
        for words, plane in zip(hopper.lane_words(work.bits), memory.planes, strict=True)
    )
    expand = work.registers.int8_operand if memory.x.dtype == jnp.int8 else work.registers.bfloat16_operand
    return expand(planes, work.bits)


def _down(vector: Float[Array, " R"], tokens: int) -> Float[Array, "R T"]:
    return lax.broadcast_in_dim(vector, (*vector.shape, tokens), (0,))


def _channels(work: Work, across: Any, first: int) -> Any:
    return pl.ds(work.channel + across * work.tile.rows + first, ROWS)


def _store(o: Any, out: Any, memory: Memory, work: Work, across: Any, pieces: _Pieces) -> None:
    """Add the bias and store, piece by piece."""
    for i, ((row, token), y) in enumerate(pieces.items()):
        channels = _channels(work, across, row)
        if o.bias is not None:
            first = jnp.where(work.split == 0, 1.0, 0.0).astype(jnp.float32)
            y += _down(work.registers.load_vector(o.bias.at[channels], hopper.ROWS) * first, work.tile.chunk)  # noqa: PLW2901
        if i >= 2:
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        staged = memory.out.at[across, i % 2]
        work.registers.store_transposed(staged, y.astype(out.dtype))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, out.at[work.split, pl.ds(work.token + token, work.tile.chunk), channels])
    plgpu.wait_smem_to_gmem(0)

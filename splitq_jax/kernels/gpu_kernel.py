"""The Mosaic GPU kernel of `splitq_jax.kernels.gpu_matmul`: a thread block's share, its shared memory, and the warpgroup that copies.

``o`` is `Operands` of references to global memory, ``out`` a reference too.
"""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from splitq_jax.kernels import hopper
from splitq_jax.kernels.fragment import PLANES
from splitq_jax.kernels.gpu_products import multiply
from splitq_jax.kernels.gpu_tile import ROWS, SHARED_BYTES, SIDE_STEP, STEP, Memory, Tile, Work


def kernel(o: Any, out: Any, *, bits: int, group: int | None, tile: Tile, registers: Any) -> None:
    """Multiply: the body that every warpgroup of every thread block runs.

    Args:
      o: references in global memory.
      out: ``(splits, M, N)``.
      bits: of the codes.
      group: input channels that share a scale, None where each output channel has one scale.
      tile: divides the operands.
      registers: see `Work`.
    """
    slots, side_slots = _slots(o, out, bits, group, tile)
    work = _share(o, bits, group, tile, slots, side_slots, registers)
    warpgroup = lax.axis_index("warpgroup")
    multiplying = tile.across * tile.along

    def scope(memory: Memory) -> None:
        # a small tile needs few registers; to claim many would keep a second thread block off the processor
        claims = tile.along == 1

        @pl.when(warpgroup == multiplying)
        def _() -> None:
            if claims:
                plgpu.set_max_registers(40, action="decrease")
            _copy(o, memory, work)

        @pl.when(warpgroup < multiplying)
        def _() -> None:
            if claims:
                plgpu.set_max_registers(232, action="increase")
            multiply(o, out, memory, work, lax.rem(warpgroup, tile.across), lax.div(warpgroup, tile.across))

    pl.run_scoped(scope, _memory(o, out, work), collective_axes="warpgroup")


def _slots(o: Any, out: Any, bits: int, group: int | None, tile: Tile) -> tuple[int, int]:
    """Return how many slots the rings have: what hides the memory's latency, or as many as fit."""
    side_slots = 0 if o.side is None else max(2, tile.along)
    slot_bytes = STEP * (tile.tokens * o.x.dtype.itemsize + tile.channels * bits // 8)
    if group is not None:
        slot_bytes += 4 * tile.channels * max(1, STEP // group)
    other_bytes = side_slots * SIDE_STEP * (2 * tile.tokens + tile.channels // 2)
    other_bytes += 2 * tile.across * tile.chunk * ROWS * out.dtype.itemsize
    other_bytes += 4 * (tile.along - 1) * tile.channels * tile.tokens + 4096
    slots = min(8 if tile.along == 1 else 32, (SHARED_BYTES - other_bytes) // slot_bytes) // tile.along * tile.along
    return max(slots, tile.along), side_slots


def _share(o: Any, bits: int, group: int | None, tile: Tile, slots: int, side_slots: int, registers: Any) -> Work:
    """Cut the product: blocks that run at a time share their output channels, so weights are read from memory once."""
    block = lax.axis_index("block")
    token_tiles, channel_tiles = o.x.shape[0] // tile.tokens, o.planes[0].shape[1] // tile.channels
    token, block = lax.rem(block, token_tiles), lax.div(block, token_tiles)
    channel, split = lax.rem(block, channel_tiles), lax.div(block, channel_tiles)
    steps = o.x.shape[1] // STEP
    first, last = lax.div(split * steps, tile.splits), lax.div((split + 1) * steps, tile.splits)
    side = tuple(words.shape[0] for words in o.side_words)
    token, channel = token * tile.tokens, channel * tile.channels
    return Work(bits, tile, group, slots, side_slots, token, channel, split, first, last - first, side, registers)


def _memory(o: Any, out: Any, work: Work) -> Memory:
    tile, slots, side_slots = work.tile, work.slots, work.side_slots
    ring = Memory(
        x=plgpu.SMEM((slots, tile.tokens, STEP), o.x.dtype, transforms=hopper.tiling(o.x.dtype, min(STEP, work.group or STEP))),
        planes=tuple(
            plgpu.SMEM((slots, tile.channels, STEP * field // 32), jnp.int32, transforms=hopper.tiling(jnp.int32, 4 * words))
            for field, words in zip(PLANES[work.bits], hopper.lane_words(work.bits), strict=True)
        ),
        full=plgpu.Barrier(num_arrivals=1 + len(o.planes) + (work.group is not None), num_barriers=slots),
        empty=plgpu.Barrier(num_arrivals=tile.across, num_barriers=slots),
        out=plgpu.SMEM((tile.across, 2, tile.chunk, ROWS), out.dtype, transforms=hopper.tiling(out.dtype, ROWS)),
    )
    if work.group is not None:
        ring = ring._replace(scale=plgpu.SMEM((slots, max(1, STEP // work.group), tile.channels), jnp.float32))
    if side_slots:
        ring = ring._replace(
            side=plgpu.SMEM((side_slots, tile.tokens, SIDE_STEP), jnp.bfloat16, transforms=hopper.tiling(jnp.bfloat16, SIDE_STEP)),
            words=plgpu.SMEM((side_slots, tile.channels, SIDE_STEP // 8), jnp.int32, transforms=hopper.tiling(jnp.int32, 8)),
            side_full=plgpu.Barrier(num_arrivals=2, num_barriers=side_slots),
            side_empty=plgpu.Barrier(num_arrivals=tile.across, num_barriers=side_slots),
        )
    if tile.along > 1:
        ring = ring._replace(
            sums=plgpu.SMEM((tile.along - 1, tile.across, tile.rows, tile.tokens), jnp.float32),
            summed=plgpu.Barrier(num_arrivals=tile.along - 1, num_barriers=tile.across),
        )
    return ring


def _copy(o: Any, memory: Memory, work: Work) -> None:
    """Fill the rings as their slots fall empty."""
    tokens, channels = pl.ds(work.token, work.tile.tokens), pl.ds(work.channel, work.tile.channels)

    def main(i: Any, _: None) -> None:
        slot, step = lax.rem(i, work.slots), work.first + i
        _wait_when(i >= work.slots, memory.empty.at[slot])
        full = memory.full.at[slot]
        plgpu.copy_gmem_to_smem(o.x.at[tokens, pl.ds(step * STEP, STEP)], memory.x.at[slot], full)
        for plane, words in zip(o.planes, memory.planes, strict=True):
            plgpu.copy_gmem_to_smem(plane.at[step, channels], words.at[slot], full)
        if work.group is not None:
            count = max(1, STEP // work.group)
            group = pl.ds(lax.div(step * STEP, work.group), count)
            plgpu.copy_gmem_to_smem(o.scale.at[group, channels], memory.scale.at[slot], full)

    lax.fori_loop(0, work.steps, main, None)
    before = 0
    for number, words in enumerate(o.side_words):

        def side(i: Any, _: None, words: Any = words, before: int = before) -> None:
            slot = lax.rem(before + i, work.side_slots)
            _wait_when(before + i >= work.side_slots, memory.side_empty.at[slot])
            full = memory.side_full.at[slot]
            plgpu.copy_gmem_to_smem(o.side.at[tokens, pl.ds((before + i) * SIDE_STEP, SIDE_STEP)], memory.side.at[slot], full)
            plgpu.copy_gmem_to_smem(words.at[i, channels], memory.words.at[slot], full)

        lax.fori_loop(0, work.side_steps(work.side[number]), side, None)
        before += work.side[number]
    _drain(memory.empty, work.slots, work.steps)
    if o.side is not None:
        _drain(memory.side_empty, work.side_slots, work.side_steps(sum(work.side)))


def _drain(empty: Any, slots: int, steps: Any) -> None:
    """Wait until what was filled last is read, so that no barrier is left with an arrival that nobody saw."""

    def last(i: Any, _: None) -> None:
        plgpu.barrier_wait(empty.at[lax.rem(i, slots)])

    lax.fori_loop(lax.max(jnp.int32(steps) - slots, 0), jnp.int32(steps), last, None)


def _wait_when(condition: Any, barrier: Any) -> None:
    @pl.when(condition)
    def _() -> None:
        plgpu.barrier_wait(barrier)

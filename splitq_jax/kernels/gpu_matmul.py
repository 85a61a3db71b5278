"""The product of tokens and packed weights on Hopper: one Mosaic GPU kernel for integer and float tokens, prefill and decode.

A thread block computes the transpose of a tile of the result: output channels are the rows of its accumulators, tokens the columns. So the
weights are `wgmma`'s first operand, which registers may hold, and are expanded from packed words on their way to the tensor cores, never
stored expanded. One warpgroup copies (TMA) slots of a ring in shared memory, a block of 128 input channels each; the others multiply. They
lie side by side along the output channels, and with few tokens also deal the blocks of a tile among them and add up their sums at the end.
Where even that leaves processors idle, thread blocks split the input channels and their float32 sums are added by XLA.

    y = 2^-s acc * token scale * channel scale                       integer tokens: acc is exact in int32
    y = sum over groups of rows: acc_group * scale[group]            float tokens
    y += side . codes (* channel scale of that segment) + bias       the site's narrow operand, bfloat16

3-bit codes take 3 bits in memory (`splitq_jax.kernels.fragment`). `wgmma` has no 4-bit type: with 4-bit activations
the gain is the weights' memory, not arithmetic.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from splitq_jax.kernels import hopper, hopper_interpreted
from splitq_jax.kernels.gpu_kernel import kernel
from splitq_jax.kernels.gpu_tile import STEP, Operands, Tile

PROCESSORS = 132  # of an H100 or H200


def token_tile(tokens: int) -> int:
    """Return how many tokens a thread block takes."""
    return next((c for c in (8, 16, 32, 64) if tokens <= c), 128)


def choose_tile(tokens: int, channels: int, width: int, groups: bool, floats: bool = False) -> Tile:
    """Choose by rule, from what an H200 took for tiles of each kind.

    Many tokens: tiles of 128 tokens by 128 or 256 channels, or, where tokens are codes, of 256 by 128, whichever takes less time in all; a
    round of the larger ones takes 1.8 and 1.68 times as long. Scales per group need a second accumulator, so no more than 128 by 128. Few
    tokens: 128 channels, and a second pair of warpgroups along the input channels, to expand weights as fast as memory delivers them; 64
    channels and four warpgroups along where wider tiles would leave half of the processors idle. Tiles too few for all processors split
    the input channels, no less than 16 steps each.

    Args:
      tokens: M.
      channels: N.
      width: K.
      groups: whether the scales are per group of input channels.
      floats: whether the tokens are floats.
    """

    def count(tile: Tile) -> int:
        return -(-tokens // tile.tokens) * -(-channels // tile.channels)

    if tokens > 64:
        costs = {Tile(128, 64, 2, 1, 1): 1.0}  # of a round
        if not groups and channels % 256 == 0:
            costs[Tile(128, 128, 2, 1, 1)] = 1.8
        if not groups and not floats:
            costs[Tile(256, 64, 2, 1, 1)] = 1.68
        tile = min(costs, key=lambda t: costs[t] * -(-count(t) // PROCESSORS))
    else:
        columns = token_tile(tokens)
        tile = Tile(columns, 64, 2, 1 if groups and columns == 64 else 2, 1)  # so many sums do not fit five warpgroups' registers
        if channels % tile.channels or 2 * count(tile) < PROCESSORS:
            tile = Tile(columns, 64, 1, 2 if groups and columns == 64 else 4, 1)
    return replace(tile, splits=max(1, min(PROCESSORS // count(tile), width // (16 * STEP))))


@partial(jax.jit, static_argnames=("bits", "group", "dtype", "tile", "interpret"))  # sites of one shape share a trace
def matmul(
    operands: Operands, bits: int, group: int | None, dtype: DTypeLike, tile: Tile | None = None, interpret: bool = False
) -> Float[Array, "M N"]:
    """Multiply tokens by packed codes; see the module.

    Args:
      operands: ``x`` as wide as the weight's padded input channels, a multiple of 128.
      bits: of the weight's codes.
      group: input channels that share a scale, None where each output channel has one scale.
      dtype: of the result.
      tile: None to choose by rule; interpreted, the whole product is one then.
      interpret: run in Python what a GPU would.
    """
    (m, k), n = operands.x.shape, operands.planes[0].shape[1]
    if tile is None and interpret:  # the interpreter compiles anew for every thread block
        tile = Tile(-(-m // 32) * 32, -(-n // 64) * 64, 1, 1, 1)
    tile = tile or choose_tile(m, n, k, group is not None, floats=operands.token_scale is None)
    padded = _pad(operands, -m % tile.tokens, -n % tile.channels)
    shape = (tile.splits, m + -m % tile.tokens, n + -n % tile.channels)
    out_dtype = jnp.dtype(dtype if tile.splits == 1 else jnp.float32)
    run = plgpu.kernel(
        partial(kernel, bits=bits, group=group, tile=tile, registers=hopper_interpreted if interpret else hopper),
        out_type=jax.ShapeDtypeStruct(shape, out_dtype),
        grid=(tile.splits * (shape[1] // tile.tokens) * (shape[2] // tile.channels),),
        grid_names=("block",),
        num_threads=tile.across * tile.along + 1,
        thread_name="warpgroup",
        compiler_params=hopper.PARAMS,
        interpret=hopper.INTERPRETER if interpret else False,
    )
    y = run(padded)
    y = y[0] if tile.splits == 1 else jnp.sum(y, axis=0).astype(dtype)
    return y[:m, :n]


def _pad(o: Operands, tokens: int, channels: int) -> Operands:
    if not tokens and not channels:
        return o

    def rows(a: Array, count: int) -> Array:
        return jnp.pad(a, ((0, count), *[(0, 0)] * (a.ndim - 1))) if count else a

    def columns(a: Array) -> Array:
        return jnp.pad(a, ((0, 0), (0, channels), *[(0, 0)] * (a.ndim - 2))) if channels else a

    return Operands(
        rows(o.x, tokens),
        tuple(columns(p) for p in o.planes),
        columns(o.scale),
        None if o.token_scale is None else rows(o.token_scale, tokens),
        None if o.side is None else rows(o.side, tokens),
        tuple(columns(w) for w in o.side_words),
        tuple(columns(s) for s in o.side_scale),
        None if o.bias is None else rows(o.bias, channels),
    )

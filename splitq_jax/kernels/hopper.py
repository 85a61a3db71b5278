"""What the GPU kernels ask of Mosaic GPU below the level of arrays: register layouts and the packed operand's expansion.

Everything that differs between JAX versions or that runs on the hardware alone is in this file; `hopper_interpreted` has its functions
with arrays for registers.
"""

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fragmented
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, BFloat16, Float, Int, Shaped

from splitq_jax.kernels.fragment import BLOCK, PLANES, bfloat16_bias, bfloat16_register, fragment_step, int8_register

# registers are addressed lane by lane, which the compiler's automatic layouts (the default from JAX 0.11 on) would only obscure
PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
_NO_INDEX = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # until JAX 0.11
if hasattr(plgpu, "InterpretGPUParams"):
    INTERPRETER = plgpu.InterpretGPUParams()
else:  # until JAX 0.11
    INTERPRETER = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params").InterpretGPUParams()
ROWS = plgpu.Layout.WGMMA.reduce(1)  # a vector along an accumulator's rows
ACCUMULATOR = plgpu.Layout.WGMMA
COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # and along its columns


class _Register:
    """A 32-bit register with Python's bit operators."""

    def __init__(self, value: Any):
        self.value = value

    @staticmethod
    def _constant(x: "int | _Register") -> Any:
        if isinstance(x, _Register):
            return x.value
        i32 = ir.IntegerType.get_signless(32)
        return utils.c(x, i32)

    def __and__(self, other: int) -> Self:
        return type(self)(arith.andi(self.value, self._constant(other)))

    def __or__(self, other: "_Register") -> Self:
        return type(self)(arith.ori(self.value, other.value))

    def __xor__(self, other: "int | _Register") -> Self:
        return type(self)(arith.xori(self.value, self._constant(other)))

    def __lshift__(self, other: int) -> Self:
        return type(self)(arith.shli(self.value, self._constant(other)))

    def __rshift__(self, other: int) -> Self:
        return type(self)(arith.shrui(self.value, self._constant(other)))


def lane_words(bits: int) -> tuple[int, ...]:
    """Return how many words of each plane a lane holds of a row and a block."""
    return tuple(BLOCK[bits] * field // 128 for field in PLANES[bits])


def plane_layout(words: int) -> Any:
    """Describe the registers of a plane: of every block the four lanes that share a row hold ``words`` words each, side by side."""
    tiles = ((64, 4 * words), (16, 4 * words), (8, 4 * words), (words,))
    return plgpu.Layout.TILED(plgpu.Tiling(tiles), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1)


def operand_registers(words: list[np.ndarray], bits: int, elements: int) -> np.ndarray:
    """Arrange the registers of a plane's layout, expanded, as those of `wgmma`'s first operand.

    Args:
      words: of each plane its registers, each a list of `Word`s; axes: rows / 64, blocks, and what the layout makes of a tile.
      bits: of the codes.
      elements: E, 4 for an int8 operand and 2 for a bfloat16 one.
    """
    register, per_block = (int8_register, bfloat16_register)[elements == 2], BLOCK[bits] // (4 * elements)
    tiles, blocks, *inner = words[0].shape
    registers = np.empty((tiles, per_block * blocks, *inner), dtype=object)
    for tile, block, *place in np.ndindex(words[0].shape):
        lane = [plane[(tile, block, *place)] for plane in words]
        for r in range(per_block):
            registers[(tile, per_block * block + r, *place)] = register(lane, bits, r)
    return registers


def _expand(planes: tuple[Int[Array, "R _"], ...], bits: int, dtype: Any) -> Shaped[Array, "R K"]:
    elements = 4 // jnp.dtype(dtype).itemsize
    counts = lane_words(bits)
    shape = (planes[0].shape[0], fragment_step(planes, bits))
    layout = plgpu.Layout.WGMMA_8BIT if elements == 4 else plgpu.Layout.WGMMA

    def build(_: Any, *arrays: Any) -> Any:
        element = ir.IntegerType.get_signless(8) if elements == 4 else ir.BF16Type.get()
        vector = ir.VectorType.get((elements,), element)
        words = [_map(partial(_lane_words, n), a.registers) for a, n in zip(arrays, counts, strict=True)]
        registers = _map(lambda word: utils.bitcast(word.value, vector), operand_registers(words, bits, elements))
        return fragmented.FragmentedArray(
            _registers=registers, _layout=layout.to_mgpu(), _is_signed=True if elements == 4 else None
        )

    arg_types, return_type = tuple(plane_layout(n) for n in counts), plgpu.ShapeDtypeStruct(shape, dtype, layout=layout)
    expanded: Array = plgpu.inline_mgpu(arg_types=arg_types, return_type=return_type)(build)(*planes)
    return expanded


def _map(function: Callable[[Any], Any], registers: np.ndarray) -> np.ndarray:
    out = np.empty(registers.shape, dtype=object)
    for index, register in np.ndenumerate(registers):
        out[index] = function(register)
    return out


def _lane_words(count: int, vector: Any) -> list[_Register]:
    i32 = ir.IntegerType.get_signless(32)
    return [_Register(utils.bitcast(utils.vector_slice(vector, slice(i, i + 1)), i32)) for i in range(count)]


def int8_operand(planes: tuple[Int[Array, "R _"], ...], bits: int) -> Int[Array, "R K"]:
    """Expand planes in registers to int8 ``code * 2^(8 - bits)``, laid out as `wgmma`'s first operand."""
    return _expand(planes, bits, jnp.int8)


def bfloat16_operand(planes: tuple[Int[Array, "R _"], ...], bits: int) -> BFloat16[Array, "R K"]:
    """Expand planes in registers to bfloat16 codes, laid out as `wgmma`'s first operand."""
    return _expand(planes, bits, jnp.bfloat16) - jnp.bfloat16(bfloat16_bias(bits))


def load(ref: Any, layout: Any, optimized: bool = True) -> Array:
    """Load an array into registers."""
    return plgpu.load(ref, *_NO_INDEX, layout=layout, optimized=optimized)


def load_vector(ref: Any, layout: Any) -> Array:
    """Load a short vector into registers as float32; there is no vectorized path for these."""
    return load(ref, layout, optimized=False).astype(jnp.float32)


def zeros(shape: tuple[int, int]) -> Float[Array, "N M"]:
    """Return float32 zeros in an accumulator's registers."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), ACCUMULATOR)


def store_transposed(ref: Any, values: Float[Array, "N M"]) -> None:
    """Store 16-bit values from an accumulator's registers to ``ref`` ``(M, N)``: two by two transposes inside lanes' pairs."""
    ref.transpose((1, 0))[...] = plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)


def store_rows(ref: Any, values: Shaped[Array, "64 C"], columns: int) -> None:
    """Store the first columns of this warpgroup's rows to a vector in which all warpgroups' rows lie one after the other.

    What lies beyond the vector's end is left out.
    """

    def build(_: Any, ref: Any, values: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        (size,), pointer = ir.MemRefType(ref.type).shape, utils.memref_ptr(ref)
        # a register holds two neighbours, which lie within a row together or not at all where rows are even
        together = 2 if columns % 2 == 0 else 1
        stored = ir.IntegerType.get_signless(utils.bitwidth(values.mlir_dtype) * together)
        first = arith.muli(utils.warpgroup_idx(), utils.c(values.shape[0], i32))
        indices = zip(np.ndindex(values.registers.shape), values.layout.thread_idxs(values.shape), strict=True)
        starts: dict[tuple[int, ...], tuple[Any, Any]] = {}  # of the first tile of 8 columns, by the register
        for (rows, tile, *inner), index in indices:
            if (rows, *inner) not in starts:
                row, column = (arith.index_cast(i32, i) for i in index)
                place = arith.addi(arith.muli(arith.addi(first, row), utils.c(columns, i32)), column)
                starts[rows, *inner] = place, column
            place, column = starts[rows, *inner]
            for at in range(8 * tile, 8 * tile + 2, together):
                inside = _less(place, size - at)
                if 8 * tile + 8 > columns:
                    inside = arith.andi(inside, _less(column, columns - at))
                with utils.when(inside):
                    register = values.registers[(rows, tile, *inner)]
                    word = utils.bitcast(utils.vector_slice(register, slice(at % 8, at % 8 + together)), stored)
                    to = utils.getelementptr(pointer, [place], values.mlir_dtype)
                    llvm.store(word, utils.getelementptr(to, [at], values.mlir_dtype))

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ACCUMULATOR))(build)(ref, values)


def _less(x: Any, bound: int) -> Any:
    return arith.cmpi(arith.CmpIPredicate.slt, x, utils.c(bound, ir.IntegerType.get_signless(32)))


def accumulated(start: Float[Array, "N M"], body: Callable[[Any], None]) -> Float[Array, "N M"]:
    """Let ``body`` add products to an accumulator that starts from ``start``, in the same registers."""
    return pl.run_state(body)(plgpu.WGMMAAccumulatorRef.init(start))


def wgmma(accumulator: Any, weights: Array, tokens: Any) -> None:
    """Start to add ``weights . tokens^T`` to an accumulator; the tokens ``(M, K)`` are read from shared memory."""
    plgpu.wgmma(accumulator, weights, tokens.transpose((1, 0)))


def wgmma_rows(accumulator: Any, left: Array, right: Any) -> None:
    """Start to add ``left . right`` to an accumulator; the rows ``(K, N)`` of ``right`` are read from shared memory."""
    plgpu.wgmma(accumulator, left, right)


def wgmma_wait() -> None:
    """Wait for the products that were started."""
    plgpu.wgmma_wait(0)


def summed(shape: tuple[int, int], dtype: Any, body: Callable[[Any], None]) -> Array:
    """Let ``body`` add products to an accumulator that starts from zero."""

    def scope(accumulator: Any) -> Array:
        body(accumulator)
        return accumulator[...]

    return pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef(shape, dtype))


def tiling(dtype: Any, columns: int) -> tuple[Any, ...]:
    """Lay out a shared-memory tile of ``columns`` columns such that neither TMA nor `wgmma` meets bank conflicts."""
    size = jnp.dtype(dtype).itemsize
    swizzle = min(128, columns * size)
    if swizzle < 32:
        return ()  # rows of 16 bytes follow each other without conflicts
    return (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))

"""`splitq_jax.kernels.hopper` for the interpreter: the same functions, with arrays in the place of registers and their layouts."""

from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int, Shaped

from splitq_jax.kernels.fragment import unpack_fragments


def int8_operand(planes: tuple[Int[Array, "R _"], ...], bits: int) -> Int[Array, "R K"]:
    """Expand planes to ``code * 2^(8 - bits)``."""
    return unpack_fragments(tuple(p[None] for p in planes), bits, 4).T * jnp.int8(2 ** (8 - bits))


def bfloat16_operand(planes: tuple[Int[Array, "R _"], ...], bits: int) -> BFloat16[Array, "R K"]:
    """Expand planes to codes."""
    return unpack_fragments(tuple(p[None] for p in planes), bits, 2).T.astype(jnp.bfloat16)


def load(ref: Any, layout: Any, optimized: bool = True) -> Array:
    """Load an array."""
    return ref[...]


def load_vector(ref: Any, layout: Any) -> Float[Array, " N"]:
    """Load a vector as float32."""
    return ref[...].astype(jnp.float32)


def zeros(shape: tuple[int, int]) -> Float[Array, "N M"]:
    """Return float32 zeros."""
    return jnp.zeros(shape, jnp.float32)


def store_transposed(ref: Any, values: Float[Array, "N M"]) -> None:
    """Store the transpose."""
    ref[...] = values.T


def store_rows(ref: Any, values: Shaped[Array, "64 C"], columns: int) -> None:
    """Store the first columns of this warpgroup's rows to a vector."""
    flat, size = values[:, :columns].reshape(-1), ref.shape[0]
    for warpgroup in range(-(-size // flat.size)):
        first = warpgroup * flat.size
        count = min(flat.size, size - first)

        @pl.when(lax.axis_index("warpgroup") == warpgroup)
        def _(first: int = first, count: int = count) -> None:
            ref.at[pl.ds(first, count)][...] = flat[:count]


def wgmma(accumulator: Any, weights: Array, tokens: Any) -> None:
    """Add ``weights . tokens^T`` to an accumulator."""
    accumulator[...] += jnp.dot(weights, tokens[...].T, preferred_element_type=accumulator.dtype)


def wgmma_rows(accumulator: Any, left: Array, right: Any) -> None:
    """Add ``left . right`` to an accumulator."""
    accumulator[...] += jnp.dot(left, right[...], preferred_element_type=accumulator.dtype)


def wgmma_wait() -> None:
    """Nothing is in flight."""


def accumulated(start: Float[Array, "N M"], body: Callable[[Any], None]) -> Float[Array, "N M"]:
    """Let ``body`` add products to ``start``."""

    def scope(accumulator: Any) -> Array:
        accumulator[...] = start
        body(accumulator)
        return accumulator[...]

    return pl.run_scoped(scope, plgpu.REGS(start.shape, start.dtype))


def summed(shape: tuple[int, int], dtype: Any, body: Callable[[Any], None]) -> Array:
    """Let ``body`` add products to zero."""
    return accumulated(jnp.zeros(shape, dtype), body)

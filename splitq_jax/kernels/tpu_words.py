"""In a TPU kernel: packed words to the operands of a product, and the product."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, DTypeLike, Int

from splitq_jax.kernels import tiles
from splitq_jax.numerics import FLOAT_BITS

UPPER, LOWEST = -0x11111112, 0x11111111  # of each nibble, see `splitq_jax.packing`


def nibbles(words: Int[Array, "W n"], bits: int) -> Int[Array, "V n"]:
    """Return words of eight 4-bit integers: the codes, or for 3 bits twice the codes."""
    if bits == 4:
        return words
    slabs = words.reshape(-1, 24, words.shape[1])  # a plane is a tile of 8 words
    planes = [slabs[:, 8 * p : 8 * p + 8] for p in range(3)]
    last = ((planes[0] & LOWEST) << 1) | ((planes[1] & LOWEST) << 2) | ((planes[2] & LOWEST) << 3)
    return jnp.concatenate([*(p & UPPER for p in planes), last], axis=1).reshape(-1, words.shape[1])


def expand(words: Array, bits: int, dtype: DTypeLike) -> Array:
    """Return a block of codes (for 3 bits twice the codes) as the product takes them."""
    codes = words if bits == 8 else pltpu.bitcast(nibbles(words, bits), jnp.int4)
    return codes if codes.dtype == dtype else codes.astype(dtype)


def dot(x: Array, w: Array, interpret: bool) -> Array:
    """Multiply, accumulated in int32 or float32, whatever precision the user asks of JAX's own products."""
    if x.dtype == jnp.int4 and interpret:  # XLA on CPU has no product of int4
        x, w = x.astype(jnp.int8), w.astype(jnp.int8)
    elif x.dtype == jnp.bfloat16 and interpret:  # nor all of bfloat16's
        x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    wide = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    # operands are what the MXU takes: asked for more ("highest"), the compiler refuses integers and bfloat16
    precision = jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=wide)


def rounded(x: Array, interpret: bool) -> Array:
    """Round to bfloat16."""
    if interpret:  # XLA on CPU would leave a rounding to bfloat16 and back out
        x = jax.lax.reduce_precision(x, 8, 7)
    return x.astype(jnp.bfloat16)


def operand_type(on: tiles.Chip, a_bits: int) -> Any:
    """Return the type in which activations of so many bits meet the weight."""
    if a_bits >= FLOAT_BITS:
        return jnp.bfloat16
    if a_bits > 4:
        return jnp.int8
    return jnp.float8_e4m3fn if on.generation >= 7 else jnp.int4


def stored_type(a_bits: int) -> Any:
    """Return the type in which activations of so many bits come from HBM."""
    return jnp.bfloat16 if a_bits >= FLOAT_BITS else jnp.int8 if a_bits > 4 else jnp.int4


def pad_rows(x: Array, rows: int) -> Array:
    """Append zero rows up to ``rows``."""
    return x if x.shape[0] == rows else jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))

"""Keys and values of one block, preallocated for S tokens: in the model's floats, or as int8 codes."""

from typing import Any, Protocol

import jax.numpy as jnp
from flax import struct
from jax.lax import dynamic_update_slice
from jaxtyping import Array, Float, Int

from splitq_jax.numerics import encode, scale_of

KV_BITS = (8, 16)  # 16: floats, unrounded


class Cache(Protocol):
    """What a block needs of its cache."""

    def write(self, k: Float[Array, "B L G d"], v: Float[Array, "B L G d"], at: Int[Array, ""] | int) -> "Cache":
        """Return the cache with L tokens from place ``at`` on."""

    def read(self) -> tuple[Float[Array, "B S G d"], Float[Array, "B S G d"]]:
        """Return all keys and values."""


@struct.dataclass
class KVCache:
    """Keys and values in the model's floats."""

    k: Float[Array, "B S G d"]
    v: Float[Array, "B S G d"]

    def write(self, k: Float[Array, "B L G d"], v: Float[Array, "B L G d"], at: Int[Array, ""] | int) -> "KVCache":
        """Return the cache with L tokens from place ``at`` on."""
        return KVCache(_put(self.k, k, at), _put(self.v, v, at))

    def read(self) -> tuple[Float[Array, "B S G d"], Float[Array, "B S G d"]]:
        """Return all keys and values."""
        return self.k, self.v


@struct.dataclass
class Int8KVCache:
    """Codes with a scale per token and head, ``absmax / 127``: what is read lies within half a scale of what was written."""

    k: Int[Array, "B S G d"]
    v: Int[Array, "B S G d"]
    k_scale: Float[Array, "B S G 1"]
    v_scale: Float[Array, "B S G 1"]

    def write(self, k: Float[Array, "B L G d"], v: Float[Array, "B L G d"], at: Int[Array, ""] | int) -> "Int8KVCache":
        """Return the cache with L tokens from place ``at`` on."""
        a, b = scale_of(k, 8), scale_of(v, 8)
        return Int8KVCache(
            *(_put(self.k, encode(k, a, 8), at), _put(self.v, encode(v, b, 8), at)),
            *(_put(self.k_scale, a, at), _put(self.v_scale, b, at)),
        )

    def read(self) -> tuple[Float[Array, "B S G d"], Float[Array, "B S G d"]]:
        """Return all keys and values."""
        dtype = self.k_scale.dtype
        return self.k.astype(dtype) * self.k_scale, self.v.astype(dtype) * self.v_scale


def empty(shape: tuple[int, int, int, int], dtype: Any, bits: int = 16) -> KVCache | Int8KVCache:
    """Return a cache of ``shape`` (B, S, G, d), for values of ``dtype``, kept in ``bits`` bits."""
    if bits == 8:
        scales = jnp.ones((*shape[:3], 1), dtype)
        return Int8KVCache(jnp.zeros(shape, jnp.int8), jnp.zeros(shape, jnp.int8), scales, scales)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def _put(cache: Array, new: Array, at: Int[Array, ""] | int) -> Array:
    zero = jnp.zeros((), jnp.int32)
    return dynamic_update_slice(cache, new.astype(cache.dtype), (zero, jnp.asarray(at, jnp.int32), zero, zero))

"""`QTensor`: a matrix held as packed integer codes and scales."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from splitq_jax.numerics import FLOAT_BITS, encode, scale_of
from splitq_jax.packing import pack, unpack


@struct.dataclass
class QTensor:
    """A ``(K, N)`` matrix: ``decode = codes * scale``.

    Attributes:
      words: packed codes (see `splitq_jax.packing`); at 16 bits the values themselves.
      scale: ``(1, N)``, one per column, or ``(K, 1)``, one per row; None at 16 bits.
      bits: 2, 3, 4, 8 or 16.
      rows: K, which the padded words do not tell.
    """

    words: tuple[Array, ...]
    scale: Float[Array, "_ _"] | None
    bits: int = struct.field(pytree_node=False)
    rows: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, int]:
        """``(K, N)``."""
        return self.rows, self.words[0].shape[1]

    def codes(self) -> Int[Array, "K N"]:
        """Return the int8 codes."""
        return unpack(self.words, self.bits, self.rows)

    def decode(self) -> Float[Array, "K N"]:
        """Return the float matrix."""
        if self.scale is None:
            return self.words[0]
        return self.codes().astype(self.scale.dtype) * self.scale


@partial(jax.jit, static_argnames=("bits", "axis"))
def quantize_matrix(w: Float[Array, "K N"], bits: int, clip: Float[Array, "2 N"] | None = None, axis: int = 0) -> QTensor:
    """Round a matrix to nearest, one scale for all entries along ``axis`` (0: per column, 1: per row)."""
    if bits >= FLOAT_BITS:
        return QTensor((w,), None, bits, w.shape[0])
    scale = scale_of(w, bits, clip, axis)
    return from_codes(encode(w, scale, bits), scale, bits)


def from_codes(codes: Int[Array, "K N"], scale: Float[Array, "_ _"], bits: int) -> QTensor:
    """Pack int8 codes with their scales."""
    return QTensor(pack(codes, bits), scale, bits, codes.shape[0])


def integer_dot(a: Int[Array, "*B K"], b: Int[Array, "K N"]) -> Int[Array, "*B N"]:
    """Multiply int8 codes exactly, accumulated in int32."""
    return jax.lax.dot_general(a, b, (((a.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.int32)

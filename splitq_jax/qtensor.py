"""`QTensor`: a matrix held as packed integer codes and scales."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from splitq_jax.errors import InputError
from splitq_jax.kernels.fragment import fragment_rows, unpack_fragments
from splitq_jax.numerics import FLOAT_BITS, encode, scale_of
from splitq_jax.packing import pack, padded_rows, unpack


@struct.dataclass
class QTensor:
    """A ``(K, N)`` matrix: ``decode = codes * scale``.

    Attributes:
      words: packed codes (see `splitq_jax.packing`); at 16 bits the values themselves.
      scale: ``(1, N)``, one per column, ``(K, 1)``, one per row, or ``(K/g, N)``, one per column and group of g rows; None at 16 bits.
      bits: 2, 3, 4, 8 or 16.
      rows: K, which the padded words do not tell.
      elements: 0 for words as `splitq_jax.packing` lays them out; 4 or 2 for those that GPUs read, an int8 or a bfloat16 operand's
        (`splitq_jax.kernels.fragment`: one or two planes, ``(S, N, _)``).
    """

    words: tuple[Array, ...]
    scale: Float[Array, "_ _"] | None
    bits: int = struct.field(pytree_node=False)
    rows: int = struct.field(pytree_node=False)
    elements: int = struct.field(pytree_node=False, default=0)

    @property
    def shape(self) -> tuple[int, int]:
        """``(K, N)``."""
        return self.rows, self.words[0].shape[1]

    @property
    def padded_rows(self) -> int:
        """K with the rows of zero codes that fill the words."""
        if self.elements:
            return fragment_rows(self.words, self.bits)
        words: int = self.words[0].shape[0]
        return words if self.bits >= 8 else words * 32 // self.bits

    @property
    def group(self) -> int:
        """g, the rows that share a scale: K for scales per column."""
        return self.rows if self.scale is None else self.rows // self.scale.shape[0]

    def codes(self) -> Int[Array, "K N"]:
        """Return the int8 codes."""
        if self.elements:
            return unpack_fragments(self.words, self.bits, self.elements)[: self.rows]
        return unpack(self.words, self.bits, self.rows)

    def decode(self) -> Float[Array, "K N"]:
        """Return the float matrix."""
        if self.scale is None:
            return self.words[0]
        scale = self.scale
        if 1 < scale.shape[0] < self.rows:
            scale = jnp.repeat(scale, self.group, axis=0)
        return self.codes().astype(scale.dtype) * scale


@partial(jax.jit, static_argnames=("bits", "multiple", "group"))
def quantize_columns(
    w: Float[Array, "K N"], bits: int, clip: Float[Array, "2 G N"] | None = None, multiple: int = 1, group: int | None = None
) -> QTensor:
    """Round a matrix to nearest, one scale for each column, or for each column and ``group`` rows.

    Args:
      w: the matrix.
      bits: of the codes.
      clip: LWC's factors; None for no clipping.
      multiple: of rows, to which the words are padded.
      group: rows that share a scale; None: all.

    Raises:
      InputError: a group that does not divide the rows.
    """
    if bits >= FLOAT_BITS:
        return QTensor((w,), None, bits, w.shape[0])
    scale = column_scales(w, bits, clip, group)
    codes = encode(in_groups(w, group), scale[:, None], bits)
    return from_codes(codes.reshape(w.shape), scale, bits, multiple)


@partial(jax.jit, static_argnames=("bits", "multiple"))
def quantize_rows(w: Float[Array, "K N"], bits: int, multiple: int = 1) -> QTensor:
    """Round a matrix to nearest, one scale for each row; see `quantize_columns`."""
    if bits >= FLOAT_BITS:
        return QTensor((w,), None, bits, w.shape[0])
    scale = scale_of(w, bits, axis=1)
    return from_codes(encode(w, scale, bits), scale, bits, multiple)


def column_scales(w: Float[Array, "K N"], bits: int, clip: Float[Array, "2 G N"] | None, group: int | None) -> Float[Array, "G N"]:
    """Return the steps of `quantize_columns`.

    Raises:
      InputError: a group that does not divide the rows.
    """
    return scale_of(in_groups(w, group), bits, None if clip is None else clip[:, :, None], axis=1)[:, 0]


def in_groups(w: Float[Array, "K N"], group: int | None) -> Float[Array, "G g N"]:
    """Cut a matrix into groups of rows, None: into one.

    Raises:
      InputError: a group that does not divide the rows.
    """
    if group is not None and (group < 1 or w.shape[0] % group):
        raise InputError(f"groups of {group} rows do not divide {w.shape[0]} rows; choose a divisor")
    return w.reshape(-1, group or w.shape[0], w.shape[1])


def from_codes(codes: Int[Array, "K N"], scale: Float[Array, "_ _"], bits: int, multiple: int = 1) -> QTensor:
    """Pack int8 codes with their scales."""
    return QTensor(pack(codes, bits, multiple), scale, bits, codes.shape[0])


def pad_words(w: QTensor, multiple: int) -> QTensor:
    """Return the same matrix with its words padded to a ``multiple`` of rows: a copy, so best made once."""
    if w.bits >= FLOAT_BITS or padded_rows(w.rows, w.bits, multiple) == w.padded_rows:
        return w
    return QTensor(pack(w.codes(), w.bits, multiple), w.scale, w.bits, w.rows)


def integer_dot(a: Int[Array, "*B K"], b: Int[Array, "K N"]) -> Int[Array, "*B N"]:
    """Multiply int8 codes exactly, accumulated in int32."""
    return jax.lax.dot_general(a, b, (((a.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.int32)

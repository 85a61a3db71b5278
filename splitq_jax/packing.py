"""Codes of 2, 3 and 4 bits to 32-bit words and back, along the input channels of a weight.

Layouts (K = input channels, the packed axis; N = output channels), chosen for TPU kernels, whose ``bitcast`` undoes them for free:

* 4 bits: ``(K/8, N)``; nibble j of word k is row ``8k + j``.
* 2 bits: ``(K/16, N)``; bit pair j of word k is row ``16k + j``.
* 3 bits: two planes: the low bit pairs as for 2 bits, ``(K/16, N)``, and the high (sign) bits ``(K/32, N)``, bit j of word k
  being row ``32k + j``. A slab of 32 rows is three words.

Rows that do not fill a word are padded with zero codes. 8-bit codes stay int8.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from splitq_jax.errors import InputError

_ROWS = {2: 16, 3: 32, 4: 8}  # the rows of a full slab


def pack(codes: Int[Array, "K N"], bits: int) -> tuple[Int[Array, "_ N"], ...]:
    """Pack int8 codes of ``bits`` bits (two's complement).

    Returns:
      The words, int32: one array for 2 and 4 bits, (low plane, high plane) for 3, the int8 codes themselves for 8.
    """
    if bits == 8:
        return (codes.astype(jnp.int8),)
    if bits not in _ROWS:
        raise InputError(f"pack: {bits} bits; supported are 2, 3, 4 and 8")
    rows = -codes.shape[0] % _ROWS[bits]
    codes = jnp.pad(codes.astype(jnp.int32), ((0, rows), (0, 0)))
    if bits == 3:
        return _words(codes & 3, 2), _words((codes >> 2) & 1, 1)
    return (_words(codes & (2**bits - 1), bits),)


def unpack(words: tuple[Int[Array, "_ N"], ...], bits: int, rows: int) -> Int[Array, "K N"]:
    """Undo `pack`: int8 codes of shape ``(rows, N)``."""
    if bits == 8:
        return words[0]
    if bits == 3:
        low, high = _fields(words[0], 2), _fields(words[1], 1)
        codes = low - 4 * high
    else:
        field = _fields(words[0], bits)
        codes = jnp.where(field >= 2 ** (bits - 1), field - 2**bits, field)
    return codes[:rows].astype(jnp.int8)


def _words(fields: Int[Array, "K N"], width: int) -> Int[Array, "_ N"]:
    per_word = 32 // width
    shifts = jnp.arange(per_word, dtype=jnp.int32)[None, :, None] * width
    grouped = fields.reshape(-1, per_word, fields.shape[-1])  # K/per_word per_word N
    return jnp.sum(grouped << shifts, axis=1, dtype=jnp.int32)  # disjoint bits: the sum is their union, wrapping included


def _fields(words: Int[Array, "W N"], width: int) -> Int[Array, "K N"]:
    per_word = 32 // width
    shifts = jnp.arange(per_word, dtype=jnp.int32)[None, :, None] * width
    fields = (words[:, None, :] >> shifts) & (2**width - 1)  # W per_word N
    return fields.reshape(-1, words.shape[-1])

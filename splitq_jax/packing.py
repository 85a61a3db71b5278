"""Codes of 2, 3 and 4 bits to 32-bit words and back, along the input channels of a weight.

Layouts (K = input channels, the packed axis; N = output channels), chosen for TPU kernels, whose ``bitcast`` undoes them for free:

* 4 bits: ``(K/8, N)``; nibble j of word k is row ``8k + j``.
* 2 bits: ``(K/16, N)``; bit pair j of word k is row ``16k + j``.
* 3 bits: ``(3K/32, N)``. A slab of S rows is three planes of S/32 words. Nibble j of word k in plane p holds the code of row
  ``p S/4 + 8k + j`` of the slab in its upper three bits. The last quarter of the rows lies in the lowest bits: bit b of the code of row
  ``3S/4 + 8k + j`` is the lowest bit of nibble j of word k in plane b. So ``plane & 0xEEEEEEEE`` is eight 4-bit integers of twice the
  code, and 32 codes cost eleven operations of 32 bits. S is 256 (a plane is then one (8, 128) tile) for 1024 rows or more and
  for multiples of 256, so that slabs can be dealt to devices; other matrices are one slab.

Rows that do not fill a slab are padded with zero codes. 8-bit codes stay int8.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from splitq_jax.errors import InputError

_ROWS = {2: 16, 3: 32, 4: 8}  # the rows of a full word, or of three
SLAB = 256
WIDE = 1024  # sites of this width and more are stored in whole tiles of accelerators
TILE_ROWS = 64  # rows of 4-bit codes in a (8, 128) tile of words
_UPPER, _LOWEST = -0x11111112, 0x11111111  # 0xEEEEEEEE and its complement, as int32


def slab_rows(rows: int) -> int:
    """Return S, the rows of one slab of 3-bit codes."""
    return SLAB if rows >= WIDE or rows % SLAB == 0 else -(-rows // 32) * 32


def padded_rows(rows: int, bits: int, multiple: int = 1) -> int:
    """Return how many rows `pack` makes of ``rows``."""
    unit = {3: slab_rows(rows), 8: 1}.get(bits) or _ROWS[bits]
    unit = max(unit, multiple)
    return -(-rows // unit) * unit


def pack(codes: Int[Array, "K N"], bits: int, multiple: int = 1) -> tuple[Int[Array, "_ N"], ...]:
    """Pack int8 codes of ``bits`` bits (two's complement).

    Args:
      codes: the matrix.
      bits: 2, 3, 4 or 8.
      multiple: pad the rows further to a multiple of this, itself a multiple of what fills a word.

    Returns:
      The words, int32, in one array; for 8 bits the int8 codes themselves.

    Raises:
      InputError: other bits.
    """
    if bits not in {*_ROWS, 8}:
        raise InputError(f"pack: {bits} bits; supported are 2, 3, 4 and 8")
    rows = codes.shape[0]
    codes = jnp.pad(codes, ((0, padded_rows(rows, bits, multiple) - rows), (0, 0)))
    if bits == 8:
        return (codes.astype(jnp.int8),)
    if bits == 3:
        return (_pack3(codes.astype(jnp.int32), slab_rows(rows)),)
    return (_words(codes.astype(jnp.int32) & (2**bits - 1), bits),)


def unpack(words: tuple[Int[Array, "_ N"], ...], bits: int, rows: int) -> Int[Array, "K N"]:
    """Undo `pack`: int8 codes of shape ``(rows, N)``."""
    if bits == 8:
        return words[0][:rows]
    field = _unpack3(words[0], slab_rows(rows)) if bits == 3 else _fields(words[0], bits)
    codes = jnp.where(field >= 2 ** (bits - 1), field - 2**bits, field)
    return codes[:rows].astype(jnp.int8)


def _pack3(codes: Int[Array, "K N"], slab: int) -> Int[Array, "_ N"]:
    quarters = (codes & 7).reshape(-1, 4, slab // 4, codes.shape[-1])  # slabs 4 S/4 N
    upper = [_words(quarters[:, p].reshape(-1, codes.shape[-1]) << 1, 4) for p in range(3)]
    lowest = [_words((quarters[:, 3].reshape(-1, codes.shape[-1]) >> b) & 1, 4) for b in range(3)]
    planes = [(u | v).reshape(-1, slab // 32, codes.shape[-1]) for u, v in zip(upper, lowest, strict=True)]
    return jnp.stack(planes, axis=1).reshape(-1, codes.shape[-1])


def _unpack3(words: Int[Array, "W N"], slab: int) -> Int[Array, "K N"]:
    n = words.shape[-1]
    planes = words.reshape(-1, 3, slab // 32, n)
    last = sum(((planes[:, b] & _LOWEST) << (b + 1)) for b in range(3))
    nibbles = jnp.concatenate([planes & _UPPER, last[:, None]], axis=1)  # slabs 4 S/32 N, twice the codes
    return _fields(nibbles.reshape(-1, n), 4) >> 1


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

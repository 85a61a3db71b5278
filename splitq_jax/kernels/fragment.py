"""Packed weights in the order of Hopper's matrix registers, and the arithmetic that expands a word to them.

`wgmma` takes its first operand from registers. Of each row of that operand, lane t of the four lanes that share the row holds, in its
register R, ``E`` neighbouring columns (E = 4 for int8, 2 for bfloat16):

    column = 4 E R + E t + e,    e = 0 .. E - 1

So of a block of B columns a lane holds B/4 codes of a row, in B / (4 E) registers. The packed layout stores them together: a plane of
``field`` bits is int32 words ``(S, N, step field / 32)``, S steps of ``step`` columns each, for what a thread block reads at a time, some
rows of a step, should lie together in memory. In a block's words those of lane t lie side by side, ``B field / 128`` of them, and
element e of register R lies in the lane's word ``R // F`` at bit ``(32/E) e + field (R % F)``, with ``F = 32 / (E field)``. One shift and
one mask then bring a field of all elements of a register into place at once: no bytes are permuted and no integer is converted.

Codes of 4 bits are one plane of 4-bit fields, those of 3 bits a plane of the low two bits and a plane of the sign bits: 3 bits in
memory. Columns that do not fill a step are padded with zero codes.

Expanded operands are *exact*: int8 holds ``code * 2^(8 - bits)`` (its high bits; the rescale divides by the power of two), bfloat16
holds ``code``, as ``(2^7 + 2^(bits-1) + code) - (2^7 + 2^(bits-1))``, whose minuend is made by an exclusive or with the bits of 2^7.
"""

from collections.abc import Sequence
from typing import Protocol, Self

import jax.numpy as jnp
from jaxtyping import Array, Int

from splitq_jax.errors import InputError

PLANES = {3: (2, 1), 4: (4,)}  # bits -> fields of the planes, low bits first
BLOCK = {3: 128, 4: 64}  # bits -> B: a lane's share of a block fills a word of every plane, two of 4-bit codes


class Word(Protocol):
    """32 bits: a numpy or jax array in tests, a register in a kernel."""

    def __and__(self, other: int) -> Self: ...
    def __or__(self, other: Self) -> Self: ...
    def __xor__(self, other: int | Self) -> Self: ...
    def __lshift__(self, other: int) -> Self: ...
    def __rshift__(self, other: int) -> Self: ...


def pack_fragments(codes: Int[Array, "K N"], bits: int, elements: int, step: int = 128) -> tuple[Int[Array, "S N _"], ...]:
    """Pack int8 codes of ``bits`` bits in the order of registers.

    Args:
      codes: the matrix.
      bits: 3 or 4.
      elements: E, 4 for an int8 operand and 2 for a bfloat16 one.
      step: of which K becomes a multiple, itself a multiple of a block.

    Returns:
      A plane ``(S, N, step field / 32)`` of int32 words for each field of ``PLANES[bits]``.

    Raises:
      InputError: for other bits.
    """
    if bits not in PLANES:
        raise InputError(f"pack_fragments: {bits} bits; supported are 3 and 4")
    codes = jnp.pad(codes.astype(jnp.int32).T, ((0, 0), (0, -codes.shape[0] % step)))
    registers = BLOCK[bits] // (4 * elements)
    lanes = codes.reshape(codes.shape[0], -1, registers, 4, elements).transpose(0, 1, 3, 2, 4)  # N block lane register element
    planes, low = [], 0
    for field in PLANES[bits]:
        shifts = _shifts(field, elements)  # F E
        fields = ((lanes >> low) & (2**field - 1)).reshape(*lanes.shape[:3], -1, *shifts.shape)  # N block lane word F E
        words = jnp.sum(
            fields << shifts[None, None, None, None], axis=(-2, -1), dtype=jnp.int32
        )  # disjoint bits: the sum is their union, wrapping included
        planes.append(words.reshape(words.shape[0], -1, step * field // 32).transpose(1, 0, 2))
        low += field
    return tuple(planes)


def unpack_fragments(planes: tuple[Int[Array, "S N _"], ...], bits: int, elements: int) -> Int[Array, "K N"]:
    """Undo `pack_fragments`: int8 codes, K with its padding."""
    n, registers = planes[0].shape[1], BLOCK[bits] // (4 * elements)
    codes, low = jnp.zeros((), jnp.int32), 0
    for field, words in zip(PLANES[bits], planes, strict=True):
        rows = words.transpose(1, 0, 2).reshape(n, -1)
        fields = (rows[..., None, None] >> _shifts(field, elements)[None, None]) & (2**field - 1)  # N words F E
        codes = codes | (fields.reshape(n, -1, 4, registers, elements) << low)
        low += field
    codes = codes.transpose(0, 1, 3, 2, 4).reshape(n, -1)
    return jnp.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes).astype(jnp.int8).T


def fragment_step(planes: tuple[Int[Array, "*S N _"], ...], bits: int) -> int:
    """Return the columns of a step."""
    columns: int = planes[0].shape[-1] * 32 // PLANES[bits][0]
    return columns


def fragment_rows(planes: tuple[Int[Array, "S N _"], ...], bits: int) -> int:
    """Return K with its padding."""
    steps: int = planes[0].shape[0]
    return steps * fragment_step(planes, bits)


def _shifts(field: int, elements: int) -> Int[Array, "F E"]:
    """Return the bit at which each register's field of each element begins."""
    inside = field * jnp.arange(32 // (elements * field), dtype=jnp.int32)
    return inside[:, None] + (32 // elements) * jnp.arange(elements, dtype=jnp.int32)[None, :]


def int8_register(words: Sequence[Sequence[Word]], bits: int, register: int) -> Word:
    """Expand register R of a lane and a block to four int8 ``code * 2^(8 - bits)``.

    Args:
      words: of each plane the lane's words of the block.
      bits: of a code.
      register: R.
    """
    out, top = None, 8
    for field, plane in reversed(list(zip(PLANES[bits], words, strict=True))):
        per_word = 8 // field
        place = top - field - field * (register % per_word)  # the field moves up by this many bits, to end below bit `top`
        mask = _repeat((2**field - 1) << (top - field), 8)
        part = _shift(plane[register // per_word], place) & mask
        out = part if out is None else out | part
        top -= field
    assert out is not None
    return out


def bfloat16_register(words: Sequence[Sequence[Word]], bits: int, register: int) -> Word:
    """Expand register R of a lane and a block to two bfloat16 ``2^7 + 2^(bits-1) + code``."""
    out, low = None, 0
    for field, plane in zip(PLANES[bits], words, strict=True):
        per_word = 16 // field
        part = _shift(plane[register // per_word], low - field * (register % per_word)) & _repeat((2**field - 1) << low, 16)
        out = part ^ _repeat(0x4300 + 2 ** (bits - 1), 16) if out is None else out ^ part
        low += field
    assert out is not None
    return out


def bfloat16_bias(bits: int) -> int:
    """Return what `bfloat16_register` adds to a code."""
    return 128 + (1 << (bits - 1))


def _shift(word: Word, left: int) -> Word:
    if left == 0:
        return word
    return word << left if left > 0 else word >> -left


def _repeat(pattern: int, width: int) -> int:
    """Return a pattern of ``width`` bits in all of a word, as a signed 32-bit integer."""
    word = sum(pattern << shift for shift in range(0, 32, width))
    return word - 2**32 if word >= 2**31 else word

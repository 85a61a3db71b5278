"""Tiles of the TPU kernels, by rule from the chip's generation and the shape: nothing is tried at run time."""

from typing import Literal, NamedTuple

from jax.experimental.pallas import tpu as pltpu

LANES = 128
MIB = 2**20


class Chip(NamedTuple):
    """What the rules read.

    Attributes:
      generation: 5 (v5e, v5p), 6 (v6e) or 7 (tpu7x).
      vmem: bytes of VMEM that a kernel may take.
    """

    generation: int
    vmem: int


class Tiles(NamedTuple):
    """How a product of M tokens and N columns is cut.

    Attributes:
      tokens: M, padded.
      block: tokens that stay in VMEM while all of the weight passes.
      rows: tokens of one product in the kernel; divides ``block``.
      columns: output channels of a step; divides N.
      depth: weight blocks in VMEM: one in use, the others on their way.
      pieces: parts of a step's tokens: the first step starts when one has arrived, the last one sends each off.
    """

    tokens: int
    block: int
    rows: int
    columns: int
    depth: int
    pieces: int


def chip() -> Chip:
    """Return the chip that the program is traced for: the abstract mesh's or the default device's, v6e where that is no TPU."""
    try:
        info = pltpu.get_tpu_info()
    except Exception:  # traced on another platform: lowered for TPU only if the caller names one by an abstract mesh
        return Chip(6, 100 * MIB)
    return Chip(info.generation, info.vmem_capacity_bytes * 25 // 32)


def compiler_params(*semantics: Literal["parallel", "arbitrary"]) -> pltpu.CompilerParams:
    """Return what every kernel asks of the compiler, for a grid whose axes are so."""
    # a check of a copy's bounds takes 20 cycles of the scalar unit, for every copy of every step
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=chip().vmem, disable_bounds_checks=True)


def up(value: int, unit: int) -> int:
    """Round up to a multiple."""
    return -(-value // unit) * unit


def divisor(size: int, most: int, unit: int = LANES) -> int:
    """Return the largest multiple of ``unit`` that divides ``size``, a multiple of it, and is at most ``most``."""
    return max(d for d in range(unit, max(most, unit) + 1, unit) if size % d == 0)


def tiles(on: Chip, tokens: int, rows: int, columns: int, token_bytes: float, w_bytes: float, decoded_bytes: float) -> Tiles:
    """Choose the tiles of a product.

    The whole of K stays in one step, so nothing is accumulated over the grid. All tokens that fit stay in VMEM while the weight passes
    once.

    Args:
      on: the chip.
      tokens: M.
      rows: K, padded.
      columns: N, a multiple of a lane tile.
      token_bytes: bytes of a token's operands in VMEM.
      w_bytes: bytes of a packed weight.
      decoded_bytes: bytes of a weight as the product takes it.
    """
    few = tokens <= 256
    depth = 3 if few else 2

    def taken(block: int, step: int, n: int) -> float:
        weights = rows * n * (depth * w_bytes + decoded_bytes)
        spilled = step * token_bytes if on.generation == 5 and decoded_bytes > 1 else 0  # as bfloat16 meets v5's MXU
        return weights + block * token_bytes + spilled + step * n * 12 + 4 * MIB

    def even(chunks: int) -> int:
        return up(-(-tokens // chunks), 64 if tokens > 64 else 16 if tokens > 8 else 8)

    chunks = -(-tokens // 2048)
    unit = LANES if on.generation == 5 or columns % 256 else 256  # columns of the MXU
    least = divisor(columns, 512, unit)  # fewer leave half of the MXU empty, or have its rows wait
    while (step := even(chunks)) > 64 and taken(step, step, least if step > 256 else LANES) > on.vmem:
        chunks += 1
    # a grid step costs some 450 cycles beside its products; the first one waits for its columns, at half of v6e's bandwidth on v5e
    narrow = decoded_bytes <= 1 if few else on.generation == 5 and columns <= 8192
    n = divisor(columns, 512 if narrow else 1024, unit)
    while n > unit and taken(step, step, n) > on.vmem:
        n = divisor(columns, n - unit, unit)
    chunk = chunks
    # shared evenly: a last block of padding costs more than another pass of the weight, which hides behind 2,048 tokens' products
    while (taken(chunk * step, step, n) > on.vmem and chunk > 1) or chunks % chunk:
        chunk -= 1
    blocks = chunks // chunk
    pieces = 1 if few else max(p for p in (1, 2, 4) if p == 1 or (step % (p * 64) == 0 and step >= p * 256))
    return Tiles(blocks * chunk * step, chunk * step, step, n, depth, pieces)

"""Products in float64 numpy, which reads packed words itself, and the sites and tokens that the kernels' tests draw."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from splitq_jax.acc import LowRank
from splitq_jax.kernels import api, operands
from splitq_jax.linear import Group, SplitWeight
from splitq_jax.packing import TILE_ROWS, padded_rows, slab_rows
from splitq_jax.qtensor import QTensor
from splitq_jax.transforms import IDENTITY, Transform, factors, orthogonal

BACKENDS = ["reference", *sorted(api.PLATFORMS)]
SCHEMES = [(4, 8), (4, 4), (3, 8), (3, 4), (3, 3), (3, 2)]  # bits of weights and activations
ACCUMULATION = 2.0**-20  # float32 sums, as a share of the sum of magnitudes


# --- the definition, in float64 and from the bits


def numpy_codes(w: QTensor) -> np.ndarray:
    """Read codes bit by bit, as `splitq_jax.packing` says."""
    words = np.asarray(w.words[0]).view(np.uint32 if w.bits < 8 else np.int8)
    if w.bits == 8:
        return words[: w.rows].astype(np.int64)
    rows = np.arange(w.rows)
    if w.bits == 3:
        slab = 256 if w.rows >= 1024 or w.rows % 256 == 0 else -(-w.rows // 32) * 32
        base, r = rows // slab * (3 * slab // 32), rows % slab
        quarter, k, j = r // (slab // 4), r % (slab // 4) // 8, r % 8
        upper = words[base + np.minimum(quarter, 2) * (slab // 32) + k] >> (4 * j + 1)[:, None] & 7
        bits = [words[base + b * (slab // 32) + k] >> (4 * j)[:, None] & 1 for b in range(3)]
        field = np.where((quarter == 3)[:, None], bits[0] | bits[1] << 1 | bits[2] << 2, upper).astype(np.int64)
    else:
        per_word = 32 // w.bits
        field = (words[rows // per_word] >> (w.bits * (rows % per_word))[:, None] & (2**w.bits - 1)).astype(np.int64)
    return np.where(field >= 2 ** (w.bits - 1), field - 2**w.bits, field)


def numpy_pack(codes: np.ndarray, bits: int, multiple: int) -> np.ndarray:
    """Write codes into words as `splitq_jax.packing` says: the tests' own, so that a mistake there is not undone here."""
    rows = padded_rows(codes.shape[0], bits, multiple)
    field = np.pad(codes, ((0, rows - codes.shape[0]), (0, 0))).astype(np.int64) & (2**bits - 1)
    if bits != 3:
        field = field.reshape(-1, 32 // bits, codes.shape[1]).astype(np.uint32)
        return np.bitwise_or.reduce(field << (bits * np.arange(32 // bits, dtype=np.uint32))[None, :, None], axis=1).view(np.int32)
    slab = slab_rows(codes.shape[0])
    quarters = field.reshape(-1, 4, slab // 32, 8, codes.shape[1]).astype(np.uint32)
    nibbles = [quarters[:, b] << np.uint32(1) | quarters[:, 3] >> np.uint32(b) & np.uint32(1) for b in range(3)]
    shifts = 4 * np.arange(8, dtype=np.uint32)[None, None, :, None]
    planes = [np.bitwise_or.reduce(n << shifts, axis=2) for n in nibbles]  # slabs S/32 N
    return np.stack(planes, axis=1).reshape(-1, codes.shape[1]).view(np.int32)


def numpy_matrix(w: QTensor) -> np.ndarray:
    scale = np.asarray(w.scale, np.float64)
    return numpy_codes(w) * np.repeat(scale, w.rows // scale.shape[0], axis=0)


def numpy_step(x: np.ndarray, bits: int, clip) -> np.ndarray:
    """Return the step between codes of each token, as `numerics` defines it."""
    high, low = (np.maximum((sign * x).max(1, keepdims=True), 0) for sign in (1, -1))
    high, low = (high, low) if clip is None else (float(clip[0]) * high, float(clip[1]) * low)
    step = np.maximum(high, low) / (2 ** (bits - 1) - 1)
    return np.where(step > np.finfo(np.float32).tiny, step, 1)


def numpy_encode(x: np.ndarray, step: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(np.rint(x / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int64)


def near_ties(x: np.ndarray, step: np.ndarray, blur) -> np.ndarray:
    """Return where ``x``, known within ``blur``, may be rounded either way."""
    return np.abs(np.abs(x / step) % 1 - 0.5) * step <= blur


def assert_close(got, expected, magnitude, dtype):
    """Within one rounding to ``dtype`` and the error of float32 sums."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    half_step = np.abs(expected) * float(ml_dtypes.finfo(dtype).eps)
    excess = np.abs(got - expected) - half_step - ACCUMULATION * magnitude
    assert np.isfinite(got).all()
    assert (excess <= 0).all(), f"{(excess > 0).mean():.1%} of the entries; worst {excess.max():.3g}"


def codes_off(got: operands.Activations, expected: operands.Activations, main: QTensor, rtol: float, share: float) -> np.ndarray:
    """Codes of the main group less those expected: one at most, of a ``share`` at most, next to ties; its padding is zeros."""
    np.testing.assert_allclose(got.scale, expected.scale, rtol=rtol)
    codes = np.asarray(got.values, np.int64)
    off = codes[:, : main.rows] - np.asarray(expected.values, np.int64)[:, : main.rows]
    assert codes.shape[1] == main.padded_rows and not codes[:, main.rows :].any()
    assert np.abs(off).max() <= 1 and (off != 0).mean() < share
    return off


def run(function, *args, **options):
    """Call a public function inside jit."""
    return jax.jit(lambda *a: function(*a, **options))(*args)


class Product(NamedTuple):
    value: np.ndarray
    magnitude: np.ndarray  # sum of the terms' magnitudes


def numpy_product(backend: str, a: operands.Activations, w: SplitWeight, bias, *, scaled: bool = False) -> Product:
    """The product of given operands; the TPU's kernels hold the narrow weights in bfloat16, scales included.

    ``scaled``: and the main weights, as where many tokens meet scales per group.
    """
    main = w.groups[0].w
    values = np.asarray(a.values, np.float64)[:, : main.rows]
    if a.scale is not None:
        values = values * np.asarray(a.scale, np.float64)
    matrix = numpy_matrix(main)
    terms = [(values, matrix.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64) if scaled else matrix)]
    if a.side is not None:
        side, at = np.asarray(a.side, np.float64), 0
        for segment in operands.segments(w):
            rows = numpy_codes(segment.w) * (1.0 if segment.columns is None else np.asarray(segment.columns, np.float64))
            rows = rows if backend != "tpu" else rows.astype(ml_dtypes.bfloat16).astype(np.float64)
            terms.append((side[:, at : at + segment.w.rows], rows))
            at += segment.w.padded_rows
    value, magnitude = (sum(f(x) @ f(b) for x, b in terms) for f in (np.asarray, np.abs))
    if bias is not None:
        value, magnitude = value + np.asarray(bias, np.float64), magnitude + np.abs(np.asarray(bias, np.float64))
    return Product(value, magnitude)


# --- sites and tokens


def codes_of(rng, rows: int, columns: int, bits: int, wide: bool, row_scales: bool = False, scales: int = 1) -> QTensor:
    """A matrix with every code of its range, padded as wide sites are; ``scales``: for each column."""
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns)).astype(np.int8)
    shape = (rows, 1) if row_scales else (scales, columns)
    scale = (0.5 + rng.random(shape)) / np.sqrt(rows) / 2 ** (bits - 1)
    words = numpy_pack(codes, bits, TILE_ROWS if wide else 1)
    return QTensor((jnp.asarray(words),), jnp.asarray(scale, jnp.float32), bits, rows)


def site_of(seed, width, columns, bits, *, side=64, ranks=(48, 64), apart=False, transform=True, clip=0.9, scales=1) -> SplitWeight:
    """A site of ``width`` channels: two side groups of ``side`` channels each (0: none) and branches of these ranks (0: none).

    ``apart``: the branches have factors of their own. ``scales``: of each column of the main group.
    """
    rng = np.random.default_rng(seed)
    w_bits, a_bits = bits
    side_w, side_a, wide = max(4, w_bits), max(4, a_bits), width >= 1024
    sizes = [k for k in (width - 2 * side, side, side) if k]

    def transform_of(k):
        if not transform:
            return IDENTITY
        n1, n2 = factors(k)
        d = jnp.asarray(0.5 + rng.random(k), jnp.float32)
        return Transform(d, jnp.asarray(orthogonal(n1, 1)) if n1 > 1 else None, jnp.asarray(orthogonal(n2, 2)))

    branches = None
    if rank := sum(ranks) if apart else max(ranks):
        u = codes_of(rng, sizes[0], rank, side_w, wide)
        v = codes_of(rng, rank, columns, side_w, wide, row_scales=True)
        gates = [jnp.asarray(rng.standard_normal(r), jnp.float32) if r else None for r in ranks]
        branches = LowRank(u, v, *gates)
    groups = tuple(
        Group(
            transform_of(k),
            jnp.array([clip, clip - 0.1], jnp.float32) * (1 - 0.2 * i),
            codes_of(rng, k, columns, side_w if i else w_bits, wide, scales=1 if i else scales),
            side_a if i else a_bits,
        )
        for i, k in enumerate(sizes)
    )
    perm = None
    if len(sizes) > 1:
        main, others = np.split(rng.permutation(width), [sizes[0]])
        perm = jnp.asarray(np.concatenate([np.sort(main), others]), jnp.int32)
    return SplitWeight(perm, groups, branches, "text", side_a)


def without_clips(w: SplitWeight) -> SplitWeight:
    return replace(w, groups=tuple(replace(g, a_clip=None) for g in w.groups))


def tokens_of(seed, count, width, dtype=jnp.bfloat16):
    """Tokens of very different size, one of zeros, one huge, one tiny."""
    rng = np.random.default_rng(seed + 1)
    x = rng.standard_normal((count, width)) * np.exp(rng.standard_normal((count, 1)))
    for row, factor in ((1, 0.0), (2, 1e30), (3, 1e-30)):
        x[row : row + 1] *= factor
    return jnp.asarray(x, dtype)


def mask_of(kind, count, seed=0):
    mask = {"text": np.ones, "vision": np.zeros, "last": lambda n, _: np.arange(n) == n - 1}.get(kind)
    return jnp.asarray(np.random.default_rng(seed).random(count) < 0.5 if mask is None else mask(count, bool))


def given_operands(seed, count, w: SplitWeight) -> operands.Activations:
    """Operands that reach the ends of their ranges, of tokens of very different size."""
    rng = np.random.default_rng(seed + 2)
    main = w.groups[0]
    low, high = -(2 ** (main.a_bits - 1)), 2 ** (main.a_bits - 1)
    values = rng.integers(low, high, (count, main.w.rows)).astype(np.int8)
    scale = np.exp(rng.standard_normal((count, 1))).astype(np.float32)
    if count > 1:  # else the only token would be zeros
        values[1], scale[min(2, count - 1)] = 0, 1e20
    values = np.pad(values, ((0, 0), (0, main.w.padded_rows - main.w.rows)))
    parts = [
        np.pad(rng.standard_normal((count, s.w.rows)) * scale, ((0, 0), (0, s.w.padded_rows - s.w.rows)))
        for s in operands.segments(w)
    ]
    side = jnp.asarray(np.concatenate(parts, 1), jnp.bfloat16) if parts else None
    return operands.Activations(jnp.asarray(values), jnp.asarray(scale), side)

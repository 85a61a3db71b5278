"""Every backend of every kernel against float64 numpy, which reads the packed words itself."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from kernel_reference import (
    ACCUMULATION,
    SCHEMES,
    assert_close,
    given_operands,
    mask_of,
    near_ties,
    numpy_codes,
    numpy_encode,
    numpy_matrix,
    numpy_product,
    numpy_step,
    run,
    site_of,
    tokens_of,
    without_clips,
)

from splitq_jax.kernels import api, operands, tiles, tpu, tpu_quantizer
from splitq_jax.linear import linear
from splitq_jax.packing import TILE_ROWS
from splitq_jax.qtensor import quantize_columns

SHAPES = [(1, 576, 200, 8), (70, 1536, 384, 64), (33, 2048, 131, 64)]


@pytest.mark.parametrize(
    ("bits", "count", "width", "columns", "side"),
    [
        ((4, 8), *SHAPES[0]),
        ((3, 4), *SHAPES[0]),
        ((4, 4), *SHAPES[1]),
        ((3, 8), *SHAPES[1]),
        ((4, 8), *SHAPES[2]),
        ((3, 3), *SHAPES[2]),
    ],
    ids=str,
)
def test_quantized_matmul(backend, bits, count, width, columns, side):
    w = site_of(0, width, columns, bits, side=side, ranks=(11, 17) if width < 1024 else (32, 48), transform=False)
    a = given_operands(0, count, w)
    bias = jnp.asarray(np.random.default_rng(3).standard_normal(columns), jnp.float32)
    expected = numpy_product(backend, a, w, bias)
    got = run(api.quantized_matmul, a, w, bias, dtype=jnp.bfloat16, backend=backend)
    assert got.dtype == jnp.bfloat16
    assert_close(got, *expected, jnp.bfloat16)


@pytest.mark.parametrize(("bits", "count", "width"), [((4, 4), 5, 3584), ((3, 3), 9, 11008), ((4, 8), 3, 18944)], ids=str)
def test_widths_of_real_models(backend, bits, count, width):
    w = site_of(1, width, 128, bits, side=0, ranks=(0, 0), transform=False)
    a = given_operands(1, count, w)
    assert_close(run(api.quantized_matmul, a, w, backend=backend), *numpy_product(backend, a, w, None), jnp.bfloat16)


@pytest.mark.parametrize("bits", SCHEMES, ids=lambda b: "w{}a{}".format(*b))
def test_integer_sums_are_exact(backend, bits):
    """Scales of 1 and float32 outputs: the accumulator itself, at the ends of the codes' ranges too."""
    w = site_of(2, 2048, 136, bits, side=0, ranks=(0, 0), transform=False)
    main = w.groups[0].w.replace(scale=jnp.ones((1, 136), jnp.float32))
    w = w.replace(groups=(w.groups[0].replace(w=main),))
    a = given_operands(2, 40, w)._replace(scale=jnp.ones((40, 1), jnp.float32))
    ends = a.values.at[0].set(-(2 ** (bits[1] - 1))).at[3].set(2 ** (bits[1] - 1) - 1)
    a = a._replace(values=ends)
    got = np.asarray(run(api.quantized_matmul, a, w, dtype=jnp.float32, backend=backend))
    assert (got == np.asarray(a.values, np.int64)[:, : main.rows] @ numpy_codes(main)).all()


@pytest.mark.parametrize("count", [128, 2048])
def test_many_tokens(backend, count):
    w = site_of(3, 1536, 160, (4, 4), ranks=(16, 32), transform=False)
    a = given_operands(3, count, w)
    assert_close(run(api.quantized_matmul, a, w, backend=backend), *numpy_product(backend, a, w, None), jnp.bfloat16)


@pytest.mark.parametrize(
    ("columns", "cut"),
    [
        (384, tiles.Tiles(96, 48, 16, 128, 2, 1)),
        (1024, tiles.Tiles(96, 48, 24, 512, 2, 2)),
        (384, tiles.Tiles(96, 48, 16, 128, 3, 1)),
    ],
    ids=str,
)
def test_every_step_of_the_grid_on_tpu(columns, cut, monkeypatch):
    """Blocks of tokens, of columns and of a block's rows at once: as many tokens as take them would last for minutes."""
    w = site_of(3, 1024, columns, (4, 4), ranks=(16, 32), transform=False)
    a = given_operands(3, 90, w)
    bias = jnp.asarray(np.random.default_rng(3).standard_normal(columns), jnp.float32)
    monkeypatch.setattr(tiles, "tiles", lambda *_: cut)
    got = jax.jit(partial(tpu.quantized_matmul, dtype=jnp.bfloat16, interpret=True))(a, w, bias)
    assert_close(got, *numpy_product("tpu", a, w, bias), jnp.bfloat16)


@pytest.mark.parametrize("which", ["all", "factors of their own", "no side groups", "no cws", "no mac", "no branches", "nothing"])
def test_sites_that_lack_parts(backend, which):
    side = 0 if which in ("no side groups", "nothing") else 64
    cws, mac = {"no cws": (0, 32), "no mac": (32, 0), "no branches": (0, 0), "nothing": (0, 0)}.get(which, (48, 32))
    w = site_of(4, 1024, 136, (4, 4), side=side, ranks=(cws, mac), apart=which == "factors of their own")
    if backend != "gpu":  # whose form for few tokens, below, is its quantizer and this product
        a = given_operands(4, 20, w)
        assert_close(run(api.quantized_matmul, a, w, backend=backend), *numpy_product(backend, a, w, None), jnp.bfloat16)
    # and from tokens: the two forms are one function
    x, text = tokens_of(4, 3, 1024), mask_of("mixed", 3)  # the GPU's interpreter takes long for each
    prepared = run(api.quantize_activations, x, w, text, backend=backend)
    assert_close(
        run(api.decode_matmul, x, w, text, backend=backend, dtype=jnp.float32),
        *numpy_product(backend, prepared, w, None),
        jnp.bfloat16,
    )


@pytest.mark.parametrize(
    ("bits", "mask"), [((4, 8), "mixed"), ((4, 4), "text"), ((4, 4), "vision"), ((3, 3), "mixed"), ((3, 2), "mixed")], ids=str
)
def test_quantize_activations(backend, bits, mask):
    """From tokens: codes and scales exactly where no transform blurs them, the narrow operand within one rounding."""
    count, width = 20, 1024
    w = site_of(5, width, 128, bits, transform=False)
    x, text = tokens_of(5, count, width), mask_of(mask, count)
    got = run(api.quantize_activations, x, w, text, backend=backend)
    xs = np.split(
        np.asarray(x.astype(jnp.float32), np.float64)[:, np.asarray(w.perm)], np.cumsum([g.w.rows for g in w.groups])[:-1], axis=1
    )
    parts, magnitudes = [], []
    for i, (group, x_j) in enumerate(zip(w.groups, xs, strict=True)):
        step = numpy_step(x_j, group.a_bits, np.asarray(group.a_clip))
        if i == 0:
            # from the scale that was found, which float32 leaves two roundings
            main, main_step = np.asarray(got.values, np.int64)[:, : group.w.rows], np.asarray(got.scale, np.float64)
            np.testing.assert_allclose(main_step, step, rtol=2**-22)
            assert ((main == numpy_encode(x_j, main_step, group.a_bits)) | near_ties(x_j, main_step, 2**-21 * np.abs(x_j))).all()
            assert not np.asarray(got.values)[:, group.w.rows :].any()
        else:
            codes = numpy_encode(x_j, step, group.a_bits)
            parts.append(codes * step)
            ties = near_ties(x_j, step, 2**-21 * np.abs(x_j))
            magnitudes.append(np.abs(parts[-1]) + ties * step / ACCUMULATION)
    # float32 may hold x - codes * step with one rounding or with two
    residual, blur = xs[0] - main * main_step, np.abs(xs[0]).max(1, keepdims=True) * 2.0**-22
    residual_step = numpy_step(residual, w.residual_bits, None)
    codes = numpy_encode(residual, residual_step, w.residual_bits)
    off = near_ties(residual, residual_step, 2 * blur) * residual_step + np.abs(codes) * blur / (2 ** (w.residual_bits - 1) - 1)
    serves = np.asarray(text)[:, None]
    u, v = numpy_matrix(w.branches.u), np.asarray(w.branches.v.scale, np.float64).T
    cws, mac = (np.zeros(u.shape[1]) for _ in range(2))
    cws[: w.branches.cws.size], mac[-w.branches.mac.size :] = w.branches.cws, w.branches.mac
    x_hat, sent = main * main_step, codes * residual_step * serves
    parts.append((x_hat @ u * cws + sent @ u * mac) * v)
    sizes = np.abs(x_hat) @ np.abs(u) * np.abs(cws) + (np.abs(sent) + off * serves / ACCUMULATION) @ np.abs(u) * np.abs(mac)
    magnitudes.append(sizes * v)
    at = 0
    for segment, part, magnitude in zip(operands.segments(w), parts, magnitudes, strict=True):
        assert_close(got.side[:, at : at + segment.w.rows], part, magnitude, jnp.bfloat16)
        assert not np.asarray(got.side[:, at + segment.w.rows : at + segment.w.padded_rows]).any()
        at += segment.w.padded_rows
    assert at == got.side.shape[1]


@pytest.mark.parametrize("bits", [4, 3])
def test_transforms_come_before_the_quantizer(backend, bits):
    """Codes differ from float64's only where the transformed value lies within float32's error of a tie."""
    w = site_of(6, 1536, 128, (bits, bits), clip=0.95)
    x = tokens_of(6, 24, 1536)
    text = jnp.arange(24) % 2 == 0
    got, exact = (run(api.quantize_activations, x, w, text, backend=b) for b in (backend, "reference"))
    at = 0
    for segment in operands.segments(w):  # a code that falls otherwise moves a row of U
        part, there = (np.asarray(s[:, at : at + segment.w.rows], np.float64) for s in (got.side, exact.side))
        near = np.abs(part - there) <= 2.0**-6 * np.abs(there).max(1, keepdims=True)
        assert near.mean() > 0.98 and near.mean(1).min() > 0.5
        at += segment.w.padded_rows
    k, group = w.groups[0].w.rows, w.groups[0]
    chosen = np.asarray(x.astype(jnp.float32), np.float64)[:, np.asarray(w.perm)[:k]] * np.asarray(group.transform.d, np.float64)
    p = np.kron(np.asarray(group.transform.p1, np.float64), np.asarray(group.transform.p2, np.float64))
    expected = chosen @ p
    scale = np.asarray(got.scale, np.float64)
    high, low = 0.95 * expected.max(1, keepdims=True), -0.85 * expected.min(1, keepdims=True)
    live = np.arange(24) != 1
    np.testing.assert_allclose(scale[live], (np.maximum(high, low) / (2 ** (bits - 1) - 1))[live], rtol=1e-5)
    codes = np.clip(np.rint(expected / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    differs = codes != np.asarray(got.values)[:, :k]
    distance = np.abs(np.abs(expected / scale - np.floor(expected / scale)) - 0.5)
    assert differs.mean() < 1e-4 and (distance[differs] < 1e-4).all()


def test_tokens_too_small_for_a_step_are_zeros(backend):
    """Up to a step of the smallest normal number: XLA takes what is below for zero on CPUs, and not elsewhere."""
    w = without_clips(site_of(6, 576, 128, (4, 4), side=8, ranks=(11, 17), transform=False))
    x = tokens_of(6, 5, 576, jnp.float32).at[3].set(7 * np.finfo(np.float32).tiny)
    a = run(api.quantize_activations, x, w, mask_of("text", 5), backend=backend)
    assert a.scale[3] == 1 and not a.values[3].any() and not a.side[3].any()


@pytest.mark.parametrize(("width", "side"), [(576, 16), (1536, 64), (3584, 128), (1100, 200)])
def test_channels_picked_by_products(width, side):
    """On TPU a few tokens meet ones and zeros: exactly what an index gives, the largest and the smallest channels split off or not."""
    w = site_of(8, width, 128, (4, 4), side=side, ranks=(0, 0))
    lowest = jnp.roll(jnp.arange(width), -2 * side)  # the first channels are the side's
    for site in (w, replace(w, perm=lowest), replace(w, perm=jnp.arange(width))):
        x = tokens_of(8, 19, width)
        for got, expected in zip(tpu_quantizer.picked(x, site), operands.picked(x, site), strict=True):
            assert got.dtype == expected.dtype and (got == expected).all()
    shuffled = replace(w, perm=w.perm[::-1])  # outside what the site promises: never silently wrong
    assert jnp.isnan(tpu_quantizer.picked(x, shuffled)[0]).all()


@pytest.mark.parametrize(("bits", "count"), [((4, 8), 1), ((4, 4), 17), ((3, 8), 5), ((3, 3), 1)], ids=str)
def test_decode_is_quantize_and_multiply(backend, bits, count):
    w = site_of(7, 1536, 200, bits)
    x, text = tokens_of(7, count, 1536), mask_of("mixed", count)
    bias = jnp.asarray(np.random.default_rng(3).standard_normal(200), jnp.float32)
    a = run(api.quantize_activations, x, w, text, backend=backend)
    got = run(api.decode_matmul, x, w, text, bias, backend=backend)
    assert got.dtype == x.dtype
    assert_close(got, *numpy_product(backend, a, w, bias), jnp.bfloat16)


@pytest.mark.parametrize(
    ("bits", "count", "width", "group"),
    [(4, 1, 1536, 0), (3, 17, 2048, 0), (4, 40, 1024, 128), (3, 17, 2048, 64), (4, 300, 1024, 32), (3, 260, 1152, 128)],
)
def test_weight_only_matmul(backend, bits, count, width, group):
    rng = np.random.default_rng(8)
    matrix = jnp.asarray(rng.standard_normal((width, 136)), jnp.float32)
    w = quantize_columns(matrix, bits, multiple=TILE_ROWS, group=group or None)
    x = tokens_of(8, count, width)
    bias = jnp.asarray(rng.standard_normal(136), jnp.float32)
    x64, decoded = np.asarray(x.astype(jnp.float32), np.float64), numpy_matrix(w)
    got = run(api.weight_only_matmul, x, w, bias, backend=backend)
    if group and count > 256 and backend == "tpu":  # many tokens meet weights that were rounded with their scales
        decoded = decoded.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    magnitude = np.abs(x64) @ np.abs(decoded)
    assert_close(got, x64 @ decoded + np.asarray(bias), magnitude, jnp.bfloat16)


@pytest.mark.parametrize("rows", [500, 1000])
def test_three_bits_in_one_slab_that_is_no_multiple(rows):
    w = quantize_columns(jnp.asarray(np.random.default_rng(8).standard_normal((rows, 8)), jnp.float32), 3)
    x, decoded = tokens_of(8, 1, rows), numpy_matrix(w)
    x64 = np.asarray(x.astype(jnp.float32), np.float64)
    assert_close(run(api.weight_only_matmul, x, w, backend="tpu"), x64 @ decoded, np.abs(x64) @ np.abs(decoded), jnp.bfloat16)


@pytest.mark.parametrize("backend", ["reference", "tpu"])
def test_side_of_float_activations(backend):
    w = site_of(9, 96, 24, (4, 16), side=8, ranks=(11, 0), transform=False)
    x = tokens_of(9, 5, 96)
    side = run(api.quantize_activations, x, w, None, backend=backend).side
    main, *others = np.split(np.asarray(x.astype(jnp.float32), np.float64)[:, np.asarray(w.perm)], [80, 88], axis=1)
    gate = np.asarray(w.branches.cws, np.float64) * np.asarray(w.branches.v.scale, np.float64)[:, 0]
    u, at = numpy_matrix(w.branches.u), 0
    expected = [(p, np.abs(p)) for p in others] + [(main @ u * gate, np.abs(main) @ np.abs(u) * np.abs(gate))]
    for segment, (part, magnitude) in zip(operands.segments(w), expected, strict=True):
        assert_close(side[:, at : at + segment.w.rows], part, magnitude, jnp.bfloat16)
        at += segment.w.padded_rows


def test_order_of_segments():
    w = site_of(9, 96, 24, (4, 4), side=8, ranks=(11, 5))
    for segment, matrix in zip(operands.segments(w), (w.groups[1].w, w.groups[2].w, w.branches.v), strict=True):
        assert segment.w is matrix


@pytest.mark.parametrize("served", ["text", "vision", "both"])
def test_without_a_mask_all_tokens_are_text(served):
    w = replace(site_of(9, 96, 24, (4, 4), side=8, ranks=(11, 5)), mac_tokens=served)
    x = tokens_of(9, 4, 96, jnp.float32)
    assert (linear(x, w) == linear(x, w, jnp.ones(4, bool))).all()
    assert bool((linear(x, w) == linear(x, w, jnp.zeros(4, bool))).all()) == (served == "both")


@pytest.mark.parametrize(("bits", "count", "group"), [(4, 20, 0), (4, 20, 128), (3, 20, 64), (4, 260, 32), (3, 300, 128)])
def test_sites_with_float_activations(backend, bits, count, group):
    """Scales per column, and per group of rows beside side groups and CWS; 896 rows of 3 bits do not fill the words."""
    w = site_of(9, 1024, 136, (bits, 16), ranks=(48, 0), transform=False, scales=896 // group if group else 1)
    x = tokens_of(9, count, 1024)
    bias = jnp.asarray(np.random.default_rng(3).standard_normal(136), jnp.float32)
    a = run(api.quantize_activations, x, w, None, backend=backend)
    assert a.scale is None
    got = run(api.quantized_matmul, a, w, bias, backend=backend)
    scaled = backend == "tpu" and group and count > 256
    assert_close(got, *numpy_product(backend, a, w, bias, scaled=scaled), jnp.bfloat16)
    whole = run(api.split_matmul, x, w, None, bias, backend=backend)
    np.testing.assert_array_equal(np.asarray(whole), np.asarray(got))

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from splitq_jax import numerics, packing
from splitq_jax.qtensor import from_codes, integer_dot, quantize_columns, quantize_rows


def reference(x, bits, clip=1.0):
    """The formula in plain float64 numpy: one scale per row."""
    top = 2 ** (bits - 1) - 1
    scale = clip * np.abs(x).max(-1, keepdims=True) / top
    scale = np.where(scale == 0, 1, scale)
    return np.clip(np.round(x / scale), -top - 1, top) * scale


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("clip", [1.0, 0.6])
def test_quantization_is_the_formula(bits, clip):
    x = np.random.default_rng(bits).standard_normal((37, 50))
    pair = jnp.full((2,), clip)
    got = numerics.fake_quantize(jnp.asarray(x, jnp.float32), bits, pair)
    np.testing.assert_allclose(got, reference(x, bits, clip), atol=2e-6)
    scale = numerics.scale_of(jnp.asarray(x, jnp.float32), bits, pair)
    codes = numerics.encode(jnp.asarray(x, jnp.float32), scale, bits)
    np.testing.assert_allclose(np.asarray(codes) * np.asarray(scale), got, atol=1e-6)
    assert codes.min() >= -(2 ** (bits - 1)) and codes.max() <= 2 ** (bits - 1) - 1


def test_two_bits_are_four_levels():
    codes = numerics.encode(jnp.array([[-2.0, -1.0, 0.0, 1.0]]), jnp.ones((1, 1)), 2)
    assert codes.tolist() == [[-2, -1, 0, 1]]
    assert numerics.fake_quantize(jnp.array([[-2.0, 0.4, 1.0]]), 2, jnp.full((2,), 0.5)).tolist() == [[-2.0, 0.0, 1.0]]


def test_decode_is_within_half_a_step():
    x = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32)
    q = quantize_rows(jnp.asarray(x), 4)
    assert np.all(np.abs(q.decode() - x) <= q.scale / 2 * (1 + 1e-5))


def test_zero_rows_have_a_scale_and_sixteen_bits_are_float():
    x = jnp.zeros((3, 8))
    assert numerics.scale_of(x, 4).tolist() == [[1.0]] * 3
    # a denormal maximum, which XLA takes for zero on CPUs alone, and one whose step is the smallest normal number
    small = jnp.array([[1e-40], [7 * np.finfo(np.float32).tiny]])
    assert numerics.scale_of(small, 4).tolist() == [[1.0]] * 2
    assert not jnp.isnan(jax.grad(lambda v: numerics.fake_quantize(v, 3).sum())(x)).any()
    y = jax.random.normal(jax.random.key(0), (4, 9))
    assert (numerics.fake_quantize(y, 16) == y).all()
    broken = numerics.scale_of(jnp.array([[0.0, jnp.nan], [0.0, 7.0]]), 4)
    assert jnp.isnan(broken[0]).all() and broken[1] == 1  # never silently wrong
    # one compiled function serves every width
    f = jax.jit(numerics.fake_quantize)
    for bits in (2, 4, 16):
        np.testing.assert_allclose(f(y, bits), numerics.fake_quantize(y, bits), atol=1e-6)


def test_a_clip_pair_treats_the_signs_apart():
    x = jnp.array([[4.0, -2.0, 1.0]])
    assert numerics.clipped_absmax(x, jnp.array([0.25, 1.0]), -1).tolist() == [[2.0]]
    assert numerics.clipped_absmax(x, jnp.array([1.0, 0.1]), -1).tolist() == [[4.0]]


def test_the_gradient_of_a_maximum_survives_another_rounding_of_it():
    """XLA may compute the array once more for the gradient; where `jnp.max` finds no entry equal then, its gradient is NaN."""
    x = jnp.array([[2.0, -2.0 * (1 - 2.0**-23), 1.0], [0.0, 0.0, 0.0]])
    gradient = jax.grad(lambda x: jnp.sum(numerics.clipped_absmax(x, None, -1)))(x)
    np.testing.assert_allclose(gradient[0], [0.5, -0.5, 0.0])
    assert jnp.isfinite(gradient).all()


def test_gradients_pass_rounding_but_not_clamped_values_and_reach_clip_and_absmax():
    x = jnp.array([[0.9, 0.3, -0.2, 2.0]])

    def loss(x, clip):
        return jnp.sum(numerics.fake_quantize(x, 4, jnp.stack([clip, clip])) * jnp.array([[1.0, 1.0, 1.0, 3.0]]))

    gx, gclip = jax.grad(loss, (0, 1))(x, jnp.array(0.5))
    scale, top = 0.5 * 2.0 / 7, 7
    # d(code * scale)/d scale: top for the clamped entry, code - x/scale for the others
    inner = sum(np.round(v / scale) - v / scale for v in (0.9, 0.3, -0.2)) + 3 * top
    np.testing.assert_allclose(gx, [[1, 1, 1, inner * 0.5 / 7]], rtol=1e-4)
    np.testing.assert_allclose(gclip, inner * 2.0 / 7, rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("axis", [0, 1])
def test_gradients_are_those_of_torch(bits, axis):
    """Values of the extreme codes count whole: at 2 bits that is most of them."""
    rng = np.random.default_rng(bits)
    x, upstream, logits = (rng.standard_normal(shape).astype(np.float32) for shape in ((12, 20), (12, 20), (2, 20)))
    logits = logits if axis == 0 else logits[:, :1]  # a factor for each column, or one for all rows

    def ours(x, logits):
        return numerics.fake_quantize(x, bits, jax.nn.sigmoid(logits if axis == 0 else logits[:, 0]), axis)

    value, pull = jax.vjp(ours, jnp.asarray(x), jnp.asarray(logits))
    xt, lt = (torch.tensor(a, requires_grad=True) for a in (x, logits))
    high, low = (torch.clamp(torch.amax(side, axis, keepdim=True), min=0) for side in (xt, -xt))
    clip = torch.sigmoid(lt)
    scale = torch.maximum(clip[:1] * high, clip[1:] * low) / (2 ** (bits - 1) - 1)
    t = xt / scale
    through = t + (torch.round(t) - t).detach()
    y = torch.clamp(through, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale if bits < 16 else xt + 0 * scale
    y.backward(torch.tensor(upstream))
    np.testing.assert_allclose(value, y.detach(), atol=1e-6)
    for got, tensor in zip(pull(jnp.asarray(upstream)), (xt, lt), strict=True):
        np.testing.assert_allclose(got, tensor.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 7, 16, 31, 32, 33, 560])
def test_packing_round_trips(bits, rows):
    codes = np.random.default_rng(rows).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, 5)).astype(np.int8)
    words = packing.pack(jnp.asarray(codes), bits)
    assert (packing.unpack(words, bits, rows) == codes).all()
    stored = sum(w.size * w.dtype.itemsize for w in words) * 8
    slab = {2: 16, 3: 32, 4: 8, 8: 1}[bits]
    assert stored == -(-rows // slab) * slab * bits * 5  # really small: no bit beyond the padding of a slab


def test_packed_layout_is_the_documented_one():
    codes = jnp.arange(-8, 8, dtype=jnp.int8)[:, None]
    (words,) = packing.pack(codes, 4)
    expected = [sum((int(c) & 15) << (4 * j) for j, c in enumerate(range(-8 + 8 * k, 8 * k))) for k in range(2)]
    assert (np.asarray(words).view(np.uint32)[:, 0] == np.array(expected, np.uint32)).all()
    # one slab of 64 rows: three planes of two words; rows 0-47 in the upper bits, rows 48-63 in the lowest
    codes = np.array([(5 * r + r // 7) % 8 - 4 for r in range(64)])
    expected = np.zeros((3, 2), np.uint32)
    for r, code in enumerate(codes & 7):
        quarter, k, j = r // 16, r % 16 // 8, r % 8
        if quarter < 3:
            expected[quarter, k] |= np.uint32(int(code) << (4 * j + 1))
        else:
            for b in range(3):
                expected[b, k] |= np.uint32((int(code) >> b & 1) << (4 * j))
    (words,) = packing.pack(jnp.asarray(codes, jnp.int8)[:, None], 3)
    assert (np.asarray(words).view(np.uint32)[:, 0] == expected.reshape(-1)).all()


def test_wide_matrices_are_stored_in_whole_tiles():
    codes = np.random.default_rng(0).integers(-4, 4, (1100, 2)).astype(np.int8)
    (words,) = packing.pack(jnp.asarray(codes), 3)
    assert words.shape == (5 * 24, 2) and packing.padded_rows(1100, 3) == 1280  # slabs of 256 rows, three tiles of 8 words each
    # the second slab alone is rows 256 to 511: slabs can be dealt to devices
    assert (packing.unpack((words[24:48],), 3, 256) == codes[256:512]).all()
    (words,) = packing.pack(jnp.asarray(codes[:512]), 3)  # whole slabs below 1024 rows are cut likewise
    assert (packing.unpack((words[24:],), 3, 256) == codes[256:512]).all()
    (words,) = packing.pack(jnp.asarray(codes), 4, multiple=64)
    assert words.shape == (1152 // 8, 2) and (packing.unpack((words,), 4, 1100) == codes).all()


def test_integer_dot_is_exact():
    rng = np.random.default_rng(0)
    a, b = rng.integers(-128, 128, (9, 4096), np.int8), rng.integers(-8, 8, (4096, 33), np.int8)
    assert (integer_dot(jnp.asarray(a), jnp.asarray(b)) == a.astype(np.int64) @ b.astype(np.int64)).all()
    extreme = np.full((2, 8192), -128, np.int8)
    assert (integer_dot(jnp.asarray(extreme), jnp.asarray(extreme.T)) == 8192 * 128 * 128).all()


def test_rows_and_columns_scales():
    w = jax.random.normal(jax.random.key(1), (24, 10))
    assert quantize_columns(w, 4).scale.shape == (1, 10)
    assert quantize_rows(w, 4).scale.shape == (24, 1)
    q = from_codes(jnp.ones((24, 10), jnp.int8), jnp.full((1, 10), 2.0), 3)
    assert q.shape == (24, 10) and (q.decode() == 2).all()


def test_gaussian_clip_falls_with_bits_and_width():
    assert [round(numerics.gaussian_clip(b, 3584), 2) for b in (4, 3, 2)] == [0.65, 0.5, 0.3]
    assert numerics.gaussian_clip(4, 32) > numerics.gaussian_clip(4, 552) > numerics.gaussian_clip(4, 3584)

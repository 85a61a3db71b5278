import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitq_jax import transforms
from splitq_jax.transforms import Transform, apply, apply_inverse


@given(st.integers(1, 20000))
@settings(max_examples=60, deadline=None)
def test_factors_are_the_nearest_divisors(size):
    n1, n2 = transforms.factors(size)
    assert n1 * n2 == size and n1 <= n2
    assert not any(size % n == 0 for n in range(n1 + 1, int(size**0.5) + 1))


@pytest.mark.parametrize(
    ("size", "expected"), [(560, (20, 28)), (1472, (32, 46)), (3584, (56, 64)), (18946, (2, 9473)), (13, (1, 13))]
)
def test_factors_end_for_every_parity(size, expected):
    assert transforms.factors(size) == expected


@pytest.mark.parametrize("n1", [1, 3])
def test_apply_is_the_dense_matrix(n1):
    rng = np.random.default_rng(0)
    d, p1, p2 = rng.uniform(0.5, 2, 12), rng.standard_normal((n1, n1)), rng.standard_normal((12 // n1, 12 // n1))
    dense = np.diag(d) @ (p2 if n1 == 1 else np.kron(p1, p2))
    d, p1, p2 = (jnp.asarray(a, jnp.float32) for a in (d, p1, p2))
    t = Transform(d, None if n1 == 1 else p1, p2)
    x, w = rng.standard_normal((5, 12)), rng.standard_normal((12, 7))
    np.testing.assert_allclose(apply(t, jnp.asarray(x, jnp.float32)), x @ dense, atol=1e-5)
    np.testing.assert_allclose(apply_inverse(t, jnp.asarray(w, jnp.float32)), np.linalg.solve(dense, w), atol=2e-4)


@pytest.mark.parametrize("size", [8, 32, 46, 560, 1472])
def test_transform_and_inverse_cancel(size):
    n1, n2 = transforms.factors(size)
    d = jnp.exp(jax.random.normal(jax.random.key(0), (size,)))
    t = Transform(d, jnp.asarray(transforms.orthogonal(n1, 1)), jnp.asarray(transforms.orthogonal(n2, 2)))
    x, w = jax.random.normal(jax.random.key(1), (6, size)), jax.random.normal(jax.random.key(2), (size, 9))
    np.testing.assert_allclose(apply(t, x) @ apply_inverse(t, w), x @ w, atol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 12, 20, 23, 35, 48, 576, 1536])
def test_hadamard_is_orthogonal_and_flat(size):
    h = transforms.hadamard(size)
    np.testing.assert_allclose(h @ h.T, np.eye(size), atol=1e-5)
    flatness = np.abs(h).max() * np.sqrt(size)
    assert flatness <= (1 + 1e-4 if size in {1, 2, 12, 20, 48, 576, 1536} else np.sqrt(2) + 1e-4)


@pytest.mark.parametrize(
    ("size", "flat"), [(28, True), (36, True), (56, True), (148, True), (3584, True), (18944, False), (52, False)]
)
def test_orders_that_paley_knows(size, flat):
    """3584 and 148 are widths of Qwen2.5-VL 7B's sites (18,944 is 128 times 148); 52 would need a field of 25 elements."""
    h = transforms.hadamard(size) if size < 5000 else transforms.hadamard(148)
    np.testing.assert_allclose(h @ h.T, np.eye(len(h)), atol=1e-5)
    assert (np.abs(h).max() * np.sqrt(len(h)) < 1 + 1e-4) == (flat or size == 18944)


def test_smoothing_is_smoothquant_and_survives_dead_channels():
    d = transforms.smoothing(jnp.array([4.0, 0.0, 1.0]), jnp.array([9.0, 1.0, 0.0]), 0.5, 1.5)
    np.testing.assert_allclose(d, [3 / 8, 1.0, 1.0])

import jax.numpy as jnp
import numpy as np
import pytest

from splitq_jax.errors import InputError
from splitq_jax.qtensor import quantize_columns
from splitq_jax.rounding import error_spread, gptq

D, N = 64, 96


def test_gptq_beats_nearest_on_correlated_inputs():
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((D, 8)) @ rng.standard_normal((8, D)) + 0.3 * np.eye(D)
    x = jnp.asarray(rng.standard_normal((500, D)) @ mix, jnp.float32)
    w = jnp.asarray(rng.standard_normal((D, N)), jnp.float32)
    (repaired,) = gptq([w], x.T @ x, [3], [None])
    errors = [float(jnp.sum((x @ q.decode() - x @ w) ** 2)) for q in (repaired, quantize_columns(w, 3))]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize(("sizes", "group"), [((6,), None), ((150, 20, 10), None), ((150, 20, 10), 30)])
def test_gptq_is_its_sequential_definition(sizes, group):
    """Each row's rounding error, spread by least squares on the rows that follow (OBQ), in float64; parts have scales and bits."""
    rng = np.random.default_rng(1)
    rows, count = sum(sizes), 10 * sum(sizes)
    x, w = rng.standard_normal((count, rows)), rng.standard_normal((rows, 4))
    h = x.T @ x
    damped = h + 0.01 * np.mean(np.diag(h)) * np.eye(rows)
    bits, parts = [3, 4, 4][-len(sizes) :], np.split(w, np.cumsum(sizes)[:-1])
    top = np.repeat([2 ** (b - 1) - 1 for b in bits], sizes)[:, None]
    sharing = [rows for i, p in enumerate(parts) for rows in np.split(p, len(p) // group if group and i == 0 else 1)]
    scale = np.concatenate([np.broadcast_to(np.abs(p).max(0), p.shape) for p in sharing]) / top
    left, codes = w.copy(), np.zeros(w.shape)
    for k in range(rows):
        codes[k] = np.clip(np.round(left[k] / scale[k]), -top[k] - 1, top[k])
        error = left[k] - codes[k] * scale[k]
        # minimise (e, d)^T H (e, d) over the later rows' change d
        if k < rows - 1:
            left[k + 1 :] += np.linalg.solve(damped[k + 1 :, k + 1 :], damped[k + 1 :, k : k + 1]) @ error[None]
    got = gptq([jnp.asarray(p, jnp.float32) for p in parts], jnp.asarray(h, jnp.float32), bits, [None] * len(sizes), group=group)
    assert [q.bits for q in got] == bits
    assert (np.concatenate([q.codes() for q in got]) == codes).all()


def few_dominate():
    """Twenty directions with channels of very different sizes: the damping alone keeps the Hessian positive definite."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2000, 20)) @ rng.standard_normal((20, 500)) * np.exp(2 * rng.standard_normal(500))
    return np.float64(np.float32(x.T @ x))


def assert_spreads(got, h, damping, atol):
    expected = np.linalg.cholesky(np.linalg.inv(h + damping * np.mean(np.diag(h)) * np.eye(len(h)))).T
    assert (np.abs(got - expected) / np.diag(expected)[:, None]).max() < atol


def test_errors_spread_as_in_float64():
    h = few_dominate()
    assert_spreads(error_spread(jnp.asarray(h, jnp.float32)), h, 0.01, 1e-5)


def test_a_sum_of_squares_that_rounding_made_indefinite_is_damped_more():
    h = few_dominate()
    noise = np.random.default_rng(3).standard_normal(h.shape)
    h += 0.05 * np.mean(np.diag(h)) / np.sqrt(2 * len(h)) * (noise + noise.T)  # eigenvalues down to -0.1 of the mean diagonal
    h = np.float64(np.float32(h))
    assert np.linalg.eigvalsh(h).min() < -0.02 * np.mean(np.diag(h))
    got = np.asarray(error_spread(jnp.asarray(h, jnp.float32)))
    assert np.isfinite(got).all()
    assert_spreads(got, h, 0.1, 1e-4)


def test_a_hessian_that_is_not_finite_is_refused():
    with pytest.raises(InputError, match="not finite"):
        error_spread(jnp.full((3, 3), jnp.nan))


def test_a_channel_that_is_always_zero_spreads_nothing():
    h = few_dominate()
    h[3], h[:, 3] = 0, 0
    got = np.asarray(error_spread(jnp.asarray(h, jnp.float32)))
    assert np.isfinite(got).all()
    assert (np.delete(got[3], 3) == 0).all()

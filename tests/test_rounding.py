import jax.numpy as jnp
import numpy as np
import pytest

from splitq_jax.qtensor import quantize_columns
from splitq_jax.rounding import gptq

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

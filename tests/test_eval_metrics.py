import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from splitq_jax.eval.metrics import kl_divergence, perplexity, wilson


def test_wilson_against_published_values() -> None:
    # Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29
    for (correct, total), (low, high) in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        np.testing.assert_allclose(wilson(correct, total), (low, high), atol=5e-5)


def test_wilson_solves_its_equation() -> None:
    """Its ends are where the observed share is exactly 1.96 standard errors away."""
    low, high = wilson(37, 50)
    for end in (low, high):
        assert abs(0.74 - end) / math.sqrt(end * (1 - end) / 50) == pytest.approx(1.959964, rel=1e-6)
    assert wilson(50, 50)[1] == 1.0


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= correct <= total"):
        wilson(correct, total)


def test_kl_against_numpy() -> None:
    rng = np.random.default_rng(0)
    p, q = (rng.dirichlet(np.full(11, 0.4), size=(3, 5)) for _ in range(2))
    expected = np.zeros((3, 5))
    for i in np.ndindex(3, 5):
        expected[i] = sum(a * math.log(a / b) for a, b in zip(p[i], q[i], strict=True))
    found = kl_divergence(jnp.log(jnp.asarray(p, jnp.float32)), jnp.log(jnp.asarray(q, jnp.float32)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_kl_of_an_impossible_token() -> None:
    log_p = jax.nn.log_softmax(jnp.array([0.0, 0.0, -jnp.inf]))
    log_q = jnp.log(jnp.array([0.25, 0.25, 0.5]))
    assert kl_divergence(log_p, log_q) == pytest.approx(math.log(2))
    assert kl_divergence(log_p, log_p) == 0


def test_perplexity_of_a_uniform_guess() -> None:
    assert perplexity(np.full(7, -math.log(13), np.float32)) == pytest.approx(13, rel=1e-5)

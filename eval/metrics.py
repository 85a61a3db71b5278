"""What was lost: accuracy and its interval, KL divergence, perplexity."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Z95 = 1.959963984540054


def wilson(correct: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion (Wilson 1927), by default at 95 %.

    ``(p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)``. Unlike Wald's it stays inside [0, 1] and is not empty at 0
    or 1. It takes the answers to be independent; questions behind one image are nearly so, not quite.

    Raises:
      ValueError: no question, or more correct answers than questions.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} correct answers of {total}: expected 0 <= correct <= total and at least one question")
    p, zz = correct / total, z * z / total
    middle, half = p + zz / 2, z * math.sqrt(p * (1 - p) / total + zz / (4 * total))
    return max(0.0, (middle - half) / (1 + zz)), min(1.0, (middle + half) / (1 + zz))


def kl_divergence(log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """Return ``KL(p || q) = sum_v p_v (log p_v - log q_v)`` in nats; a term with ``p_v = 0`` is 0."""
    p = jnp.exp(log_p)
    return jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0.0), axis=-1)


def perplexity(log_prob: Float[np.ndarray, " T"]) -> float:
    """Return ``exp(-mean log p)`` over tokens, from natural logarithms."""
    return float(np.exp(-np.mean(log_prob, dtype=np.float64)))

"""What was lost: accuracy and its interval, a paired comparison, KL divergence, perplexity."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy.stats import binomtest

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


@dataclass(frozen=True)
class Paired:
    """Two methods on the same questions.

    Attributes:
      difference: accuracy of the first less that of the second.
      interval: its 95 % interval, from the discordant pairs.
      p_value: McNemar's exact test (two-sided) of no difference.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float


def paired(first: Bool[np.ndarray, " Q"], second: Bool[np.ndarray, " Q"]) -> Paired:
    """Compare two methods question by question, which is far sharper than comparing their two intervals.

    Raises:
      ValueError: different numbers of questions, or none.
    """
    if first.shape != second.shape or first.size == 0:
        raise ValueError(f"{first.size} and {second.size} answers: expected the same questions, at least one")
    n, gained, lost = first.size, int(np.sum(first & ~second)), int(np.sum(~first & second))
    difference = (gained - lost) / n
    half = Z95 * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return Paired(difference, (difference - half, difference + half), p_value)


def kl_divergence(log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """Return ``KL(p || q) = sum_v p_v (log p_v - log q_v)`` in nats; a term with ``p_v = 0`` is 0."""
    p = jnp.exp(log_p)
    return jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0.0), axis=-1)


def perplexity(log_prob: Float[np.ndarray, " T"]) -> float:
    """Return ``exp(-mean log p)`` over tokens, from natural logarithms."""
    return float(np.exp(-np.mean(log_prob, dtype=np.float64)))

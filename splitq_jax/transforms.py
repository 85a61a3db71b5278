"""Equivalent transforms ``Y = (X P)(P^-1 W)`` with ``P = diag(d) (P1 (x) P2)`` (FlatQuant, arXiv 2410.09426, eq. 3).

A token is scaled by ``d``, reshaped to ``V`` of shape ``(n1, n2)`` and mapped to ``P1^T V P2``. SmoothQuant is ``d`` alone, QuaRot is
Hadamard factors, a dense transform is ``n1 = 1``.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float
from scipy.linalg import hadamard as sylvester


@struct.dataclass
class Transform:
    """``P = diag(d) (p1 (x) p2)``; a part that is None is the identity, and ``p1`` is None where ``n1 = 1``.

    A 1 x 1 factor is a scale, which quantization with a scale a token does not see: its gradient is rounding noise, and an optimizer
    that normalises gradients would walk along it at random.
    """

    d: Float[Array, " K"] | None
    p1: Float[Array, "n1 n1"] | None
    p2: Float[Array, "n2 n2"] | None


NEWTON_STEPS = 40  # enough for conditions up to 10^5, past what float32 inverts
IDENTITY = Transform(None, None, None)


def apply(t: Transform, x: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
    """Return ``X P``."""
    if t.d is not None:
        x = x * t.d.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    if t.p2 is None:
        return x
    p2 = t.p2.astype(x.dtype)
    if t.p1 is None:
        return x @ p2
    v = x.reshape(*x.shape[:-1], t.p1.shape[0], t.p2.shape[0])  # *B n1 n2
    v = jnp.einsum("...ij,ia->...aj", v, t.p1.astype(x.dtype))  # in this order XLA copies less on TPU
    v = jnp.einsum("...aj,jb->...ab", v, p2)
    return v.reshape(x.shape)


@jax.jit
def apply_inverse(t: Transform, w: Float[Array, "K N"]) -> Float[Array, "K N"]:
    """Return ``P^-1 W``."""
    if t.d is not None:
        w = w / t.d[:, None]
    if t.p2 is None:
        return w
    q2 = inverse(t.p2)
    if t.p1 is None:
        return q2 @ w
    q1 = inverse(t.p1)
    v = w.reshape(t.p1.shape[0], t.p2.shape[0], -1)  # n1 n2 N
    v = jnp.einsum("ai,ijn->ajn", q1, v)
    v = jnp.einsum("bj,ajn->abn", q2, v)
    return v.reshape(w.shape)


@jax.custom_vjp
def inverse(p: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Return ``P^-1`` by Newton and Schulz's iteration ``X <- X (2 I - P X)``, from ``P^T / |P|_F^2``.

    It is matrix products alone: it compiles in a tenth of the time of a pivoted factorization, of which a block has dozens, and runs
    well on TPU. It doubles the digits in each step once ``log2(n cond(P)^2)`` steps have brought it near.
    """
    twice = 2 * jnp.eye(p.shape[0], dtype=p.dtype)
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    start = p.T / jnp.sum(p**2)
    return jax.lax.fori_loop(0, NEWTON_STEPS, lambda _, x: product(x, twice - product(p, x)), start)


def _inverse_forward(p: Float[Array, "n n"]) -> tuple[Float[Array, "n n"], Float[Array, "n n"]]:
    q = inverse(p)
    return q, q


def _inverse_backward(q: Float[Array, "n n"], gradient: Float[Array, "n n"]) -> tuple[Float[Array, "n n"]]:
    return (-(q.T @ gradient @ q.T),)  # d(P^-1) = -P^-1 dP P^-1


inverse.defvjp(_inverse_forward, _inverse_backward)


def factors(size: int) -> tuple[int, int]:
    """Return the divisors ``n1 <= n2`` of ``size`` nearest to its square root; a prime has only ``1 * size``."""
    n1 = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    return n1, size // n1


def orthogonal(size: int, seed: int) -> Float[np.ndarray, "n n"]:
    """Draw a Haar-distributed orthogonal matrix, float32."""
    q, r = np.linalg.qr(np.random.default_rng((seed, size)).standard_normal((size, size)))
    return np.asarray(q * np.sign(np.diag(r)), np.float32)


def hadamard(size: int) -> Float[np.ndarray, "n n"]:
    """Return an orthogonal matrix with entries of like magnitude, float32.

    ``size = 2^k m``: Sylvester's matrix for powers of two times, where the odd part m is not 1, one of Paley's two constructions (orders
    ``q + 1`` with a prime ``q = 3 mod 4``, ``2 (q + 1)`` with a prime ``q = 1 mod 4``) or, where there is none of these of order 4 m to 16 m,
    the orthonormal cosine transform of size m.
    """
    power = size & -size
    if power == size:
        h = sylvester(size) if size > 1 else np.ones((1, 1))
        return np.asarray(h / math.sqrt(size), np.float32)
    # smallest multiple of the odd part that Paley knows and that leaves a power of two
    odd = size // power
    for twos in (4, 8, 16):
        if twos <= power and (paley := _paley(odd * twos)) is not None:
            return np.asarray(np.kron(hadamard(power // twos), paley / math.sqrt(odd * twos)), np.float32)
    i = np.arange(odd)
    cosine = np.cos(np.pi * (2 * i[None, :] + 1) * i[:, None] / (2 * odd)) * math.sqrt(2 / odd)
    cosine[0] /= math.sqrt(2)
    return np.asarray(np.kron(hadamard(power), cosine), np.float32)


def _paley(order: int) -> Float[np.ndarray, "n n"] | None:
    """Return Paley's Hadamard matrix of an order (R. E. A. C. Paley 1933, "On orthogonal matrices"), None where neither construction has one."""
    q = order - 1
    if q % 4 == 3 and _is_prime(q):
        h = np.ones((order, order))
        h[1:, 1:] = _jacobsthal(q) + np.eye(q)
        h[1:, 0] = -1
        return h
    q = order // 2 - 1
    if order % 2 == 0 and q % 4 == 1 and _is_prime(q):
        conference = np.pad(_jacobsthal(q), ((1, 0), (1, 0)), constant_values=1)
        conference[0, 0] = 0
        return np.kron(conference, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])
    return None


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % f for f in range(2, math.isqrt(q) + 1))


def _jacobsthal(q: int) -> Float[np.ndarray, "q q"]:
    """Return the matrix of ``chi(j - i)``, 1 for squares mod q, -1 for others, 0 for 0."""
    squares = {i * i % q for i in range(1, q)}
    chi = np.array([0] + [1 if i in squares else -1 for i in range(1, q)])
    return np.asarray(chi[(np.arange(q)[None, :] - np.arange(q)[:, None]) % q], np.float64)


def smoothing(x_absmax: Float[Array, " K"], w_absmax: Float[Array, " K"], w_power: float, x_power: float) -> Float[Array, " K"]:
    """Return ``d = w_absmax^w_power / x_absmax^x_power`` (SmoothQuant, arXiv 2211.10438, eq. 4, inverted: it multiplies X).

    Channels that are zero in the activations or in the weight get 1.
    """
    live = (x_absmax > 0) & (w_absmax > 0)
    safe_x, safe_w = jnp.where(live, x_absmax, 1), jnp.where(live, w_absmax, 1)
    return jnp.where(live, jnp.clip(safe_w**w_power / safe_x**x_power, 1e-5, 1e5), 1.0)

"""Weight rounding: to nearest, or GPTQ (arXiv 2210.17323, algorithm 1), which repairs each row's error in the rows that follow."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from splitq_jax.numerics import FLOAT_BITS, code_range, scale_of
from splitq_jax.qtensor import QTensor, from_codes, quantize_matrix

DAMPING = 0.01  # share of the mean diagonal that is added to the Hessian, as in the paper's code


def gptq(w: Float[Array, "K N"], hessian: Float[Array, "K K"], bits: int, clip: Float[Array, "2 N"] | None = None) -> QTensor:
    """Round ``w`` row by row so that ``(w - Q(w))^T H (w - Q(w))`` stays small.

    Args:
      w: the matrix.
      hessian: ``X^T X`` of the inputs that ``w`` meets.
      bits: code bits.
      clip: LWC's factors; the scales are those of rounding to nearest.
    """
    quantized: QTensor
    if bits >= FLOAT_BITS:
        quantized = quantize_matrix(w, bits, clip)
        return quantized
    rows = w.shape[0]
    diagonal = jnp.diag(hessian)
    dead = diagonal == 0  # a channel that is always zero: its weight does not matter
    damped = hessian + jnp.diag(jnp.where(dead, 1.0, 0.0) + DAMPING * jnp.mean(diagonal))
    # upper Cholesky factor of the inverse: row k holds how the error of row k spreads to the rows after it
    upper = jnp.linalg.cholesky(jnp.linalg.inv(damped)).T
    scale = scale_of(w, bits, clip, axis=0)
    low, high = code_range(bits)

    def step(k: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        left, codes = state
        row = left[k]
        code = jnp.clip(jnp.round(row / scale[0]), low, high)
        error = (row - code * scale[0]) / upper[k, k]
        after = jnp.where(jnp.arange(rows) > k, upper[k], 0.0)
        return left - after[:, None] * error[None, :], codes.at[k].set(code)

    _, codes = jax.lax.fori_loop(0, rows, step, (w, jnp.zeros_like(w)))
    quantized = from_codes(codes.astype(jnp.int8), scale, bits)
    return quantized

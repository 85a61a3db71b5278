"""Weight rounding: to nearest, or GPTQ (arXiv 2210.17323, algorithm 1), which repairs each row's error in the rows that follow."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from splitq_jax.numerics import FLOAT_BITS, code_range, scale_of
from splitq_jax.qtensor import QTensor, from_codes, quantize_matrix

DAMPING = 0.01  # share of the mean diagonal that is added to the Hessian, as in the paper's code
BLOCK = 128  # rows whose errors reach the rest in one product, as there


def gptq(
    parts: Sequence[Float[Array, "_ N"]],
    hessian: Float[Array, "K K"],
    bits: Sequence[int],
    clips: Sequence[Float[Array, "2 N"] | None],
    multiple: int = 1,
) -> list[QTensor]:
    """Round a matrix row by row so that ``(w - Q(w))^T H (w - Q(w))`` stays small.

    Args:
      parts: the matrix, cut into groups of rows that have scales of their own; the errors of one are repaired in the next as well.
      hessian: ``X^T X`` of the inputs that the whole matrix meets.
      bits: code bits of each part; where any is float, all are rounded to nearest.
      clips: LWC's factors of each part; the scales are those of rounding to nearest.
      multiple: of rows, to which the words are padded.
    """
    if max(bits) >= FLOAT_BITS:
        return [quantize_matrix(w, b, clip, multiple=multiple) for w, b, clip in zip(parts, bits, clips, strict=True)]
    scales = [scale_of(w, b, clip, axis=0) for w, b, clip in zip(parts, bits, clips, strict=True)]
    ends = np.cumsum([w.shape[0] for w in parts])
    part = np.repeat(np.arange(len(parts)), np.diff(ends, prepend=0))
    codes = _codes(jnp.concatenate(parts), hessian, jnp.concatenate(scales), jnp.asarray(part), jnp.asarray(bits))
    cut = jnp.split(codes, ends[:-1].tolist())
    return [from_codes(c, scale, b, multiple) for c, scale, b in zip(cut, scales, bits, strict=True)]


@jax.jit
def _codes(
    w: Float[Array, "K N"],
    hessian: Float[Array, "K K"],
    scales: Float[Array, "G N"],
    part: Int[Array, " K"],
    bits: Int[Array, " G"],
) -> Int[Array, "K N"]:
    rows = w.shape[0]
    diagonal = jnp.diag(hessian)
    dead = diagonal == 0  # a channel that is always zero: its weight does not matter
    damped = hessian + jnp.diag(jnp.where(dead, 1.0, 0.0) + DAMPING * jnp.mean(diagonal))
    # upper Cholesky factor of the inverse: row k holds how the error of row k spreads to the rows after it
    upper = jnp.linalg.cholesky(jnp.linalg.inv(damped)).T
    blocks = -(-rows // BLOCK)
    spare = blocks * BLOCK - rows
    upper, w = jax.scipy.linalg.block_diag(upper, jnp.eye(spare)), jnp.pad(w, ((0, spare), (0, 0)))
    low, high = code_range(bits)

    def block(b: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        left, codes = state
        first = b * BLOCK
        spread = jax.lax.dynamic_slice_in_dim(upper, first, BLOCK)
        own = jax.lax.dynamic_slice_in_dim(spread, first, BLOCK, axis=1)

        # rows that are done change too, and are not read again
        def step(k: int, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            left, codes, errors = state
            g = part[jnp.minimum(first + k, rows - 1)]
            code = jnp.clip(jnp.round(left[k] / scales[g]), low[g], high[g])
            error = (left[k] - code * scales[g]) / own[k, k]
            return left - own[k][:, None] * error[None, :], codes.at[k].set(code), errors.at[k].set(error)

        here = jax.lax.dynamic_slice_in_dim(left, first, BLOCK)
        _, done, errors = jax.lax.fori_loop(0, BLOCK, step, (here, jnp.zeros_like(here), jnp.zeros_like(here)))
        return left - spread.T @ errors, jax.lax.dynamic_update_slice_in_dim(codes, done.astype(jnp.int8), first, axis=0)

    _, codes = jax.lax.fori_loop(0, blocks, block, (w, jnp.zeros(w.shape, jnp.int8)))
    return codes[:rows]

"""Weight rounding: to nearest, or GPTQ (arXiv 2210.17323, algorithm 1), which repairs each row's error in the rows that follow."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, Int

from splitq_jax.errors import InputError
from splitq_jax.numerics import code_range, through_host
from splitq_jax.qtensor import QTensor, column_scales, from_codes
from splitq_jax.site import split

DAMPING = 0.01  # share of the mean diagonal that is added to the Hessian, as in the paper's code
BLOCK = 128  # rows whose errors reach the rest in one product, as there


def gptq(
    parts: Sequence[Float[Array, "_ N"]],
    hessian: Float[Array, "K K"],
    bits: Sequence[int],
    clips: Sequence[Float[Array, "2 G N"] | None],
    multiple: int = 1,
    group: int | None = None,
) -> list[QTensor]:
    """Round a matrix row by row so that ``(w - Q(w))^T H (w - Q(w))`` stays small.

    Args:
      parts: the matrix, cut into parts of rows that have scales of their own; the errors of one are repaired in the next as well.
      hessian: ``X^T X`` of the inputs that the whole matrix meets.
      bits: code bits of each part.
      clips: LWC's factors of each part; the scales are those of rounding to nearest.
      multiple: of rows, to which the words are padded.
      group: rows of the first part that share a scale; None: all, as in the others.

    Raises:
      InputError: a group that does not divide the rows; a Hessian that is not finite.
    """
    groups = [group, *[None] * (len(parts) - 1)]
    scales = [column_scales(w, b, clip, g) for w, b, clip, g in zip(parts, bits, clips, groups, strict=True)]
    sharing = np.concatenate([[w.shape[0] // len(s)] * len(s) for w, s in zip(parts, scales, strict=True)])
    scale = np.repeat(np.arange(len(sharing)), sharing)
    of_scale = np.repeat(bits, [len(s) for s in scales])
    codes = _codes(
        jnp.concatenate(parts), error_spread(hessian), jnp.concatenate(scales), jnp.asarray(scale), jnp.asarray(of_scale)
    )
    cut = split(codes, tuple(w.shape[0] for w in parts), axis=0)
    return [from_codes(c, scale, b, multiple) for c, scale, b in zip(cut, scales, bits, strict=True)]


def error_spread(hessian: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """Return the upper Cholesky factor of the damped Hessian's inverse: row k holds how the error of row k spreads to the rows after it.

    By LAPACK on the host, in float64: XLA takes minutes to compile a factorization of a thousand rows for a TPU, and hours for real ones.

    Raises:
      InputError: values that are not finite.
    """
    spread: Array = through_host(_error_spread, jax.ShapeDtypeStruct(hessian.shape, jnp.float32), hessian)
    return spread


def _error_spread(hessian: Array) -> Float[np.ndarray, "K K"]:
    flipped = np.array(hessian, np.float64)[::-1, ::-1]
    diagonal = np.diag(flipped).copy()
    mean = diagonal.mean()
    if not np.isfinite(flipped).all() or mean < 0:
        raise InputError("GPTQ: a Gram matrix is not finite; check the weights and the calibration samples")
    alive = np.where(diagonal == 0, 1.0, diagonal)  # a channel that is always zero: its weight does not matter
    damping = DAMPING
    while True:
        np.fill_diagonal(flipped, alive + damping * mean)
        try:
            lower = scipy.linalg.cholesky(flipped, lower=True, check_finite=False)
            break
        except np.linalg.LinAlgError:  # a sum in float32 that few tokens dominate may be indefinite by rounding
            damping *= 10
    # H = R R^T with R upper triangular, which is the flipped matrix's factor, flipped; H^-1 = R^-T R^-1 then has the factor R^-1
    inverse, _ = scipy.linalg.lapack.dtrtri(lower, lower=1, overwrite_c=1)
    return np.asarray(inverse[::-1, ::-1], np.float32)


@jax.jit
def _codes(
    w: Float[Array, "K N"],
    upper: Float[Array, "K K"],
    scales: Float[Array, "G N"],
    scale: Int[Array, " K"],
    bits: Int[Array, " G"],
) -> Int[Array, "K N"]:
    rows = w.shape[0]
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
            g = scale[jnp.minimum(first + k, rows - 1)]
            code = jnp.clip(jnp.round(left[k] / scales[g]), low[g], high[g])
            error = (left[k] - code * scales[g]) / own[k, k]
            return left - own[k][:, None] * error[None, :], codes.at[k].set(code), errors.at[k].set(error)

        here = jax.lax.dynamic_slice_in_dim(left, first, BLOCK)
        _, done, errors = jax.lax.fori_loop(0, BLOCK, step, (here, jnp.zeros_like(here), jnp.zeros_like(here)))
        return left - spread.T @ errors, jax.lax.dynamic_update_slice_in_dim(codes, done.astype(jnp.int8), first, axis=0)

    _, codes = jax.lax.fori_loop(0, blocks, block, (w, jnp.zeros(w.shape, jnp.int8)))
    return codes[:rows]

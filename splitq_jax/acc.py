"""ACC, adaptive cross-modal calibration: the low-rank branches of the main group (arXiv 2605.19929, sec. 3.3).

``W_m ~ U_r S_r V_r^T`` (truncated SVD of the untransformed main rows); ``U_* = P_m^-1 U_r``, ``V_* = S_r G_* V_r^T``. Only the diagonal gate
``G_*`` is learned. ``sqrt(S)`` goes to either side, which leaves the product alone and makes V's rows alike.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import struct
from jaxtyping import Array, Float

Branch = Literal["gated", "fixed", "free", "off"]
BRANCHES: tuple[str, ...] = get_args(Branch)


@struct.dataclass
class LowRank:
    """A learnable branch ``(P^-1 u) diag(gate) v`` of rank r.

    Attributes:
      u: ``U_r sqrt(S_r)``, before the transform.
      v: ``sqrt(S_r) V_r^T``.
      gate: the diagonal of ``G``.
      kind: ``gated`` learns the gate, ``free`` learns u and v, ``fixed`` learns nothing (``G = I``).
    """

    u: Float[Array, "K r"]
    v: Float[Array, "r N"]
    gate: Float[Array, " r"]
    kind: str = struct.field(pytree_node=False)


def rank_of(rate: float, rows: int, columns: int, width: int) -> int:
    """Return the rank: ``rate * min(rows, columns)``, at least 1, rounded up to a multiple of 16 where the site is 1024 or wider."""
    rank = max(1, round(rate * min(rows, columns)))
    return -(-rank // 16) * 16 if width >= 1024 else rank


def svd_factors(
    w: Float[Array, "K N"], ranks: Sequence[int], columns: tuple[int, ...] | None = None
) -> list[tuple[Float[Array, "K r"], Float[Array, "r N"]]]:
    """Return ``U_r sqrt(S_r)`` and ``sqrt(S_r) V_r^T`` of the main rows for every rank, from one decomposition.

    Args:
      w: the main rows, float32.
      ranks: the r.
      columns: None for one SVD a site, its layers side by side; else the output sizes of the site's layers: each has an SVD of its
        own with this rank, and the factors are laid side by side, V block-diagonal (so r is ``rank * len(columns)``).
    """
    if columns is not None:
        starts = np.cumsum((0, *columns))
        layers = zip(*(svd_factors(w[:, a:b], ranks) for a, b in pairwise(starts)), strict=True)
        return [
            (jnp.concatenate([u for u, _ in pairs], axis=1), jax.scipy.linalg.block_diag(*[v for _, v in pairs]))
            for pairs in layers
        ]
    # LAPACK through numpy: XLA's CPU decomposition takes seconds a layer
    most = max(ranks)
    shapes = (
        jax.ShapeDtypeStruct((w.shape[0], most), jnp.float32),
        jax.ShapeDtypeStruct((most, w.shape[1]), jnp.float32),
    )
    u, v = jax.pure_callback(lambda m: _svd(np.asarray(m), most), shapes, w)
    return [(u[:, :r], v[:r]) for r in ranks]


def _svd(w: Float[np.ndarray, "K N"], rank: int) -> tuple[Float[np.ndarray, "K r"], Float[np.ndarray, "r N"]]:
    # the leading pairs alone, from the smaller Gram matrix in float64: ten times as fast as the whole decomposition
    if w.shape[0] > w.shape[1]:
        v, u = _svd(w.T, rank)
        return np.ascontiguousarray(u.T), np.ascontiguousarray(v.T)
    exact = w.astype(np.float64)
    size = w.shape[0]
    squares, u = scipy.linalg.eigh(exact @ exact.T, subset_by_index=(size - rank, size - 1))
    u, root = u[:, ::-1], np.maximum(squares[::-1], 0.0) ** 0.25  # the root of a singular value
    v = (u.T @ exact) / np.maximum(root, np.finfo(np.float64).tiny)[:, None]  # sqrt(S) V^T = S^-1/2 U^T W
    return np.asarray(u * root, np.float32), np.asarray(np.where(root[:, None] > 0, v, 0), np.float32)

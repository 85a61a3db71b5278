"""ACC, adaptive cross-modal calibration: the low-rank branches of the main group (arXiv 2605.19929, sec. 3.3).

``W_m ~ U_r S_r V_r^T`` (truncated SVD of the untransformed main rows); ``U_* = P_m^-1 U_r``, ``V_* = S_r G_* V_r^T``. Only the diagonal gate
``G_*`` is learned. ``sqrt(S)`` goes to either side, which leaves the product alone and makes V's rows alike.

``U`` is rounded with a scale per column, ``V`` with one per row: both lie along the singular directions, where the gate lies too. So a gate
changes a scale and no code, ``Q(V_*) = G_* Q(V)``, and one pair of factors, rounded once, serves both branches:
``X U diag(g_s) V + D U diag(g_c) V = (X U g_s + D U g_c) V``.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import struct
from jaxtyping import Array, Float

from splitq_jax.numerics import through_host

Branch = Literal["gated", "fixed", "free", "off"]
BRANCHES: tuple[str, ...] = get_args(Branch)
BranchName = Literal["cws", "mac"]
BRANCH_NAMES: tuple[BranchName, ...] = get_args(BranchName)


@struct.dataclass
class LowRank:
    """The branches of a site, ``(P^-1 u) diag(gate) v`` each, of factors of R columns and rows.

    CWS has the first columns of ``u``, MAC the last, as many as their gates are long. The two overlap where they share factors: the
    shorter branch has the largest singular values, and the order is falling or rising so that those lie at its end.

    Attributes:
      u: ``U_r sqrt(S_r)``, before the transform; codes of ``P^-1 u`` in a quantized site.
      v: ``sqrt(S_r) V_r^T``, or its codes.
      cws: the diagonal of CWS's gate, None where it is off.
      mac: the diagonal of MAC's gate, None where it is off.
    """

    u: Any  # Float[Array, "K R"] or QTensor
    v: Any  # Float[Array, "R N"] or QTensor
    cws: Float[Array, " r_s"] | None
    mac: Float[Array, " r_c"] | None

    @property
    def rank(self) -> int:
        """R."""
        rank: int = self.u.shape[1]
        return rank

    def columns(self, branch: BranchName) -> slice:
        """Return which columns of ``u`` and rows of ``v`` a branch has, none where it is off."""
        gate = self.cws if branch == "cws" else self.mac
        r = 0 if gate is None else gate.shape[0]
        return slice(0, r) if branch == "cws" else slice(self.rank - r, self.rank)

    def cws_product(self) -> Float[Array, "K N"]:
        """Return ``U_s G_s V_s`` of float factors, zeros where CWS is off."""
        if self.cws is None:
            return jnp.zeros((self.u.shape[0], self.v.shape[1]), jnp.float32)
        at = self.columns("cws")
        product: Float[Array, "K N"] = (self.u[:, at] * self.cws[None, :]) @ self.v[at]
        return product

    def diagonal(self, branch: BranchName) -> Float[Array, " R"] | None:
        """Return a branch's gate over all columns, zero where it has none; None where it is off."""
        gate, at = self.cws if branch == "cws" else self.mac, self.columns(branch)
        return None if gate is None else jnp.pad(gate, (at.start, self.rank - at.stop))


def rank_of(rate: float, narrowest: int, width: int) -> int:
    """Return the rank: ``rate`` of ``narrowest`` = ``min(D_m, N)``, at least 1; up to a multiple of 16 where the site has 1024 channels."""
    rank = max(1, round(rate * narrowest))
    return -(-rank // 16) * 16 if width >= 1024 else rank


def svd_factors(
    w: Float[Array, "K N"], ranks: Sequence[int], columns: tuple[int, ...] | None = None
) -> tuple[Float[Array, "K R"], Float[Array, "R N"]]:
    """Return ``U_r sqrt(S_r)`` and ``sqrt(S_r) V_r^T`` for the largest of the ranks; the factors of a smaller rank r come first.

    Args:
      w: the main rows, float32.
      ranks: the r.
      columns: None for one SVD a site, its layers side by side; else the output sizes of the site's layers: each has an SVD of its
        own with these ranks, and the factors are laid side by side, V block-diagonal (so R is ``max(ranks) * len(columns)``).
    """
    most = max(ranks)
    ends = np.cumsum((0, *(columns or (w.shape[1],))))
    us, vs = zip(*(_leading(w[:, a:b], most) for a, b in pairwise(ends)), strict=True)
    u, v = jnp.concatenate(us, axis=1), jax.scipy.linalg.block_diag(*vs)
    order = np.array(sorted(range(u.shape[1]), key=lambda i: sum(i % most >= r for r in ranks)))
    return u[:, order], v[order, :]


def _leading(w: Float[Array, "K N"], rank: int) -> tuple[Float[Array, "K r"], Float[Array, "r N"]]:
    # LAPACK through numpy: XLA's CPU decomposition takes seconds a layer
    shapes = (jax.ShapeDtypeStruct((w.shape[0], rank), jnp.float32), jax.ShapeDtypeStruct((rank, w.shape[1]), jnp.float32))
    found: tuple[Array, Array] = through_host(_on_host(rank), shapes, w)
    return found


@cache  # JAX compiles a call for each function that it has not seen
def _on_host(rank: int) -> Callable[[Array], tuple[Float[np.ndarray, "K r"], Float[np.ndarray, "r N"]]]:
    return lambda m: _svd(np.asarray(m), rank)


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

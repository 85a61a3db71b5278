"""MOCD, modality-specific outlier channel decoupling: which channels are split off (arXiv 2605.19929, sec. 3.2).

Scores come from statistics that are maxima and integer counts only, so they do not depend on the order or the sharding of the
samples. Text instability is the within-cluster variance of a channel's rank inside its token, clustered by 1-D k-means; the
clustering is the *optimal* one (dynamic programming over the histogram's bins), so there is no start to choose and no seed.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from splitq_jax.errors import InputError

Selector = Literal["mocd", "none", "random", "text_max", "vision_max", "multi_max", "multi_mean"]
SELECTORS: tuple[str, ...] = get_args(Selector)
VISION, TEXT, FIRST = 0, 1, 2  # rows of the per-class statistics; FIRST: the token that parks the massive activations
RANK_BINS = 256


@dataclass(frozen=True)
class SplitSize:
    """How many channels leave the main group.

    Attributes:
      rate: share of the channels for each of the two side groups (the paper's 2 %).
      align: round to the nearest multiple of this; None for 64, below 1024 channels for the next multiple of 8: in a side group of eight
        channels the largest leaves the others too few of 4 bits.

    Raises:
      InputError: a rate outside [0, 1); an alignment below 1.
    """

    rate: float = 0.02
    align: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1 or (self.align is not None and self.align < 1):
            raise InputError(f"split rate {self.rate}, align {self.align}: expected a share in [0, 1) and a positive alignment")

    def channels(self, width: int) -> int:
        """Return K, the channels of one side group, for a site of ``width`` channels.

        Raises:
          InputError: where the two side groups would leave no main group.
        """
        if self.rate == 0:
            return 0
        narrow = self.align is None and width < 1024
        align = self.align or (8 if narrow else 64)
        tiles = self.rate * width / align
        k = max(align, (math.ceil(round(tiles, 9)) if narrow else round(tiles)) * align)
        if 2 * k >= width:
            raise InputError(
                f"split rate {self.rate} with alignment {align} takes 2 x {k} of {width} channels: no main group is left; "
                "lower the rate or the alignment"
            )
        return k


@struct.dataclass
class SiteStats:
    """Calibration statistics of one site's input, D channels; ``3`` is (vision, text, first token).

    Attributes:
      absmax: largest magnitude.
      abs_sum: sum of magnitudes.
      count: tokens seen.
      vision_channels: ``C_v``, the K largest vision maxima; fixed before ranks are counted.
      ranks: per channel, a histogram of its rank inside each text token (the percentile among all channels but ``C_v``).
      gram: ``X^T X`` over all tokens, for GPTQ; None if not collected.
    """

    absmax: Float[Array, "3 D"]
    abs_sum: Float[Array, "3 D"]
    count: Float[Array, " 3"]
    vision_channels: Int[Array, " K"]
    ranks: Int[Array, "D B"]
    gram: Float[Array, "D D"] | None = None


def top(score: Float[Array, " D"], k: int) -> Int[Array, " k"]:
    """Return the ``k`` largest, ties to the lower index, in ascending channel order."""
    return jnp.sort(jnp.argsort(-score, stable=True)[:k])


def token_ranks(x: Float[Array, "T D"], is_main: Bool[Array, " D"]) -> Float[Array, "T D"]:
    """Return ``r_ic = |{j in C' : |x_ij| <= |x_ic|}| / |C'|`` with ``C'`` the channels where ``is_main`` (eq. 4)."""
    size = jnp.sum(is_main)
    # floats that are not negative are ordered as their bits are, and XLA's CPU sorts integers five times as fast
    bits = jax.lax.bitcast_convert_type(jnp.abs(x).astype(jnp.float32), jnp.int32)
    ordered = jnp.sort(jnp.where(is_main, bits, np.iinfo(np.int32).max), axis=-1)
    below = jax.vmap(lambda row, v: jnp.searchsorted(row, v, side="right"))(ordered, bits)
    return jnp.minimum(below, size).astype(x.dtype) / size.astype(x.dtype)


def rank_histogram(ranks: Float[Array, "T D"], counted: Bool[Array, " T"]) -> Int[Array, "D B"]:
    """Count each channel's ranks in `RANK_BINS` equal bins of (0, 1]; tokens that are not ``counted`` are left out."""
    bin_of = jnp.clip(jnp.ceil(ranks * RANK_BINS).astype(jnp.int32) - 1, 0, RANK_BINS - 1)
    channel = jnp.arange(ranks.shape[1])
    return jnp.zeros((ranks.shape[1], RANK_BINS), jnp.int32).at[channel[None, :], bin_of].add(counted.astype(jnp.int32)[:, None])


@partial(jax.jit, static_argnames="clusters")
def instability(ranks: Int[Array, "D B"], clusters: int) -> Float[Array, " D"]:
    """Return ``s_t(c) = mean_i (r_ic - mu_{c, z_ic})^2`` under the optimal 1-D k-means of each channel's ranks (eq. 5).

    Bins stand for their centres. The optimum over contiguous clusters is exact: ``best[k][b] = min_a best[k-1][a] + cost(a, b)``.
    """
    bins = ranks.shape[1]
    centre = (jnp.arange(bins, dtype=jnp.float32) + 0.5) / float(bins) - 0.5  # around 0: less cancellation in the costs

    def one(counts: Int[Array, " B"]) -> Float[Array, ""]:
        weight = counts.astype(jnp.float32) / jnp.maximum(jnp.sum(counts), 1).astype(jnp.float32)
        sums = [jnp.concatenate([jnp.zeros(1), jnp.cumsum(weight * centre**p)]) for p in range(3)]
        s0, s1, s2 = (s[None, :] - s[:, None] for s in sums)  # [a, b]: bins a to b-1
        cost = jnp.where(s0 > 1e-7, s2 - s1**2 / jnp.maximum(s0, 1e-7), 0.0)
        order = jnp.arange(bins + 1)
        cost = jnp.where(order[:, None] <= order[None, :], jnp.maximum(cost, 0), jnp.inf)
        best = cost[0]
        for _ in range(clusters - 1):
            best = jnp.min(best[:, None] + cost, axis=0)
        return best[-1]

    return jax.lax.map(one, ranks, batch_size=8)  # its arrays stay in a core's cache


def select(stats: SiteStats, selector: Selector, clusters: int = 3, seed: int = 0) -> tuple[Int[Array, " D"], int, int]:
    """Return the permutation ``[C_m | C_t | C_v]`` and the sizes ``(K_t, K_v)``.

    Selectors other than MOCD's rank all channels by one score; the first K are ``C_v``, the next K ``C_t`` (paper, table 5).

    Raises:
      InputError: unknown selector.
    """
    width, k = stats.absmax.shape[1], stats.vision_channels.shape[0]
    absmax = stats.absmax[:FIRST]
    if selector == "none" or k == 0:
        return jnp.arange(width, dtype=jnp.int32), 0, 0
    if selector == "mocd":
        vision = stats.vision_channels
        score = instability(stats.ranks, clusters)
    elif selector == "random":
        # numpy's generator: the same channels on every backend
        chosen = np.random.default_rng((seed, width)).permutation(width)[: 2 * k]
        vision = jnp.sort(jnp.asarray(chosen[:k], jnp.int32))
        score = jnp.zeros(width).at[jnp.asarray(chosen[k:])].set(1.0)
    else:
        scores = {
            "text_max": absmax[TEXT],
            "vision_max": absmax[VISION],
            "multi_max": jnp.max(absmax, axis=0),
            "multi_mean": jnp.sum(stats.abs_sum[:FIRST], axis=0) / jnp.maximum(jnp.sum(stats.count[:FIRST]), 1),
        }
        if selector not in scores:
            raise InputError(f"selector {selector!r}: expected one of {', '.join(SELECTORS)}")
        score = scores[selector]
        vision = top(score, k)
    in_vision = jnp.zeros(width, bool).at[vision].set(True)
    return partition(width, top(jnp.where(in_vision, -jnp.inf, score), k), vision), k, k


def partition(width: int, text: Int[Array, " K"], vision: Int[Array, " L"]) -> Int[Array, " D"]:
    """Return ``[C_m | C_t | C_v]``, the rest of ``width`` channels first, each set ascending."""
    side = jnp.concatenate([jnp.sort(text), jnp.sort(vision)])
    main = jnp.argsort(jnp.zeros(width, bool).at[side].set(True), stable=True)[: width - side.shape[0]]
    return jnp.concatenate([main, side]).astype(jnp.int32)


def check_channels(path: str, width: int, text: Array, vision: Array) -> None:
    """Raise `InputError` unless two sets of channels that were chosen by hand are disjoint parts of a site's, neither empty, nor all."""
    both = np.concatenate([np.ravel(text), np.ravel(vision)])
    if not (np.ndim(text) == np.ndim(vision) == 1 and min(np.size(text), np.size(vision)) > 0 and both.dtype.kind in "iu"):
        raise InputError(f"{path}: channels {text!r} and {vision!r}; expected two lists of channel numbers, at least one in each")
    if both.min() < 0 or both.max() >= width or len(set(both.tolist())) < both.size or both.size >= width:
        raise InputError(
            f"{path}: channels {np.sort(both).tolist()}; expected different ones of 0 to {width - 1}, and not all of them"
        )

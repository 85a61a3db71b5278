"""One site with planted outliers: its weight, tokens of both modalities and their statistics, and the recipes that tests try on it."""

import jax.numpy as jnp
import numpy as np

from splitq_jax import mocd, recipes
from splitq_jax.linear import linear
from splitq_jax.mocd import SplitSize
from splitq_jax.quantization import kernels

D, N, TEXT_FROM = 64, 96, 150
PATH = "decoder/blocks_0/down"
SPLIT = SplitSize(rate=0.04, align=1)  # the planted channels fit


def planted_tokens(seed=0):
    """200 tokens: vision outliers in channels 3 and 40, text channels 9 and 50 wander, 20 is large everywhere."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, D)) * np.geomspace(0.3, 1.5, D)[rng.permutation(D)]
    x[:TEXT_FROM, [3, 40]] *= 30
    x[TEXT_FROM:, [9, 50]] *= 10.0 ** rng.uniform(-1, 1.7, (50, 2))
    x[:, 20] *= 8
    return jnp.asarray(x, jnp.float32)


IS_TEXT = jnp.arange(200) >= TEXT_FROM


def site_stats(x, k):
    absmax = jnp.stack([jnp.max(jnp.abs(x[:TEXT_FROM]), 0), jnp.max(jnp.abs(x[TEXT_FROM:]), 0), jnp.zeros(D)])
    vision = mocd.top(absmax[mocd.VISION], k)
    main = ~jnp.isin(jnp.arange(D), vision)
    ranks = mocd.rank_histogram(mocd.token_ranks(x[TEXT_FROM:], main), jnp.ones(50, bool))
    return mocd.SiteStats(absmax, absmax, jnp.ones(3), vision, ranks, x.T @ x)


def relative_error(y, y0):
    return float(jnp.sum((y - y0) ** 2) / jnp.sum(y0**2))


def apply(tree, x):
    return linear(x, kernels(tree)[PATH], IS_TEXT)


VARIANTS = {
    **{name: make("w4a4").replace(split=SPLIT) for name, make in recipes.METHODS.items()},
    "gates": recipes.splitq("w4a4").replace(split=SPLIT, cws_start=0.7, mac_start=0.7),
    "free": recipes.splitq("w4a4").replace(split=SPLIT, cws="free", mac="free", cws_start=0.5, mac_start=0.5),
    "per layer": recipes.splitq("w4a4").replace(split=SPLIT, cws_start=0.5, mac_start=0.5, svd_per="layer"),
    "wide cws": recipes.splitq("w4a4").replace(split=SPLIT, cws_start=0.5, mac_start=0.5, cws_rate=0.08, mac_rate=0.03),
    "one free": recipes.splitq("w4a4").replace(split=SPLIT, cws="free", mac_start=0.5, cws_start=0.5),
    "dense": recipes.flatquant("w4a4").replace(transform="dense"),
    "both": recipes.splitq_fixed("w4a4").replace(split=SPLIT, mac_tokens="both", side_bits=8),
}


def planted_params():
    w = np.random.default_rng(5).standard_normal((D, N)) * 0.1
    return {"decoder": {"blocks_0": {"down": {"kernel": jnp.asarray(w, jnp.float32)}}}}


def planted_stats():
    return {PATH: site_stats(planted_tokens(), SPLIT.channels(D))}

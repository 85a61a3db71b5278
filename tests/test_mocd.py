import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from splitq_jax import mocd
from splitq_jax.errors import InputError
from splitq_jax.mocd import SiteStats, SplitSize


def brute_force_kmeans(values, k):
    """Optimal 1-D k-means: every partition of the sorted values into k runs."""
    v = np.sort(values)
    best = np.inf
    for cuts in itertools.combinations_with_replacement(range(len(v) + 1), k - 1):
        parts = np.split(v, cuts)
        best = min(best, sum(((p - p.mean()) ** 2).sum() for p in parts if len(p)))
    return best / len(v)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_instability_is_the_optimal_clustering(k):
    rng = np.random.default_rng(k)
    ranks = rng.integers(0, 16, (4, 14))
    histogram = np.stack([np.bincount(r, minlength=16) for r in ranks]).astype(np.int32)
    got = mocd.instability(jnp.asarray(histogram), k)
    expected = [brute_force_kmeans((r + 0.5) / 16, k) for r in ranks]
    np.testing.assert_allclose(got, expected, atol=2e-7)


def test_token_ranks_are_percentiles_among_the_remaining_channels():
    x = np.random.default_rng(0).standard_normal((11, 20)).astype(np.float32)
    x[:, 4] = x[:, 5]  # ties count as <=
    main = np.ones(20, bool)
    main[[2, 9]] = False
    expected = (np.abs(x)[:, None, main] <= np.abs(x)[:, :, None]).sum(-1) / 18
    np.testing.assert_allclose(mocd.token_ranks(jnp.asarray(x), jnp.asarray(main)), expected, atol=1e-6)
    edges = jnp.array([[1, 2, 255, 256]]) / mocd.RANK_BINS  # bins are open below
    assert mocd.rank_histogram(edges, jnp.ones(1, bool)).argmax(1).tolist() == [0, 1, 254, 255]


MASSIVE = 25  # a channel in which first tokens alone are large


def make_stats(x_vision, x_text, k):
    rows = [x_vision, x_text, 1e4 * np.eye(1, x_text.shape[1], MASSIVE)]
    vision = mocd.top(jnp.asarray(np.abs(x_vision).max(0)), k)
    main = jnp.asarray(~np.isin(np.arange(x_text.shape[1]), vision))
    ranks = mocd.rank_histogram(mocd.token_ranks(jnp.asarray(x_text), main), jnp.ones(len(x_text), bool))
    return SiteStats(
        absmax=jnp.asarray(np.stack([np.abs(r).max(0) for r in rows]), jnp.float32),
        abs_sum=jnp.asarray(np.stack([np.abs(r).sum(0) for r in rows]), jnp.float32),
        count=jnp.asarray([float(len(r)) for r in rows]),
        vision_channels=vision,
        ranks=ranks,
    )


@pytest.fixture
def planted():
    """Vision outliers at 3 and 30. Text: every channel has a steady magnitude, 12 a large one; 7 and 21 wander over all ranks."""
    rng = np.random.default_rng(1)
    vision = rng.standard_normal((200, 40)).astype(np.float32)
    vision[:, [3, 30]] *= 40
    text = np.geomspace(0.1, 10, 40)[rng.permutation(40)] * rng.uniform(0.9, 1.1, (200, 40))
    text[:, 12] = 60
    text[:, [7, 21]] = 10.0 ** rng.uniform(-1.2, 1.2, (200, 2))
    return make_stats(vision, text.astype(np.float32), 2)


def test_mocd_finds_vision_outliers_and_unstable_text_channels(planted):
    perm, k_text, k_vision = mocd.select(planted, "mocd", 3)
    assert (k_text, k_vision) == (2, 2)
    assert sorted(perm.tolist()) == list(range(40))
    assert perm[-2:].tolist() == [3, 30]
    assert perm[-4:-2].tolist() == [7, 21]  # the unstable ones, not the largest (12)


@pytest.mark.parametrize(("selector", "included"), [("text_max", 12), ("vision_max", 3), ("multi_max", 12), ("multi_mean", 30)])
def test_other_selectors_follow_their_score(planted, selector, included):
    perm, *_ = mocd.select(planted, selector)
    assert included in perm[-4:].tolist() and sorted(perm.tolist()) == list(range(40))
    assert MASSIVE not in perm[-4:].tolist()


def test_random_channels_are_seeded_and_none_splits_nothing(planted):
    a, b = (mocd.select(planted, "random", seed=s)[0].tolist() for s in (1, 2))
    assert a != b and a == mocd.select(planted, "random", seed=1)[0].tolist()
    assert mocd.select(planted, "none")[1:] == (0, 0)
    with pytest.raises(InputError, match="selector"):
        mocd.select(planted, "loudest")


@pytest.mark.parametrize(
    ("width", "k"), [(64, 8), (400, 8), (576, 16), (1536, 64), (2048, 64), (3584, 64), (11008, 192), (18944, 384)]
)
def test_default_group_sizes(width, k):
    assert SplitSize().channels(width) == k


def test_exact_share_and_too_many_channels():
    assert SplitSize(align=1).channels(3584) == 72
    assert SplitSize(rate=0).channels(576) == 0
    with pytest.raises(InputError, match="no main group"):
        SplitSize(rate=0.5).channels(64)
    with pytest.raises(InputError, match="no main group"):
        SplitSize().channels(16)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planted import PATH, SPLIT, VARIANTS, D, N, apply, planted_params, planted_stats, planted_tokens

import splitq_jax as sq
from splitq_jax import acc, mocd, recipes
from splitq_jax.errors import InputError
from splitq_jax.linear import linear
from splitq_jax.numerics import gaussian_clip
from splitq_jax.quantization import kernels, layer_columns, match, prepare
from splitq_jax.site import learnable, with_learnable


@pytest.fixture(scope="module")
def params():
    return planted_params()


@pytest.fixture(scope="module")
def stats():
    return planted_stats()


def test_low_rank_factors_are_the_truncated_svd(params, monkeypatch):
    w = kernels(params)[PATH]
    traced = jax.jit(lambda w: acc.svd_factors(w, (2, 5)))(w)
    monkeypatch.delattr(jax, "pure_callback")  # waits forever on one core; what is not traced does without
    u, v = acc.svd_factors(w, (2, 5))
    assert (u == traced[0]).all() and (v == traced[1]).all()
    full = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
    for r in (2, 5):
        np.testing.assert_allclose(u[:, :r] @ v[:r], (full[0][:, :r] * full[1][:r]) @ full[2][:r], atol=1e-5)
    u, v = acc.svd_factors(w, (1, 3), (40, 30, 26))
    assert u.shape == (D, 9) and v.shape == (9, N)
    for layer in (slice(0, 40), slice(40, 70), slice(70, N)):
        full = np.linalg.svd(np.asarray(w[:, layer], np.float64), full_matrices=False)
        for r in (1, 3):
            product = u[:, : 3 * r] @ v[: 3 * r, layer]
            np.testing.assert_allclose(product, (full[0][:, :r] * full[1][:r]) @ full[2][:r], atol=1e-5)
    assert [acc.rank_of(0.02, *a) for a in ((560, 576), (3456, 3584), (896, 1024), (9, 20))] == [11, 80, 32, 1]


@pytest.mark.parametrize(("scheme", "lwc_start"), [("w4a8", None), ("w4a4", 0.982)])
def test_groups_start_smoothed_and_clipped(scheme, lwc_start, params, stats):
    """As all tokens' maxima ask, a first token's massive one included, and as the bits of each side of the product do."""
    seen = stats[PATH].replace(absmax=stats[PATH].absmax.at[mocd.FIRST, 7].set(1e3))
    recipe = recipes.splitq(scheme).replace(split=SPLIT, lwc_start=lwc_start)
    site = kernels(prepare(params, {PATH: seen}, recipe))[PATH]
    d = np.abs(site.w).max(1) ** 0.7 / np.max(seen.absmax, axis=0) ** 0.3
    np.testing.assert_allclose(jnp.concatenate([g.transform.d for g in site.groups]), d[site.perm], rtol=1e-5)
    w_bits, a_bits = recipe.main_bits  # the side groups' too
    for group, rows in zip(site.groups, site.sizes, strict=True):
        np.testing.assert_allclose(jax.nn.sigmoid(group.w_clip), lwc_start or gaussian_clip(w_bits, rows), rtol=1e-5)
        np.testing.assert_allclose(jax.nn.sigmoid(group.a_clip), gaussian_clip(a_bits, rows), rtol=1e-5)


def test_learnable_parts_come_apart_and_together(params, stats):
    for name in ("splitq", "free", "one free", "rtn", "flatquant"):
        site = kernels(prepare(params, stats, VARIANTS[name]))[PATH]
        parts = learnable(site)
        again = with_learnable(site, parts)
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), site, again))
        doubled = with_learnable(site, jax.tree.map(lambda a: 2 * a, parts))
        assert (doubled.w == site.w).all()
        if name == "splitq":
            assert set(parts["clips"]) == {"groups", "cws", "mac"} and len(parts["transforms"]["groups"]) == 3
            assert (doubled.groups[2].transform.p2 == 2 * site.groups[2].transform.p2).all()
        if "free" in name:
            learned = [k for k in ("cws", "mac") if k in parts["transforms"]]
            assert learned == (["cws"] if name == "one free" else ["cws", "mac"])
            r = site.branches.cws.size
            assert (doubled.branches.v[:r] == 2 * site.branches.v[:r]).all()
            assert (doubled.branches.v[r:] == site.branches.v[r:] * (1 if name == "one free" else 2)).all()
        if name == "rtn":
            assert not jax.tree.leaves(parts)


def test_channels_may_be_chosen_by_hand(params, stats):
    recipe, text, vision = recipes.splitq("w4a4").replace(split=SPLIT), np.array([50, 9, 7]), np.array([40, 3])
    frozen = sq.quantize(params, stats, recipe, {PATH: (text, vision)})
    leaf, x = kernels(frozen)[PATH], planted_tokens(1)
    assert [g.w.rows for g in leaf.groups] == [D - 5, 3, 2]
    assert leaf.perm[-5:].tolist() == [7, 9, 50, 3, 40]
    assert leaf.perm[:-5].tolist() == [c for c in range(D) if c not in {7, 9, 50, 3, 40}]
    exact = sq.quantize(params, stats, recipe.replace(scheme="w16a16"), {PATH: (text, vision)})
    y = x @ kernels(params)[PATH]
    np.testing.assert_allclose(apply(exact, x), y, atol=2e-5 * float(jnp.max(jnp.abs(y))))
    # the recipe's own choice, given by hand, is the recipe's
    perm, k, _ = mocd.select(stats[PATH], "mocd", 3)
    chosen = jax.jit(lambda p, t, v: sq.quantize(p, stats, recipe, {PATH: (t, v)}))(params, perm[-2 * k : -k], perm[-k:])
    assert kernels(chosen)[PATH].perm.tolist() == perm.tolist()
    # no statistics of other channels' ranks are needed
    site = kernels(prepare(params, stats, recipes.flatquant("w4a4"), {PATH: (text, vision)}))[PATH]
    assert site.sizes == (D - 5, 3, 2)


@pytest.mark.parametrize(
    ("text", "vision", "message"),
    [
        ([3], [3], "different ones"),
        ([3], [64], "0 to 63"),
        ([-1], [3], "0 to 63"),
        ([3], [], "at least one in each"),
        ([0.5], [3], "channel numbers"),
        ([[3]], [4], "two lists"),
        (list(range(60)), [60, 61, 62, 63], "not all"),
    ],
)
def test_channels_that_are_no_partition_are_refused(params, stats, text, vision, message):
    with pytest.raises(InputError, match=f"{PATH}: channels .*{message}"):
        prepare(params, stats, recipes.splitq("w4a4").replace(split=SPLIT), {PATH: (np.array(text), np.array(vision))})


def test_channels_of_another_layer_are_refused(params, stats):
    with pytest.raises(InputError, match=f"channels of o: .*{PATH}"):
        prepare(params, stats, recipes.splitq("w4a4").replace(split=SPLIT), {"o": (np.array([1]), np.array([2]))})


def test_what_the_recipe_lacks_is_named(params, stats):
    with pytest.raises(InputError, match="matches none"):
        match(params, recipes.rtn("w4a4").replace(sites=("decoder/blocks_*/attn",)))
    with pytest.raises(InputError, match="no calibration statistics"):
        prepare(params, {}, recipes.splitq("w4a4"))
    with pytest.raises(InputError, match="side channels"):
        prepare(params, stats, recipes.splitq("w4a4"))  # collected for another split
    with pytest.raises(InputError, match="gram=True"):
        sq.quantize(params, {PATH: stats[PATH].replace(gram=None)}, recipes.gptq("w4a4"))
    with pytest.raises(InputError, match="--method"):
        recipes.named("magic", "w4a4")
    with pytest.raises(TypeError, match="weight leaf"):
        linear(jnp.ones((2, 3)), "text")


def test_fused_layers_are_told_apart():
    block = {"qkv": {"kernel": jnp.ones((8, 16))}, "o": {"kernel": jnp.ones((8, 8))}, "gate_up": {"kernel": jnp.ones((8, 20))}}
    tree = {"decoder": {"blocks_0": block}}
    assert layer_columns(tree, "decoder/blocks_0/qkv") == (8, 4, 4)
    assert layer_columns(tree, "decoder/blocks_0/gate_up") == (10, 10)
    assert layer_columns(tree, "decoder/blocks_0/o") == (8,)

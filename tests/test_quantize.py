import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planted import (
    IS_TEXT,
    PATH,
    SPLIT,
    VARIANTS,
    D,
    N,
    apply,
    planted_params,
    planted_stats,
    planted_tokens,
    relative_error,
    site_stats,
)

import splitq_jax as sq
from splitq_jax import recipes
from splitq_jax.errors import InputError
from splitq_jax.linear import SplitWeight, linear
from splitq_jax.numerics import gaussian_clip
from splitq_jax.quantization import kernels, match, prepare
from splitq_jax.rounding import gptq
from splitq_jax.site import learnable, split, unrounded, with_learnable
from splitq_jax.summary import summarize
from splitq_jax.transforms import IDENTITY, apply_inverse
from splitq_jax.transforms import apply as apply_transform


@pytest.fixture(scope="module")
def params():
    return planted_params()


@pytest.fixture(scope="module")
def stats():
    return planted_stats()


GROUPED = {  # weight-only, scales per group of rows; 58 channels are left where six are split off
    "rtn, groups": recipes.rtn("w3a16").replace(group_size=16),
    "flatquant, groups": recipes.flatquant("w3a16").replace(group_size=32),
    "splitq, groups": recipes.splitq("w3a16").replace(split=SPLIT, group_size=29, cws_start=0.7),
}


@pytest.mark.parametrize("name", [*VARIANTS, *GROUPED])
def test_sixteen_bits_are_an_identity(name, params, stats):
    recipe = (VARIANTS | GROUPED)[name].replace(scheme="w16a16", side_bits=None)
    x = planted_tokens(1)
    y0 = x @ kernels(params)[PATH]
    prepared = prepare(params, stats, recipe)
    for tree in (prepared, sq.freeze(prepared, recipe)):
        np.testing.assert_allclose(apply(tree, x), y0, atol=2e-5 * float(jnp.max(jnp.abs(y0))))


@pytest.mark.parametrize("scheme", ["w4a8", "w3a3", "w2a2", "w4a16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_packed_codes_give_what_training_saw(name, scheme, params, stats):
    recipe = VARIANTS[name].replace(scheme=scheme)
    if recipe.rounding == "gptq":
        pytest.skip("GPTQ rounds other than to nearest")
    prepared = prepare(params, stats, recipe)
    frozen = sq.freeze(prepared, recipe)
    x = planted_tokens(1)
    seen, packed = apply(prepared, x), apply(frozen, x)
    # values a hair from a tie may round apart in the two programs: nearly all entries agree to float precision
    close = jnp.abs(seen - packed) < 1e-4 * jnp.max(jnp.abs(seen))
    assert jnp.mean(close.astype(jnp.float32)) > 0.98
    assert relative_error(packed, seen) < 1e-4


@pytest.mark.parametrize("name", GROUPED)
def test_groups_of_rows_have_scales_of_their_own(name, params, stats):
    """In training as in the codes, and as a loop over groups gives; they lose less than one scale a column."""
    recipe, x = GROUPED[name], planted_tokens(1)
    prepared = prepare(params, stats, recipe)
    site, frozen = kernels(prepared)[PATH], sq.freeze(prepared, recipe)
    main = kernels(frozen)[PATH].groups[0].w
    np.testing.assert_allclose(apply(frozen, x), apply(prepared, x), atol=1e-4 * float(jnp.max(jnp.abs(apply(frozen, x)))))
    matrix = np.asarray(unrounded(site).w[0], np.float64)
    clip = gaussian_clip(3, recipe.group_size) if recipe.clip else 1.0
    for g in range(matrix.shape[0] // recipe.group_size):
        rows = slice(g * recipe.group_size, (g + 1) * recipe.group_size)
        step = clip * np.abs(matrix[rows]).max(0) / 3
        np.testing.assert_allclose(main.scale[g], step, rtol=1e-5)
        assert (np.asarray(main.codes())[rows] == np.clip(np.rint(matrix[rows] / step), -4, 3)).mean() > 0.999
    exact = x @ kernels(params)[PATH]
    plain = sq.quantize(params, stats, recipe.replace(group_size=None))
    assert relative_error(apply(frozen, x), exact) < relative_error(apply(plain, x), exact)
    (row,), (fewer,) = summarize(frozen), summarize(plain)
    assert row.group_size == recipe.group_size and fewer.group_size == main.rows
    assert row.effective_bits - fewer.effective_bits == pytest.approx(32 * (main.rows // recipe.group_size - 1) / D)


def test_clips_of_groups_are_learned_apart(params, stats):
    """The gradient of a factor is that of its own group's rows."""
    site = kernels(prepare(params, stats, GROUPED["flatquant, groups"]))[PATH]
    x, parts = planted_tokens(1)[:, :32] @ jnp.eye(32, D), learnable(site)

    def loss(clips):
        plain = replace(site, groups=(replace(site.groups[0], transform=IDENTITY),))
        return jnp.sum(linear(x, with_learnable(plain, {"transforms": {"groups": (IDENTITY,)}, "clips": clips})) ** 2)

    ((w_clip, _),) = jax.grad(loss)(parts["clips"])["groups"]
    assert w_clip.shape == (2, 2, N) and jnp.any(w_clip[:, 0] != 0) and not jnp.any(w_clip[:, 1])


def test_groups_that_do_not_fit_are_named(params, stats):
    with pytest.raises(InputError, match=f"{PATH}: groups of 32 channels do not divide the 58"):
        prepare(params, stats, GROUPED["splitq, groups"].replace(group_size=32))
    for scheme, group in (("w4a4", 32), ("w4a8", 32), ("w4a16", 0), ("w4a16", -1)):
        with pytest.raises(InputError, match=f"group_size={group} with {scheme}"):
            recipes.flatquant(scheme).replace(group_size=group)
    assert recipes.flatquant("w4a16").replace(group_size=32, vision="w4a4").for_vision().group_size is None


def test_recipes_one_after_the_other(params, stats):
    """Other bits in other layers; what one has prepared another does not freeze, and nothing half done is summed up."""
    w = kernels(params)[PATH]
    both = {"decoder": {f"blocks_{i}": {"down": {"kernel": w}} for i in range(2)}}
    known = {f"decoder/blocks_{i}/down": stats[PATH] for i in range(2)}
    recipe = [
        recipes.splitq(scheme).replace(split=SPLIT, sites=f"decoder/blocks_{i}/*") for i, scheme in enumerate(("w4a4", "w3a8"))
    ]
    prepared = prepare(prepare(both, known, recipe[0]), known, recipe[1])
    half = sq.freeze(prepared, recipe[0])
    with pytest.raises(InputError, match="blocks_1/down: is prepared and not frozen"):
        summarize(half)
    assert [s.bits for s in summarize(sq.freeze(half, recipe[1]))] == [(4, 4), (3, 8)]
    with pytest.raises(InputError, match=r"blocks_0/down: prepared for bits \[4, 4, 4, 4\], frozen for \[8, 8, 8, 8\]"):
        sq.freeze(prepared, recipe[0].replace(scheme="w8a8"))


def test_quantize_maps_over_models(params, stats):
    recipe = recipes.splitq("w4a4").replace(split=SPLIT, cws_start=0.5)
    two = jax.vmap(lambda p: sq.quantize(p, stats, recipe))(jax.tree.map(lambda a: jnp.stack([a, 2 * a]), params))
    second = jax.tree.map(lambda a: a[1], two)
    assert relative_error(apply(second, planted_tokens()), 2 * (planted_tokens() @ kernels(params)[PATH])) < 0.1


def test_sites_are_the_decoders(params, stats):
    tree = params | {"vision": {"blocks_0": {"fc1": {"kernel": jnp.ones((8, 8))}}}}
    for pattern in ("*", "vision/*"):
        with pytest.raises(InputError, match=r"vision/blocks_0/fc1.*--vision"):
            match(tree, recipes.rtn("w4a4").replace(sites=pattern))


def numpy_split_linear(x, w, leaf, bits):
    """METHOD, section 2 and 3, in float64 loops over groups, from the leaf's transforms alone; gates are 1, factors from numpy's SVD."""
    (w_bits, a_bits), side = bits, (max(4, bits[0]), max(4, bits[1]))

    def q(m, b, axis, clip=1.0):
        top = 2 ** (b - 1) - 1
        s = clip * np.abs(m).max(axis, keepdims=True) / top
        return np.clip(np.round(m / s), -top - 1, top) * s

    perm = np.asarray(leaf.perm)
    y, start = 0.0, 0
    for i, group in enumerate(leaf.groups):
        k = group.w.rows
        channels = perm[start : start + k]
        start += k
        p = np.diag(np.asarray(group.transform.d, np.float64)) @ np.kron(
            np.ones((1, 1)) if group.transform.p1 is None else np.asarray(group.transform.p1, np.float64),
            np.asarray(group.transform.p2, np.float64),
        )
        xt, wt = x[:, channels] @ p, np.linalg.solve(p, w[channels])
        a_clip = float(group.a_clip[0])
        x_hat = q(xt, a_bits if i == 0 else side[1], 1, a_clip)
        w_clip = gaussian_clip(w_bits if i == 0 else side[0], k)
        if i > 0:
            y = y + x_hat @ q(wt, side[0], 0, w_clip)
            continue
        u, s, v = np.linalg.svd(w[channels], full_matrices=False)
        pairs = []
        for gate in (leaf.branches.cws, leaf.branches.mac):
            r = gate.size
            pairs.append((np.linalg.solve(p, u[:, :r] * np.sqrt(s[:r])), np.sqrt(s[:r])[:, None] * v[:r]))
        (us, vs), (uc, vc) = pairs
        y = y + x_hat @ q(wt - us @ vs, w_bits, 0, w_clip) + x_hat @ q(us, side[0], 0) @ q(vs, side[0], 1)
        mac = q(xt - x_hat, side[1], 1) @ q(uc, side[0], 0) @ q(vc, side[0], 1)
        y = y + np.where(np.asarray(IS_TEXT)[:, None], mac, 0)
    return y


@pytest.mark.parametrize("rates", [(None, None), (0.08, 0.03)], ids=["narrow cws", "wide cws"])
@pytest.mark.parametrize("scheme", ["w4a4", "w3a2"])
def test_splitq_is_the_paper_in_numpy(scheme, rates, params, stats):
    recipe = recipes.splitq_fixed(scheme).replace(split=SPLIT, cws_rate=rates[0], mac_rate=rates[1])
    frozen = sq.quantize(params, stats, recipe)
    x = planted_tokens(2)
    leaf = kernels(frozen)[PATH]
    expected = numpy_split_linear(np.asarray(x, np.float64), np.asarray(kernels(params)[PATH], np.float64), leaf, recipe.main_bits)
    assert relative_error(apply(frozen, x), jnp.asarray(expected, jnp.float32)) < 2e-4


def test_mac_serves_the_chosen_tokens_only(params, stats):
    x = planted_tokens(3)
    off = apply(sq.quantize(params, stats, recipes.splitq_fixed("w4a2").replace(split=SPLIT, mac="off")), x)
    for tokens, served in (("text", IS_TEXT), ("vision", ~IS_TEXT), ("both", jnp.ones(200, bool))):
        recipe = recipes.splitq_fixed("w4a2").replace(split=SPLIT, mac_tokens=tokens)
        changed = jnp.any(jnp.abs(apply(sq.quantize(params, stats, recipe), x) - off) > 1e-6, axis=1)
        assert (changed == served).all()


def test_every_method_beats_round_to_nearest_on_planted_outliers(params, stats):
    x = planted_tokens(4)
    y0 = x @ kernels(params)[PATH]
    error = {
        name: relative_error(apply(sq.quantize(params, stats, recipe), x), y0)
        for name, recipe in VARIANTS.items()
        if name != "gptq"  # repairs weights, not activations
    }
    assert error.pop("rtn") > 1.5 * max(error.values()), error


@pytest.mark.parametrize("scheme", ["w4a4", "w3a3"])
def test_the_split_alone_isolates_planted_outliers(scheme, params, stats):
    """Without a transform: MOCD's channels carry most of the damage, random channels hardly any."""
    x = planted_tokens(4)
    y0 = x @ kernels(params)[PATH]
    error = {}
    for select in ("none", "random", "text_max", "mocd"):
        recipe = recipes.mocd(scheme).replace(split=SPLIT, select=select, transform="none", clip=False)
        error[select] = relative_error(apply(sq.quantize(params, stats, recipe), x), y0)
    assert error["mocd"] < 0.5 * error["none"], error
    assert error["mocd"] < 0.6 * error["random"], error


def test_gptq_repairs_a_site_of_several_groups(params):
    """Transform, split and clips included, on tokens whose channels go together."""
    rng = np.random.default_rng(2)
    mix = np.eye(D) + rng.standard_normal((D, 8)) @ rng.standard_normal((8, D))
    x = planted_tokens(4) @ jnp.asarray(mix, jnp.float32)
    stats, recipe = {PATH: site_stats(x, SPLIT.channels(D))}, recipes.mocd("w3a16").replace(split=SPLIT)
    exact, errors = x @ kernels(params)[PATH], []
    for rounding in ("nearest", "gptq"):
        quantized = sq.quantize(params, stats, recipe.replace(rounding=rounding))
        errors.append(relative_error(apply(quantized, x), exact))
    assert errors[1] < 0.5 * errors[0], errors


def test_gptq_repairs_what_cws_loses(params, stats):
    """The codes are those of all that the rounded branch leaves of the weight, ``P^-1 W - Q(U) G Q(V)``."""
    recipe = recipes.splitq("w4a8").replace(split=SPLIT, rounding="gptq", cws_start=0.7)
    prepared = prepare(params, stats, recipe)
    site, frozen = kernels(prepared)[PATH], kernels(sq.freeze(prepared, recipe))[PATH]
    transforms, b = [g.transform for g in site.groups], frozen.branches
    parts = [apply_inverse(t, w) for t, w in zip(transforms, split(site.w[site.perm], site.sizes, 0), strict=True)]
    at = b.columns("cws")
    parts[0] -= (b.u.decode()[:, at] * b.cws[None, :]) @ b.v.decode()[at]
    p = jax.scipy.linalg.block_diag(*(apply_transform(t, jnp.eye(n)) for t, n in zip(transforms, site.sizes, strict=True)))
    hessian = p.T @ site.gram[site.perm][:, site.perm] @ p
    expected = gptq(parts, hessian, [4, 4, 4], [jax.nn.sigmoid(g.w_clip) for g in site.groups])
    for group, codes in zip(frozen.groups, expected, strict=True):
        # one code of a tie moves those that follow
        assert (group.w.codes() != codes.codes()).mean() < 0.01


def test_quantize_is_pure_and_runs_under_eval_shape(params, stats):
    recipe = recipes.splitq("w3a3").replace(split=SPLIT)
    before = jax.tree.map(jnp.copy, params)
    real = sq.quantize(params, stats, recipe)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), before, params))
    shapes = jax.eval_shape(lambda p, s: sq.quantize(p, s, recipe), params, stats)
    assert jax.tree.structure(shapes) == jax.tree.structure(real)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, shapes, real))
    jitted = jax.jit(lambda p, s: sq.quantize(p, s, recipe))(params, stats)
    assert relative_error(apply(jitted, planted_tokens()), apply(real, planted_tokens())) < 1e-4


@pytest.mark.parametrize("given", [None, "default"])
def test_weights_are_prepared_in_float32(params, stats, given):
    """On accelerators too, unless the user has said otherwise."""
    recipe = recipes.splitq("w4a4").replace(split=SPLIT)
    with jax.default_matmul_precision(given):
        text = str(jax.make_jaxpr(lambda p, s: sq.quantize(p, s, recipe))(params, stats))
    found = re.findall(r"dot_general\[(.*?)\] ", text, re.DOTALL)
    assert found and all("Precision.HIGHEST" in dot for dot in found) == (given is None)


def test_effective_bits_count_everything(params, stats):
    leaf = kernels(sq.quantize(params, stats, recipes.splitq("w3a3").replace(split=SPLIT)))[PATH]
    assert isinstance(leaf, SplitWeight)
    (row,) = summarize({"decoder": {"blocks_0": {"down": {"kernel": leaf}}}})
    k = SPLIT.channels(D)
    assert row.shape == (D, N) and row.groups == (D - 2 * k, k, k) and row.bits == (3, 3)
    by_hand = sum(a.nbytes for a in jax.tree.leaves(leaf))
    assert row.stored_bytes == by_hand and row.effective_bits == pytest.approx(8 * by_hand / (D * N))

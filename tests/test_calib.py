import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P
from tiny import SPLIT, batches, intermediates, merged, model_and_params

import splitq_jax as sq
from splitq_jax import calib, recipes
from splitq_jax.calib import blocks
from splitq_jax.calib.reconstruction import EFFORTS, FitConfig, _orders, token_weights
from splitq_jax.calib.run import Run, discard, fingerprint
from splitq_jax.errors import InputError
from splitq_jax.kernels.layout import native
from splitq_jax.linear import linear
from splitq_jax.mocd import TEXT, VISION, SplitSize
from splitq_jax.quantization import freeze, kernels, prepare
from splitq_jax.site import TrainableSplit, learnable, with_learnable

SHORT = FitConfig(steps=6, batch_size=8)


def recipe_of(method, scheme="w4a4", **changes):
    return recipes.named(method, scheme).replace(split=SPLIT, **changes)


def logits(model, params, batch):
    return np.asarray(jax.jit(lambda p, b: model.apply({"params": p}, **b))(params, batch))[batch["attention_mask"]]


def test_one_and_eight_devices_train_alike():
    """With a model none of whose codes lies within float32's rounding of the edge between two: a code on the edge falls either way."""
    model, params = model_and_params(3)
    calibration = batches(4, 3)
    stats = calib.collect(model, params, calibration, SPLIT)
    # two sites a block, which halves the compilation
    recipe = recipe_of("splitq", cws_start=0.5, mac_start=0.5, sites=("decoder/blocks_*/qkv", "decoder/blocks_*/down"))
    trained = []
    for devices in (1, 8):
        mesh = calib.data_mesh(jax.devices()[:devices])
        trained.append(calib.fit(model, params, prepare(params, stats, recipe), calibration, SHORT, mesh=mesh))
    for a, b in zip(*(jax.tree.leaves(t) for t, _ in trained), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
    for one, eight in zip(trained[0][1], trained[1][1], strict=True):
        assert one.path == eight.path
        # `after` reads the trained parameters, compared above, through rounding: one code of a tie moves it
        np.testing.assert_allclose(one.before, eight.before, rtol=1e-4)


NOTHING = {  # to learn, of transforms or of clips and gates
    "no transform": {"transform": "none"},
    "a fixed rotation": {"transform": "hadamard"},
    "no clips": {"clip": False, "cws": "off", "mac": "off"},
    "nothing": {"transform": "none", "clip": False, "cws": "fixed", "mac": "off"},
}


@pytest.mark.parametrize("which", NOTHING)
def test_a_recipe_may_learn_one_kind_of_thing(which, tiny, stats):
    model, params = tiny
    prepared = prepare(params, stats, recipe_of("splitq", sites=("decoder/blocks_0/o",), **NOTHING[which]))
    before, after = (
        kernels(tree)["decoder/blocks_0/o"] for tree in (prepared, calib.fit(model, params, prepared, batches(2), SHORT)[0])
    )
    changed = [bool((a != b).any()) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]
    assert any(changed) == (which != "nothing")


def test_a_mesh_of_other_axes_is_refused(tiny, stats):
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    with pytest.raises(InputError, match="axis `data`"):
        calib.collect(*tiny, batches(1), SPLIT, mesh=mesh)
    with pytest.raises(InputError, match="axis `data`"):
        calib.fit(*tiny, prepare(tiny[1], stats, recipe_of("splitq")), batches(1), SHORT, mesh=mesh)


def test_a_model_in_host_memory_stays_there(tiny, tmp_path):
    """From the weights to the codes, whatever devices compute; the numbers are those of a model on a device, to the last bit."""
    model, params = tiny
    held = jax.tree.map(np.asarray, params)
    mesh = calib.data_mesh(jax.devices()[:2])
    recipe = recipe_of(
        "splitq", rounding="gptq", vision="w4a8", cws_start=0.5, sites=("decoder/blocks_*/qkv", "decoder/blocks_*/down")
    )
    trees = []
    for tree in (params, held):
        found = calib.collect(model, tree, batches(4), SPLIT, gram=True, vision_tower=True, mesh=mesh)
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
        run = Run(tmp_path / f"run{len(trees)}", fingerprint(tree, recipe))
        trained, _ = calib.fit(model, tree, prepare(tree, found, recipe), batches(4), SHORT, run=run, mesh=mesh)
        run.close()
        trees += [trained, freeze(trained, recipe)]
    device, host = trees[:2], trees[2:]
    for tree in host:
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree))
    assert (tmp_path / "run0" / "run.json").read_text() == (tmp_path / "run2" / "run.json").read_text()
    for a, b in zip(jax.tree.leaves(device), jax.tree.leaves(host), strict=True):
        np.testing.assert_array_equal(a, b)
    errors = [calib.site_errors(model, *pair, batches(2)) for pair in ((params, device[1]), (held, host[1]))]
    assert errors[0] == errors[1]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(native(host[1])))
    sq.save(tmp_path / "codes", host[1])
    kept, _ = sq.restore(tmp_path / "codes", on_host=True)
    assert jax.tree.structure(kept) == jax.tree.structure(host[1])
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(host[1]), strict=True):
        assert isinstance(a, np.ndarray) and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("loss", ["mse", "mae", "balanced", "token"])
def test_token_weights_do_not_depend_on_the_sharding(loss, tiny):
    (hidden,) = blocks.embed(*tiny, merged(2))
    rows, found = P("data"), []
    for devices in (1, 8):
        mesh = calib.data_mesh(jax.devices()[:devices])
        weights = blocks.sharded(lambda x, c: token_weights(loss, x, x[..., ::-1], c), mesh, (rows, rows), rows)
        found.append(np.asarray(weights(*blocks.place(mesh, (hidden.x, hidden.context))))[..., 0])
    np.testing.assert_allclose(*found, rtol=1e-5)
    valid, text = hidden.context.valid, hidden.context.is_text
    assert (found[0][~valid] == 0).all() and (found[0][valid] > 0).all()
    if loss == "token":
        np.testing.assert_allclose(found[0][valid], 1 / ((hidden.x - hidden.x[..., ::-1]) ** 2).sum(-1)[valid], rtol=1e-5)
    if loss == "balanced":
        np.testing.assert_allclose([found[0][text].sum(), found[0][~text].sum()], 1, rtol=1e-5)


@pytest.mark.parametrize(("loss", "power", "scheme"), [("mse", 2, "w8a16"), ("mae", 1, "w3a16")])
def test_training_is_adamws_on_the_relative_loss(loss, power, scheme, tiny, stats):
    """Two steps along the gradient of the loss's logarithm, on tokens that are not padding; float activations have no codes to tie."""
    (model, params), path, calibration, held_out = tiny, "decoder/blocks_0/o", batches(1), batches(1, seed=9)
    # an epsilon that leaves the gradient's size in a step
    c = FitConfig(steps=2, loss=loss, transform_lr=0.02, clip_lr=0.1, weight_decay=0.3, final_lr=0.4, epsilon=0.1)
    prepared = prepare(params, stats, recipe_of("flatquant", scheme, transform="diag", sites=path))
    trained, (error, _) = calib.fit(model, params, prepared, calibration, c, held_out=held_out)
    site, teacher = kernels(prepared)[path], params["decoder"]["blocks_0"]
    start, reached = learnable(site), ravel_pytree(learnable(kernels(trained)[path]))[0]
    theta, unflatten = ravel_pytree(start)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def reference(theta, x, context):
        student = teacher | {"o": {"kernel": with_learnable(site, unflatten(theta))}}
        y, found = (model.block(0).apply({"params": p}, x, context) for p in (teacher, student))
        e, added = (jnp.where(context.valid[..., None], d, 0) for d in (found - y, y - x))
        return jnp.log(jnp.sum(jnp.abs(e) ** power)), jnp.sum(e**2) / jnp.sum(added**2)

    seen, held = ((h.x, h.context) for h in blocks.embed(model, params, calibration + held_out))
    for measured, at in ((error.before, theta), (error.after, reached)):
        np.testing.assert_allclose(measured, reference(at, *held)[1], rtol=1e-4)
    rates = {"transforms": c.transform_lr, "clips": c.clip_lr}
    rate, _ = ravel_pytree({k: jax.tree.map(partial(jnp.full_like, fill_value=rates[k]), part) for k, part in start.items()})
    m = v = 0
    for t, share in ((1, 1.0), (2, (1 + c.final_lr) / 2)):  # half of the cosine's way
        g = reference(theta, *seen)[0]
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = m / (1 - 0.9**t) / (jnp.sqrt(v / (1 - 0.999**t)) + c.epsilon)
        theta -= share * rate * (step + c.weight_decay * theta)
    np.testing.assert_allclose(reached, theta, rtol=0, atol=1e-4)


def test_an_epoch_is_all_samples_in_an_order_of_its_own():
    first, second = (_orders(16, FitConfig(epochs=2, seed=seed)) for seed in (0, 1))
    epochs = [np.concatenate(part) for orders in (first, second) for part in (orders[:4], orders[4:])]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["splitq", "flatquant", "quarot"])
def test_sixteen_bits_are_the_float_model(method, tiny, stats):
    """Every transform, split and branch is an identity, at the start and after training."""
    model, params = tiny
    recipe = recipe_of(method, "w16a16").replace(**({"cws_start": 0.7, "mac_start": 0.7} if method == "splitq" else {}))
    prepared = prepare(params, stats, recipe)
    if recipe.train:
        prepared, _ = calib.fit(model, params, prepared, batches(2), dataclasses.replace(SHORT, transform_lr=0.05))
    batch = batches(1, seed=7)[0]
    reference = logits(model, params, batch)
    for tree in (prepared, freeze(prepared, recipe)):
        np.testing.assert_allclose(logits(model, tree, batch), reference, atol=1e-4 * np.abs(reference).max())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w4a4", "w3a2", "w4a16"])
def test_frozen_codes_are_what_was_trained(scheme, tiny, stats):
    model, params = tiny
    recipe = recipe_of("splitq", scheme, cws_start=0.5, mac_start=0.5)
    prepared, _ = calib.fit(model, params, prepare(params, stats, recipe), batches(2), SHORT)
    batch = batches(1, seed=7)[0]
    trained, frozen = logits(model, prepared, batch), logits(model, freeze(prepared, recipe), batch)
    # a code on the edge between two may fall either way: compare in the mean
    assert np.mean((trained - frozen) ** 2) < 1e-4 * np.mean(trained**2)


@pytest.mark.slow
def test_training_lowers_the_held_out_error(tiny, stats):
    model, params = tiny
    config, after = FitConfig(epochs=10, batch_size=4), {}
    for method in ("flatquant", "splitq"):
        prepared = prepare(params, stats, recipe_of(method, "w3a3"))
        _, errors = calib.fit(model, params, prepared, batches(8), config, held_out=batches(2, seed=9))
        assert all(e.after < 0.9 * e.before for e in errors), errors
        after[method] = np.mean([e.after for e in errors])
    assert after["splitq"] < after["flatquant"]


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tiny, stats, tmp_path):
    model, params = tiny
    recipe = recipe_of("splitq")
    prepared = prepare(params, stats, recipe)
    whole, errors = calib.fit(model, params, prepared, batches(2), SHORT)
    key = fingerprint(params, recipe, SHORT)
    first = Run(tmp_path, key)
    saved = first.save

    def interrupt(block, *rest):
        saved(block, *rest)
        raise KeyboardInterrupt

    first.save = interrupt
    with pytest.raises(KeyboardInterrupt):
        calib.fit(model, params, prepared, batches(2), SHORT, run=first)
    first.close()
    assert (tmp_path / "block_000.safetensors").is_file() and not (tmp_path / "block_001.safetensors").exists()
    second = Run(tmp_path, key)
    resumed, again = calib.fit(model, params, prepared, batches(2), SHORT, run=second)
    second.close()
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    unmeasured, none = calib.fit(model, params, prepared, batches(2), SHORT, held_out=None)
    assert not none
    jax.tree.map(np.testing.assert_array_equal, whole, unmeasured)
    assert errors == again


def test_bfloat16_weights_are_calibrated_in_float32(tiny):
    model, params = tiny
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    recipe = recipe_of("splitq")
    stats = calib.collect(model, low, batches(2), recipe.split, gram=True, vision_tower=True)
    tower = [s for path, s in stats.items() if path.startswith("vision/")]
    assert tower and {leaf.dtype for leaf in jax.tree.leaves(tower)} == {np.dtype(np.float32), np.dtype(np.int32)}
    assert all(s.count[VISION] > 1 and not s.count[TEXT] for s in tower)
    sq.quantize(low, stats, recipes.gptq("w4a4").replace(vision="w4a4", sites=("decoder/blocks_0/o",)))
    trained, errors = calib.fit(model, low, prepare(low, stats, recipe), batches(2), SHORT)
    assert len(errors) == 2 and all(np.isfinite(e.after) for e in errors)
    leaves = jax.tree.leaves([site.groups for site in kernels(trained).values() if isinstance(site, TrainableSplit)])
    assert {leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)} == {jnp.dtype(jnp.float32)}


def test_other_runs_are_kept_apart(tiny, tmp_path):
    key = fingerprint({"a": np.ones(3)}, "recipe")
    assert key != fingerprint({"a": np.full(3, 1 + 1e-7)}, "recipe") and key != fingerprint({"a": np.ones(3)}, "other")
    run = Run(tmp_path, key)
    run.save(0, {"x": np.arange(3.0)}, (1.0, 0.5))
    run.close()
    with pytest.raises(InputError, match="fingerprint"):
        Run(tmp_path, fingerprint("something else"))
    file = tmp_path / "block_000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    again = Run(tmp_path, key)
    with pytest.raises(InputError, match="block_000"):
        again.load(0, {"x": np.arange(3.0)})
    again.close()
    writing = Run(tmp_path, key)
    with pytest.raises(InputError, match="another run writes"):
        Run(tmp_path, key)
    writing.close()
    (tmp_path / ".block_001.tmp").write_text("of a run that was killed")
    Run(tmp_path, key).close()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        Run(tmp_path, key)
    assert not (tmp_path / "writer.pid").exists()
    (tmp_path / "mine.txt").write_text("x")
    discard(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(InputError, match="holds other files"):
        Run(tmp_path, key)
    with pytest.raises(InputError, match="cannot be made"):
        Run(tmp_path / "mine.txt", key)


def test_site_errors_are_numpys(tiny, stats):
    model, params = tiny
    quantized = sq.quantize(params, stats, recipe_of("splitq", cws_start=0.5, mac_start=0.5))
    found = calib.site_errors(model, params, quantized, batches(2))
    (batch,) = merged(2)
    state, hidden = intermediates(model, params, batch)
    valid, path = np.asarray(hidden.context.valid), "decoder/blocks_1/down"
    x = state["inputs"]["decoder"]["blocks_1"]["down"]["kernel"][0]
    exact = np.asarray(x @ kernels(params)[path])[valid]
    y = np.asarray(linear(x, kernels(quantized)[path], hidden.context.is_text))[valid]
    np.testing.assert_allclose(found[path], ((exact - y) ** 2).sum() / (exact**2).sum(), rtol=1e-3)
    assert found.keys() == stats.keys()


def test_the_vision_tower_too(tiny):
    model, params = tiny
    recipe = recipe_of("splitq", vision="w4a4")
    stats = calib.collect(model, params, batches(2), SPLIT, vision_tower=True)
    quantized = sq.quantize(params, stats, recipe)
    assert {s.path for s in sq.summarize(quantized)} == set(stats)
    assert "vision/blocks_0/fc1" in stats
    batch = batches(1, seed=3)[0]
    assert np.isfinite(logits(model, quantized, batch)).all()


def without_images(batch):
    ids = np.where(batch["input_ids"] == 90, 1, batch["input_ids"])
    return {"input_ids": ids, "attention_mask": batch["attention_mask"]}


def test_sets_that_are_refused(tiny):
    model, params = tiny
    with pytest.raises(InputError, match="empty"):
        calib.collect(model, params, [], SPLIT)
    with pytest.raises(InputError, match="0 vision tokens"):
        calib.collect(model, params, [without_images(b) for b in batches(2)], SPLIT)
    with pytest.raises(InputError, match="not finite"):
        calib.collect(model, params, [b | {"pixel_values": b["pixel_values"] * np.nan} for b in batches(1)], SPLIT)
    damaged = jax.tree_util.tree_map_with_path(
        lambda p, x: np.full(x.shape, np.nan, np.float32) if p[-2].key == "o" and p[0].key == "decoder" else x, params
    )
    with pytest.raises(InputError, match=r"decoder/blocks_0/down: activations are not finite"):
        calib.collect(model, damaged, batches(1), SPLIT)
    with pytest.raises(InputError, match="placeholders"):
        calib.collect(model, params, [b | {"pixel_values": b["pixel_values"][:1]} for b in batches(1)], SPLIT)
    with pytest.raises(InputError, match="no main group"):
        calib.collect(model, params, batches(1), SplitSize(rate=0.5, align=1))
    with pytest.raises(InputError, match="lengths"):
        calib.fit(model, params, params, batches(1) + batches(1, length=16), SHORT)


def test_calibration_multiplies_in_float32(tiny):
    seen = []

    def none_at_all():
        seen.append(jax.config.jax_default_matmul_precision)
        yield from ()

    for given in (None, "default"):
        with jax.default_matmul_precision(given):
            for run in (calib.collect, partial(calib.fit, prepared={}), partial(calib.site_errors, quantized=tiny[1])):
                with pytest.raises(InputError, match="empty"):
                    run(*tiny, batches=none_at_all())
    assert seen == 3 * ["highest"] + 3 * ["default"]


def test_settings_that_are_refused():
    for changes in ({"loss": "huber"}, {"steps": 0}, {"epochs": 0}, {"batch_size": -1}):
        with pytest.raises(InputError):
            FitConfig(**changes)
    assert EFFORTS["full"].steps is None

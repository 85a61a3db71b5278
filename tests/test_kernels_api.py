"""What surrounds the products: the choice of a backend, refusals, devices, the layout of each."""

import importlib
import logging
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_reference import (
    ACCUMULATION,
    SCHEMES,
    assert_close,
    given_operands,
    mask_of,
    numpy_product,
    run,
    site_of,
    tokens_of,
)
from tpu_targets import SIZES, sites_of

from splitq_jax.errors import InputError
from splitq_jax.kernels import api, tiles
from splitq_jax.kernels.layout import native
from splitq_jax.linear import linear
from splitq_jax.qtensor import quantize_columns
from splitq_jax.sharding import of
from splitq_jax.transforms import orthogonal


def test_the_platform_chooses_inside_jit():
    """On CPU the reference runs, bit for bit; a program lowered for another platform would hold its kernel."""
    w, x = site_of(10, 576, 64, (4, 4), side=8, ranks=(11, 17)), tokens_of(10, 9, 576, jnp.float32)
    chosen, forced = (jax.jit(lambda x, w, b=b: api.split_matmul(x, w, backend=b))(x, w) for b in (None, "reference"))
    assert (chosen == forced).all()
    assert (jax.jit(linear)(x[None], w)[0] == chosen).all()
    assert api.split_matmul(x, w, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_what_the_kernels_take(backend):
    """A refusal is right but slow, and would leave the kernels untested."""
    if backend == "reference":
        return
    module = importlib.import_module(f"splitq_jax.kernels.{backend}")
    for bits in SCHEMES:
        for width, side, ranks in ((576, 8, (11, 17)), (1536, 64, (32, 48)), (3584, 64, (0, 0))):
            w = site_of(0, width, 136, bits, side=side, ranks=ranks, transform=False)
            for job in ("quantize_activations", "quantized_matmul", "decode_matmul"):
                assert module.refuses(job, w, 16) is None
    for bits, scales in ((4, 1), (3, 7), (4, 28)):
        w = site_of(0, 1024, 136, (bits, 16), ranks=(48, 0), transform=False, scales=scales)
        for job in ("quantize_activations", "quantized_matmul", "decode_matmul"):
            assert module.refuses(job, w, 16) is None
    assert "group" in module.refuses("quantized_matmul", site_of(0, 1024, 136, (4, 4), transform=False, scales=7), 16)
    for bits, group in ((4, 0), (3, 0), (4, 32), (3, 64), (4, 128)):
        w = quantize_columns(jnp.ones((1024, 136)), bits, group=group or None)
        assert module.refuses("weight_only_matmul", w, 16) is None
    odd = {"tpu": 40, "gpu": 96}[backend]
    assert f"groups of {odd}" in module.refuses("weight_only_matmul", quantize_columns(jnp.ones((960, 136)), 4, group=odd), 16)
    w = site_of(0, 576, 136, (4, 4), side=8, ranks=(0, 0))
    three = replace(w.groups[1], w=quantize_columns(jnp.ones((8, 136)), 3))
    assert "bits" in module.refuses("quantized_matmul", replace(w, groups=(w.groups[0], three, w.groups[2])), 16)


def test_what_does_not_fit_is_named(caplog):
    w = site_of(11, 576, 64, (4, 4), side=8, ranks=(11, 17))
    with pytest.raises(InputError, match="backend 'cpu'"):
        api.split_matmul(tokens_of(0, 4, 576), w, backend="cpu")
    with pytest.raises(InputError, match="side operand"):
        api.quantized_matmul(given_operands(0, 4, w)._replace(side=None), w)
    x, text = tokens_of(0, 4, 576), mask_of("mixed", 4)
    for found, expected, args in (
        ("[4, 577]", "M, 576", (jnp.pad(x, ((0, 0), (0, 1))), w)),
        ("[4, 500]", "M, 576", (x[:, :500], w)),
        ("[1, 4, 576]", "M, 576", (x[None], w)),
        ("int32", "floats", (x.astype(jnp.int32), w)),
        ("bool[5]", "bool[4]", (x, w, mask_of("mixed", 5))),
        ("int32[4]", "bool[4]", (x, w, text.astype(jnp.int32))),
        ("[65]", "[64]", (x, w, text, jnp.zeros(65))),
        ("[1, 64]", "[64]", (x, w, text, jnp.zeros((1, 64)))),
    ):
        for job in (api.split_matmul, api.decode_matmul):
            with pytest.raises(InputError, match=f"{re.escape(found)}.*{re.escape(expected)}"):
                job(*args)
    with pytest.raises(InputError, match=re.escape("[4, 100]; expected floats [M, ")):
        api.weight_only_matmul(tokens_of(0, 4, 100), w.groups[0].w)
    with pytest.raises(InputError, match=r"no derivative.*prepare"):
        jax.grad(lambda x: api.split_matmul(x, w).sum())(tokens_of(0, 4, 576, jnp.float32))
    with pytest.raises(InputError, match="divide"):
        quantize_columns(jnp.ones((100, 4)), 4, group=32)
    two_bits = site_of(12, 576, 64, (2, 4), side=0, ranks=(0, 0), transform=False)
    a = given_operands(12, 4, two_bits)
    for name in api.PLATFORMS:
        with caplog.at_level(logging.DEBUG, "splitq_jax.kernels"):
            got = run(api.quantized_matmul, a, two_bits, backend=name)
        assert f"{name} leaves it to the reference" in caplog.text
        assert_close(got, *numpy_product("reference", a, two_bits, None), jnp.bfloat16)


def test_scales_per_group_beside_codes_of_activations():
    """Every kernel leaves them to the reference."""
    w = site_of(0, 1024, 136, (4, 4), transform=False, scales=7)
    a = given_operands(0, 6, w)
    for backend in (None, *api.PLATFORMS):
        assert_close(run(api.quantized_matmul, a, w, backend=backend), *numpy_product("reference", a, w, None), jnp.bfloat16)


def test_rule_of_tiles():
    """It stays inside VMEM and divides the shape, for every site, phase and type of operand."""
    for generation, vmem in ((5, 128), (6, 128), (7, 64)):
        on = tiles.Chip(generation, vmem * tiles.MIB * 25 // 32)
        for width, columns in {shape for model in SIZES for shape in sites_of(model).values()}:
            for tokens in (1, 16, 64, 100, 256, 2048, 2500, 5000, 8192):
                for x, w, decoded in ((1, 0.5, 1), (1, 0.375, 1), (2, 0.5, 2)):
                    token = width * x + 2 * 256 + 512
                    t = tiles.tiles(on, tokens, width, columns, token, w, decoded)
                    assert columns % t.columns == 0 and t.columns % (128 if generation == 5 else 256) == 0  # columns of the MXU
                    assert t.tokens % t.block == 0 and t.block % t.rows == 0 and tokens <= t.tokens < tokens + 1024
                    assert t.rows % (t.pieces * (64 if t.pieces > 1 else 8)) == 0
                    buffers = width * t.columns * (t.depth * w + decoded) + t.block * token + t.rows * t.columns * 12
                    assert buffers < on.vmem


def test_no_tokens_give_no_results(backend):
    w = site_of(12, 576, 64, (4, 4), side=8, ranks=(11, 17))
    assert run(api.split_matmul, tokens_of(0, 0, 576), w, None, backend=backend).shape == (0, 64)
    assert run(
        api.weight_only_matmul, tokens_of(0, 0, 576), quantize_columns(jnp.ones((576, 24)), 4, group=32), backend=backend
    ).shape == (0, 24)


def test_a_broken_token_stays_broken():
    """Every width: XLA's maxima on CPU leave NaN out of wide tokens."""
    for backend, width in (("reference", 576), ("tpu", 576), ("tpu", 896), ("tpu", 127)):
        w = site_of(14, width, 24, (4, 4), side=0, ranks=(0, 0))
        for x in (tokens_of(0, 3, width), tokens_of(0, 70, width), tokens_of(0, 70, width, jnp.float32)):
            y = run(api.split_matmul, x.at[1, 5].set(jnp.nan), w, backend=backend)
            assert jnp.isnan(y[1]).all() and jnp.isfinite(y[0]).all(), (backend, width, x.shape, x.dtype)


def placed_on(mesh, w):
    return jax.device_put(w, of({"down": {"kernel": w}}, mesh)["down"]["kernel"])


@pytest.mark.parametrize("backend", [None, "tpu"])
def test_output_channels_over_devices(backend):
    """Every device computes its own channels: the same to the last bit, each holds a quarter of the weight and nothing is gathered."""
    w = site_of(13, 576, 256, (4, 4), side=8, ranks=(11, 17))
    x, text = tokens_of(13, 6, 576, jnp.float32), mask_of("mixed", 6)
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])
    placed = placed_on(mesh, w)
    assert placed.groups[0].w.words[0].sharding.shard_shape((70, 256)) == (70, 64)
    product = jax.jit(partial(api.split_matmul, backend=backend))
    whole = product(x, w, text)
    with jax.set_mesh(mesh):
        cut = product(x, placed, text)
        program = product.lower(x, placed, text).compile().as_text()
    assert (np.asarray(cut) == np.asarray(whole)).all() and cut.sharding.shard_shape(cut.shape) == (6, 64)
    assert backend or not re.search("all-gather|all-reduce|all-to-all|permute", program)


def test_tokens_and_output_channels_over_devices():
    """Over two axes at once, at every step of the API and where the mesh does not divide the channels."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    for columns, share in ((256, 64), (250, 250)):
        w = site_of(14, 576, columns, (4, 4), side=8, ranks=(11, 17))
        x, text = tokens_of(14, 128, 576, jnp.float32), mask_of("mixed", 128)
        bias = jnp.arange(columns, dtype=jnp.float32)

        def both(x, text, w, bias):
            return api.quantized_matmul(api.quantize_activations(x, w, text), w, bias, dtype=jnp.float32)

        args = jax.device_put(x, rows), jax.device_put(text, rows), placed_on(mesh, w), bias
        whole = jax.jit(both)(x, text, w, bias)
        with jax.set_mesh(mesh):
            cut = jax.jit(both)(*args)
        assert cut.sharding.shard_shape(cut.shape) == (64, share)
        assert np.abs(np.asarray(cut) - np.asarray(whole)).max() <= ACCUMULATION * np.abs(np.asarray(whole)).max()
        only = w.groups[0].w
        weight_only = jax.jit(partial(api.weight_only_matmul, dtype=jnp.float32))
        whole = weight_only(x[:, : only.rows], only, bias)
        with jax.set_mesh(mesh):
            cut = weight_only(args[0][:, : only.rows], args[2].groups[0].w, bias)
        assert np.abs(np.asarray(cut) - np.asarray(whole)).max() <= ACCUMULATION * np.abs(np.asarray(whole)).max()


@pytest.mark.parametrize("bits", [(4, 4), (3, 16)])
@pytest.mark.parametrize("devices", [1, 4])
def test_gate_and_up_write_in_the_order_in_which_down_reads(bits, devices):
    """No channel is picked before ``down``, the values are the same, and each device keeps its columns."""
    up = site_of(0, 72, 2 * 96, bits, side=8, ranks=(3, 5), transform=False)
    down = site_of(1, 96, 72, bits, side=8, ranks=(3, 5), transform=False)
    bias = jnp.asarray(np.random.default_rng(2).standard_normal(2 * 96), jnp.float32)
    tree = {"blocks_0": {"gate_up": {"kernel": up, "bias": bias}, "down": {"kernel": down}}}
    mesh = jax.make_mesh((devices,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])
    tree = jax.device_put(tree, of(tree, mesh))
    laid = native(tree, "tpu")
    assert laid["blocks_0"]["down"]["kernel"].perm is None and down.perm is not None
    before, after = (jax.tree.leaves(t["blocks_0"]["gate_up"]) for t in (tree, laid))
    assert [a.sharding.shard_shape(a.shape) for a in before] == [a.sharding.shard_shape(a.shape) for a in after]

    @jax.jit
    def mlp(tree, x, text):
        block = tree["blocks_0"]
        gate, up = jnp.split(linear(x, block["gate_up"]["kernel"], text) + block["gate_up"]["bias"][None, :], 2, axis=-1)
        return linear(jnp.maximum(gate, 0) * up, block["down"]["kernel"], text)

    x, text = tokens_of(3, 9, 72, jnp.float32), mask_of("mixed", 9)
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(mlp(laid, x, text), mlp(tree, x, text))


@pytest.mark.parametrize("dense", [False, True])
def test_side_transforms_become_one_matrix_on_accelerators(dense):
    w = site_of(0, 96, 40, (4, 16), side=8, ranks=(3, 0))
    if dense:
        groups = [replace(g, transform=replace(g.transform, p1=None, p2=jnp.asarray(orthogonal(8, 3)))) for g in w.groups[1:]]
        w = replace(w, groups=(w.groups[0], *groups))
    laid = native({"down": {"kernel": w}}, "tpu")["down"]["kernel"]
    assert all(g.transform.d is None and g.transform.p1 is None for g in laid.groups[1:])
    assert jax.tree.structure(laid.groups[0].transform) == jax.tree.structure(w.groups[0].transform)
    x = tokens_of(1, 5, 96, jnp.float32)
    np.testing.assert_allclose(linear(x, laid), linear(x, w), rtol=1e-5, atol=1e-5)

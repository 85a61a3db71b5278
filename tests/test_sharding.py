"""Parameters on a mesh: how each is split, and that nothing but their place changes."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from tiny import CONFIG, batches, model_and_params

import splitq_jax as sq
from splitq_jax import models, sharding
from splitq_jax.acc import LowRank
from splitq_jax.errors import InputError
from splitq_jax.linear import Group
from splitq_jax.qtensor import quantize_columns, quantize_rows
from splitq_jax.transforms import Transform

MESHES = {
    "fsdp x tensor": ((2, 4), ("fsdp", "tensor")),
    "data x fsdp x tensor": ((2, 2, 2), ("data", "fsdp", "tensor")),
    "tensor": ((8,), ("tensor",)),
    "fsdp": ((8,), ("fsdp",)),
    "data": ((8,), ("data",)),
}


def mesh_of(name: str) -> Mesh:
    shape, axes = MESHES[name]
    return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.export(tmp_path_factory.mktemp("sharding") / "model", CONFIG, model_and_params()[1], {})


@pytest.fixture(scope="module")
def quantized() -> tuple[Any, Any]:
    """The tiny model with a site in packed codes: three groups, both branches, float activations (whose rounding would show ties)."""
    model, params = model_and_params()
    site = params["decoder"]["blocks_0"]["down"]
    rng = np.random.default_rng(0)

    def rows(k: int) -> Group:
        transform = Transform(jnp.ones(k), None, jnp.eye(k))
        return Group(transform, None, quantize_columns(jnp.asarray(rng.standard_normal((k, 32)), jnp.float32), 3), 16)

    u, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((32, 4), (4, 32)))
    branches = LowRank(quantize_columns(u, 8), quantize_rows(v, 8), jnp.ones(3), jnp.ones(4))
    perm = jnp.asarray(rng.permutation(48), jnp.int32)
    site["kernel"] = sq.SplitWeight(perm, (rows(32), rows(8), rows(8)), branches, "text", 16)
    return model, params


def same(a: Any, b: Any) -> bool:
    """Equal structure, static fields and bits."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


# --- the table

LAYER = "decoder/blocks_3"
SPECS: list[tuple[str, tuple[int, ...], P]] = [
    ("decoder/embed/embedding", (96, 32), P("tensor", "fsdp")),
    ("decoder/head/kernel", (32, 96), P("fsdp", "tensor")),
    (f"{LAYER}/qkv/kernel", (32, 64), P("fsdp", "tensor")),
    (f"{LAYER}/qkv/bias", (64,), P("tensor")),
    (f"{LAYER}/o/kernel", (32, 32), P("tensor", "fsdp")),
    (f"{LAYER}/o/bias", (32,), P()),
    (f"{LAYER}/gate_up/kernel", (32, 96), P("fsdp", "tensor")),
    (f"{LAYER}/down/kernel", (48, 32), P("tensor", "fsdp")),
    (f"{LAYER}/norm_attn/scale", (32,), P()),
    ("vision/blocks_0/fc1/bias", (24,), P("tensor")),
    ("vision/blocks_0/fc2/kernel", (24, 16), P("tensor", "fsdp")),
    ("projector/anything/kernel", (16, 32), P("fsdp", "tensor")),
    ("vision/position", (5, 16), P()),
    # what the mesh does not divide
    (f"{LAYER}/qkv/kernel", (33, 64), P(None, "tensor")),
    (f"{LAYER}/qkv/kernel", (32, 66), P("fsdp", None)),
    (f"{LAYER}/qkv/bias", (66,), P(None)),
    # typed leaves: packed codes along their columns, whole rows
    (f"{LAYER}/down/kernel/groups/0/w/words/0", (6, 32), P(None, ("tensor", "fsdp"))),
    (f"{LAYER}/down/kernel/groups/0/w/words/1", (8, 36), P(None, "tensor")),
    (f"{LAYER}/down/kernel/groups/2/w/scale", (1, 34), P(None, "fsdp")),
    (f"{LAYER}/down/kernel/groups/2/w/scale", (4, 33), P(None, None)),
    (f"{LAYER}/down/kernel/groups/0/transform/p1", (8, 8), P()),
    (f"{LAYER}/down/kernel/perm", (48,), P()),
    (f"{LAYER}/down/kernel/branches/u/words/0", (48, 4), P()),
    (f"{LAYER}/down/kernel/branches/u/scale", (1, 4), P()),
    (f"{LAYER}/down/kernel/branches/v/words/0", (4, 32), P(None, ("tensor", "fsdp"))),
    (f"{LAYER}/down/kernel/branches/v/scale", (4, 1), P(None, None)),
    # under calibration
    (f"{LAYER}/down/kernel/w", (48, 32), P("tensor", "fsdp")),
    (f"{LAYER}/down/kernel/branches/u", (48, 4), P("tensor", None)),
    (f"{LAYER}/down/kernel/groups/0/w_clip", (2, 1, 32), P(None, None, "fsdp")),
    # no parameter, and another number of axes than a parameter of that name has
    ("decoder.blocks_0.qkv/absmax", (3, 32), P()),
    ("x/kernel", (4, 8, 16), P()),
]


@pytest.mark.parametrize(("path", "shape", "expected"), SPECS, ids=str)
def test_how_a_leaf_is_split(path: str, shape: tuple[int, ...], expected: P) -> None:
    assert sharding.spec(path, shape, mesh_of("fsdp x tensor").shape) == expected


def test_a_mesh_need_not_have_all_axes(quantized: tuple[Any, Any]) -> None:
    found = {name: sharding.spec(f"{LAYER}/o/kernel", (32, 64), mesh_of(name).shape) for name in MESHES}
    both = P("tensor", "fsdp")
    expected = {"fsdp x tensor": both, "data x fsdp x tensor": both, "tensor": P("tensor", None), "fsdp": P(None, "fsdp")}
    assert found == expected | {"data": P(None, None)}
    with pytest.raises(InputError, match=r"mesh: axis 'model'; expected data, fsdp, tensor"):
        sharding.of(quantized[1], jax.make_mesh((8,), ("model",)))


def test_shardings_have_the_structure_of_the_tree(quantized: tuple[Any, Any]) -> None:
    params = quantized[1]
    mesh = mesh_of("fsdp x tensor")
    places = sharding.of(params, mesh)
    assert jax.tree.structure(places) == jax.tree.structure(params)
    site = places["decoder"]["blocks_0"]["down"]["kernel"]
    assert [words.spec for words in site.groups[0].w.words] == [P(None, ("tensor", "fsdp"))]
    assert site.branches.u.words[0].spec == P() and site.perm.spec == P()
    assert same(jax.device_put(params, places), params)
    shapes = jax.eval_shape(lambda: params)  # a template will do
    assert sharding.of(shapes, mesh) == places


# --- loading


@pytest.mark.parametrize("name", ["fsdp x tensor", "data x fsdp x tensor", "tensor"])
def test_the_logits_do_not_depend_on_the_mesh(name: str, folder: Path) -> None:
    model, params = models.load(folder)
    mesh = mesh_of(name)
    _, placed = models.load(folder, mesh=mesh)
    assert same(params, placed)
    for leaf, place in zip(jax.tree.leaves(placed), jax.tree.leaves(sharding.of(params, mesh)), strict=True):
        assert leaf.sharding == place and len(leaf.addressable_shards) == 8
    kernel = placed["decoder"]["blocks_1"]["gate_up"]["kernel"]
    width = mesh.shape.get("fsdp", 1), mesh.shape.get("tensor", 1)
    assert kernel.addressable_shards[0].data.shape == (32 // width[0], 96 // width[1])
    batch = model.prepare(batches(1)[0])
    forward = jax.jit(lambda p: model.apply({"params": p}, **batch))
    expected, found = np.asarray(forward(params)), np.asarray(forward(placed))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_generation_on_a_mesh(folder: Path) -> None:
    batch = {k: v[:3] for k, v in batches(1)[0].items()}
    model, params = models.load(folder)
    _, placed = models.load(folder, mesh=mesh_of("fsdp x tensor"))
    found, expected = (np.stack(models.generate(model, p, batch, 4)) for p in (placed, params))
    np.testing.assert_array_equal(found, expected)


def test_quantized_generation_on_a_mesh(quantized: tuple[Any, Any]) -> None:
    """The devices' kernels are found by themselves; float activations leave no ties to break."""
    batch = {k: v[:2] for k, v in batches(1)[0].items()}
    model, params = quantized
    placed = jax.device_put(params, sharding.of(params, mesh_of("data x fsdp x tensor")))
    found, expected = (np.stack(models.generate(model, p, batch, 4)) for p in (placed, params))
    np.testing.assert_array_equal(found, expected)


def test_explicit_axes_are_taken_as_automatic_ones(folder: Path) -> None:
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    model, placed = models.load(folder, mesh=mesh)
    batch = model.prepare(batches(1)[0])
    logits = jax.eval_shape(lambda: model.apply({"params": placed}, **batch))  # JAX would ask for the sharding of each product
    assert logits.shape == (4, 14, 96)
    with pytest.raises(InputError, match="mesh: axis 'x'"):
        models.load(folder, mesh=jax.make_mesh((8,), ("x",)))


# --- checkpoints


def test_a_checkpoint_may_go_from_any_mesh_to_any(quantized: tuple[Any, Any], tmp_path: Path) -> None:
    model, params = quantized
    first, second = mesh_of("fsdp x tensor"), mesh_of("data x fsdp x tensor")
    placed = jax.device_put(params, sharding.of(params, first))
    sq.save(tmp_path / "sharded", placed)
    sq.save(tmp_path / "whole", params)
    leaves = [sq.checkpoint.read_manifest(tmp_path / name)["leaves"] for name in ("sharded", "whole")]
    assert leaves[0] == leaves[1]
    for name in ("sharded", "whole"):
        for mesh in (None, first, second):
            again, _ = sq.restore(tmp_path / name, mesh=mesh)
            assert same(again, params)
            if mesh is not None:
                assert all(
                    x.sharding == y for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(sharding.of(params, mesh)), strict=True)
                )
    batch = model.prepare(batches(1)[0])
    forward = jax.jit(lambda p: model.apply({"params": p}, **batch))
    expected, found = np.asarray(forward(params)), np.asarray(forward(placed))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    with pytest.raises(InputError, match="mesh: axis 'x'"):
        sq.restore(tmp_path / "whole", mesh=jax.make_mesh((8,), ("x",)))


def test_a_sharded_array_is_checked(tmp_path: Path) -> None:
    sq.save(tmp_path / "out", {"fc1": {"kernel": jnp.ones((8, 8))}})
    manifest = sq.checkpoint.read_manifest(tmp_path / "out")
    manifest["leaves"]["fc1/kernel"]["sha256"] = "0" * 64
    del manifest["manifest_sha256"]
    (tmp_path / "out" / "manifest.json").write_bytes(sq.checkpoint.seal(manifest))
    with pytest.raises(InputError, match="array fc1/kernel: differs from its checksum"):
        sq.restore(tmp_path / "out", mesh=mesh_of("fsdp x tensor"))


def test_a_host_copy_is_not_kept() -> None:
    """`numpy.asarray` of an array on several devices stays in memory as long as the array does."""
    mesh = mesh_of("fsdp x tensor")
    array = jax.device_put(jnp.arange(64.0).reshape(8, 8), sharding.sharding("fc1/kernel", (8, 8), mesh))
    first, second = sharding.on_host(array), sharding.on_host(array)
    np.testing.assert_array_equal(first, np.arange(64.0).reshape(8, 8))
    assert not np.shares_memory(first, second)
    assert np.shares_memory(np.asarray(array), np.asarray(array))  # if this fails, JAX has changed and `on_host` may be simpler

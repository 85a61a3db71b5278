import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import splitq_jax
from splitq_jax import checkpoint
from splitq_jax.errors import InputError
from splitq_jax.manifest import MANIFEST, seal

LEAVES = """
from typing import Any
from flax import struct

@struct.dataclass
class Codes:
    words: Any
    scale: Any
    bits: int = struct.field(pytree_node=False)
    shape: tuple[int, ...] = struct.field(pytree_node=False)

@struct.dataclass
class Split:
    groups: tuple[Codes, ...]
    branch: Codes | None
    clip: float = struct.field(pytree_node=False)
    scheme: str = struct.field(pytree_node=False)
"""


@pytest.fixture(scope="module", autouse=True)
def leaves(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A module of typed leaves, inside the package as far as imports can tell."""
    folder = tmp_path_factory.mktemp("leaves")
    (folder / "fake_leaves.py").write_text(LEAVES)
    splitq_jax.__path__.append(str(folder))
    from splitq_jax import fake_leaves

    yield fake_leaves
    splitq_jax.__path__.remove(str(folder))
    del sys.modules["splitq_jax.fake_leaves"]


def codes(leaves: Any, rows: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    words = jnp.asarray(rng.integers(0, 2**32, (rows, 7), dtype=np.uint32))
    return leaves.Codes(words, jnp.asarray(rng.standard_normal((1, 7)), jnp.bfloat16), 3, (rows * 8, 7))


@pytest.fixture
def params(leaves: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    weird = np.array([np.nan, np.inf, -0.0, 1e-42], np.float32).view(np.uint32)
    weird[0] |= 5  # a NaN with a payload
    split = leaves.Split((codes(leaves, 5, 1), codes(leaves, 0, 2)), None, 0.1 + 0.2, "w3a3")
    return {
        "vision": {"kernel": jnp.asarray(rng.standard_normal((64, 80)), jnp.float32), "bias": None},
        "decoder": {
            "blocks_0": {"qkv": {"kernel": split}, "norm.1": {"scale": jnp.asarray(weird.view(np.float32))}},
            "embed": {"embedding": jnp.asarray(rng.standard_normal((33, 8)), jnp.bfloat16)},
            "none": {},
        },
        "other": (
            (jnp.arange(5, dtype=jnp.int8), None),
            [jnp.arange(3), jnp.zeros((), jnp.float32)],
            jnp.zeros((2, 0)),
        ),
    }


def same(a: Any, b: Any) -> bool:
    """Equal structure, static fields and bits."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def reseal(folder: Path, change: Any) -> None:
    manifest = checkpoint.read_manifest(folder)
    del manifest["manifest_sha256"]
    change(manifest)
    (folder / MANIFEST).write_bytes(seal(manifest))


def test_round_trip_is_bit_for_bit(params: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    checkpoint.save(out, params, recipe={"scheme": "w3a3"}, config={"layers": 1}, extra={"seed": 0, "who": ("a", 1.5)})
    restored, manifest = checkpoint.restore(out)
    assert same(params, restored)
    assert restored["decoder"]["blocks_0"]["qkv"]["kernel"].clip == 0.1 + 0.2
    assert restored["decoder"]["blocks_0"]["qkv"]["kernel"].groups[0].shape == (40, 7)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(restored))
    assert manifest["recipe"] == {"scheme": "w3a3"} and manifest["extra"] == {"seed": 0, "who": ["a", 1.5]}
    leaf = manifest["leaves"]["decoder/blocks_0/qkv/kernel/groups/0/words"]
    assert leaf["shape"] == [5, 7] and leaf["dtype"] == "uint32" and len(leaf["sha256"]) == 64
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_a_new_process_restores_without_a_template(params: dict[str, Any], leaves: Any, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "out", params)
    code = f"""
import splitq_jax
splitq_jax.__path__.append({str(Path(leaves.__file__).parent)!r})
from splitq_jax import checkpoint
tree, _ = checkpoint.restore({str(tmp_path / "out")!r})
assert type(tree["decoder"]["blocks_0"]["qkv"]["kernel"]).__name__ == "Split"
checkpoint.save({str(tmp_path / "again")!r}, tree)
"""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # another number of devices
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert same(params, checkpoint.restore(tmp_path / "again")[0])


def test_every_flipped_byte_is_refused(params: dict[str, Any], tmp_path: Path) -> None:
    whole = checkpoint.save(tmp_path / "whole", params)
    rng = np.random.default_rng(0)
    files = sorted(f.relative_to(whole) for f in whole.rglob("*") if f.is_file())
    assert len(files) > 5
    for trial in range(60):
        name = files[trial % len(files)]
        copy = tmp_path / f"copy{trial}"
        shutil.copytree(whole, copy)
        content = bytearray((copy / name).read_bytes())
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        (copy / name).write_bytes(content)
        with pytest.raises(InputError, match=str(copy)):
            checkpoint.restore(copy)
        shutil.rmtree(copy)


def test_a_changed_array_is_named(params: dict[str, Any], tmp_path: Path) -> None:
    """Even where every file matches: an array is checked once more after orbax has read it."""
    out = checkpoint.save(tmp_path / "out", params)

    def change(manifest: dict[str, Any]) -> None:
        manifest["leaves"]["vision/kernel"]["sha256"] = "0" * 64

    reseal(out, change)
    with pytest.raises(InputError, match="array vision/kernel: differs from its checksum"):
        checkpoint.restore(out)
    reseal(out, lambda m: m["leaves"]["vision/kernel"].update(shape=[80, 64]))
    with pytest.raises(InputError, match=r"vision/kernel: float32 \[64, 80\], expected float32 \[80, 64\]"):
        checkpoint.restore(out)


def test_missing_and_foreign_files_are_refused(params: dict[str, Any], tmp_path: Path) -> None:
    out = checkpoint.save(tmp_path / "out", params)
    (out / "tokenizer.json").write_text("beside the arrays, others may keep files")
    checkpoint.restore(out)
    (out / "arrays" / "more").write_text("")
    with pytest.raises(InputError, match="arrays/more is not in manifest"):
        checkpoint.restore(out)
    (out / "arrays" / "more").unlink()
    (out / "arrays" / "_METADATA").unlink()
    with pytest.raises(InputError, match="_METADATA is missing"):
        checkpoint.restore(out)
    for broken in (tmp_path / "nothing", tmp_path):
        with pytest.raises(InputError, match=r"manifest\.json: No such file"):
            checkpoint.restore(broken)


@pytest.mark.parametrize("entry", [{"version": 2}, {"format": "other"}])
def test_another_format_is_refused(entry: dict[str, Any], tmp_path: Path) -> None:
    out = checkpoint.save(tmp_path / "out", {"w": jnp.ones(3)})
    reseal(out, lambda m: m.update(entry))
    with pytest.raises(InputError, match="expected 'splitq_jax checkpoint', version 1"):
        checkpoint.restore(out)


@pytest.mark.parametrize("name", ["os:system", "splitq_jax.errors:InputError", "splitq_jax.nothing:X", "splitq_jax.x:y.z"])
def test_only_leaves_of_this_package_are_resolved(name: str, leaves: Any, tmp_path: Path) -> None:
    out = checkpoint.save(tmp_path / "out", {"w": codes(leaves, 2, 0)})
    reseal(out, lambda m: m["tree"]["dict"]["w"].update(type=name))
    with pytest.raises(InputError, match="only those can be restored"):
        checkpoint.restore(out)


def test_changed_fields_are_refused(leaves: Any, tmp_path: Path) -> None:
    out = checkpoint.save(tmp_path / "out", {"w": codes(leaves, 2, 0)})
    reseal(out, lambda m: m["tree"]["dict"]["w"]["static"].pop("bits"))
    with pytest.raises(InputError, match="was saved with the fields"):
        checkpoint.restore(out)


def test_existing_output_needs_overwrite(tmp_path: Path) -> None:
    out = checkpoint.save(tmp_path / "out", {"w": jnp.ones(3)})
    with pytest.raises(InputError, match="--overwrite"):
        checkpoint.save(out, {"w": jnp.zeros(3)})
    assert checkpoint.restore(out)[0]["w"][0] == 1
    checkpoint.save(out, {"w": jnp.zeros(3)}, overwrite=True)
    assert checkpoint.restore(out)[0]["w"][0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="is not a checkpoint"):
        checkpoint.save(tmp_path / "mine", {"w": jnp.ones(3)}, overwrite=True)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"w": "text"}, "w: str"),
        ({"w": 1.0}, "w: float"),
        ({"w": np.ones(2)}, "w: ndarray of float64"),
        ({"a/b": jnp.ones(2)}, "key 'a/b'"),
        ({3: jnp.ones(2)}, "key 3"),
        ({"w": jax.random.key(0)}, "w: .*key"),
    ],
)
def test_what_cannot_be_restored_is_not_saved(tree: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        checkpoint.save(tmp_path / "out", tree)
    assert not list(tmp_path.iterdir())


def test_static_fields_that_cannot_be_restored(leaves: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="w/bits: static field"):
        checkpoint.save(tmp_path / "out", {"w": codes(leaves, 2, 0).replace(bits=[1])})
    with pytest.raises(InputError, match=r"extra\.when"):
        checkpoint.save(tmp_path / "out", {"w": jnp.ones(3)}, extra={"when": object()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_half_written_remains(
    error: type[BaseException], overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if overwrite:
        checkpoint.save(out, {"w": jnp.ones(3)})

    def fail(_: Any) -> bytes:
        raise error("in the middle")

    monkeypatch.setattr(checkpoint, "seal", fail)
    with pytest.raises(InputError if error is OSError else error, match="in the middle"):
        checkpoint.save(out, {"w": jnp.zeros(3)}, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if overwrite else [])
    if overwrite:
        assert checkpoint.restore(out)[0]["w"][0] == 1


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free in (1, 13):  # the array alone has 12
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(20, 20 - free, free))
        with pytest.raises(InputError, match=f" {free} bytes are free on this disk"):
            checkpoint.save(tmp_path / "out", {"w": jnp.ones(3)})
        assert not list(tmp_path.iterdir())


def test_a_tree_of_nothing(tmp_path: Path) -> None:
    for i, tree in enumerate(({}, None, (), {"a": jnp.zeros((0, 3), jnp.int8)}, jnp.arange(4))):
        out = checkpoint.save(tmp_path / str(i), tree)
        assert same(checkpoint.restore(out)[0], tree)


def test_the_manifest_may_hold_a_manifest(tmp_path: Path) -> None:
    first = checkpoint.save(tmp_path / "first", {"w": jnp.ones(3)})
    parent = checkpoint.read_manifest(first)
    second = checkpoint.save(tmp_path / "second", {"w": jnp.ones(3)}, extra={"parent": parent, "zeros": "0" * 64})
    assert checkpoint.restore(second)[1]["extra"]["parent"] == json.loads(json.dumps(parent))


def test_a_tree_may_be_written_in_parts(params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = checkpoint.save(tmp_path / "whole", params)
    monkeypatch.setattr(checkpoint, "PART", 0)  # the largest array's size, 20,480 bytes
    rows = np.arange(3 * 5000, dtype=np.int32).reshape(3, 5000)
    made: list[int] = []

    def leaf(i: int) -> checkpoint.Deferred:
        return checkpoint.Deferred((5000,), np.dtype(np.int32), lambda: made.append(i) or rows[i])

    out = checkpoint.save(tmp_path / "out", params | {"more": [leaf(i) for i in range(3)]})
    assert made == [0, 1, 2]
    restored, manifest = checkpoint.restore(out)
    np.testing.assert_array_equal(np.stack(restored.pop("more")), rows)
    assert same(restored, params)
    assert {entry["part"] for entry in manifest["leaves"].values()} == {0, 1, 2, 3, 4}
    assert sorted(f.name for f in out.iterdir()) == ["arrays", "arrays_1", "arrays_2", "arrays_3", "arrays_4", MANIFEST]
    (out / "arrays_2" / "more").write_text("")
    with pytest.raises(InputError, match="arrays_2/more is not in manifest"):
        checkpoint.restore(out)
    shutil.rmtree(out / "arrays_2")
    with pytest.raises(InputError, match=r"arrays_2/.* is missing"):
        checkpoint.restore(out)
    reseal(whole, lambda m: [entry.pop("part") for entry in m["leaves"].values()])  # as it was before there were parts
    assert same(checkpoint.restore(whole)[0], params)


def test_a_leaf_that_cannot_be_made_leaves_nothing_behind(tmp_path: Path) -> None:
    def refuse() -> np.ndarray:
        raise InputError("model.safetensors: ends within tensor 'x'")

    for read, error in ((refuse, InputError), (lambda: np.ones(4, np.float32), ValueError)):
        with pytest.raises(error):
            checkpoint.save(tmp_path / "out", {"w": checkpoint.Deferred((3,), np.dtype(np.float32), read)})
    assert not list(tmp_path.iterdir())

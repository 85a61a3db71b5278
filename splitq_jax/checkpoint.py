"""Checkpoints: a folder of orbax arrays and a manifest that restores the typed tree with no template.

orbax stores neither static fields nor checksums: a tree saved with ``bits=4`` restores into a ``bits=2`` template
without a word, and of 150 flipped bits 14 came back as wrong values. So `manifest.json` holds the tree's structure, every
typed leaf's class and static fields, and a SHA-256 for every array, every file and itself. Only the last two functions
know orbax.

orbax holds a copy or two of what it is writing, so large trees are written in parts, one orbax folder each, and `Deferred` leaves are
made when their part's turn comes: neither a conversion nor a save holds a model twice.
"""

import hashlib
import importlib.metadata
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.progress import Progress

from splitq_jax.errors import InputError
from splitq_jax.manifest import FORMAT, MANIFEST, VERSION, Deferred, describe, is_checkpoint, plain, read_manifest, rebuild, seal
from splitq_jax.output import counter, drafted
from splitq_jax.processes import by_first, is_first
from splitq_jax.sharding import on_host, sharding

__all__ = ["Deferred", "read_manifest", "restore", "save"]

ARRAYS = "arrays"
PART = 1 << 25  # bytes; a part holds so much, or the largest array
SPARE = 1 << 24  # bytes on disk beyond the arrays: orbax's index and the manifest
PACKAGES = ("splitq-jax", "jax", "flax", "orbax-checkpoint")


def save(
    path: str | Path,
    params: Any,
    *,
    recipe: Any = None,
    config: Any = None,
    extra: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a parameter tree; the folder appears whole or not at all.

    Of several processes (`jax.distributed`) all call this with the same tree, and the first writes.

    Args:
      path: the folder to make.
      params: nested dicts, tuples, lists and None, with arrays, `Deferred` arrays or `flax.struct.dataclass` leaves of this package.
      recipe: what quantized it; with ``config`` and ``extra``, a dataclass or anything that JSON holds.
      config: the model's configuration.
      extra: anything else worth keeping: seed, data set, command.
      overwrite: replace a checkpoint that is already there.
      progress: a rich progress bar to add a task to, a step an array.

    Returns:
      ``path``.

    Raises:
      InputError: the folder exists; the disk is too full; a leaf, key or static field of a type that is not restored.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise InputError(
            f"{path}: {jax.process_count()} processes; call jax.distributed.initialize() first, so that one of them writes"
        )
    target = Path(path).resolve()
    by_first(partial(_check_target, target, overwrite))
    arrays: dict[str, Any] = {}
    tree = describe(params, "", arrays)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "versions": {p: importlib.metadata.version(p) for p in PACKAGES},
        "recipe": plain(recipe, "recipe"),
        "config": plain(config, "config"),
        "extra": plain(extra, "extra"),
        "tree": tree,
        "leaves": {},
    }
    if not is_first():
        for leaf in arrays.values():
            _gathered(leaf)
    by_first(partial(_write, target, arrays, manifest, progress))
    return Path(path)


def _write(target: Path, arrays: dict[str, Any], manifest: dict[str, Any], progress: Progress | None) -> None:
    try:
        _write_parts(target, arrays, manifest, progress)
    except Exception:
        for name, leaf in arrays.items():
            if name not in manifest["leaves"]:
                _gathered(leaf)  # where the other processes wait
        raise


def _write_parts(target: Path, arrays: dict[str, Any], manifest: dict[str, Any], progress: Progress | None) -> None:
    with drafted(target) as draft:
        needed, free = sum(v.nbytes for v in arrays.values()) + SPARE, shutil.disk_usage(draft).free
        if free < needed:
            raise InputError(f"{target}: {free:,} bytes are free on this disk, {needed:,} are needed; make room")
        count_array = counter(progress, "writing", len(arrays))
        for number, part in enumerate(_parts(arrays)):
            values = {}
            for name in part:
                values[name] = _gathered(_value(arrays[name]))
                manifest["leaves"][name] = _entry(values[name]) | {"part": number}
                count_array()
            _write_arrays(_folder(draft, number), {k: v for k, v in values.items() if v.size})  # orbax fails on empty arrays
            values.clear()
        manifest["files"] = {
            f.relative_to(draft).as_posix(): {"bytes": f.stat().st_size, "sha256": _file_digest(f)}
            for f in sorted(draft.rglob("*"))
            if f.is_file()
        }
        (draft / MANIFEST).write_bytes(seal(manifest))


def restore(path: str | Path, *, mesh: Mesh | None = None, on_host: bool = False) -> tuple[Any, dict[str, Any]]:
    """Read a checkpoint, bit for bit as it was saved, in any process; no template is needed.

    Args:
      path: the folder.
      mesh: devices to place the arrays on, as `splitq_jax.sharding` says, whatever mesh they were saved from; None: one device.
      on_host: give numpy arrays in host memory instead.

    Returns:
      The parameter tree and the manifest.

    Raises:
      InputError: a mesh of other axes; a file is missing, extra or differs from its checksum; an array differs from its own; another format;
        a type that is not a leaf of this package.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    leaves = manifest["leaves"]
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = {k: None if on_host else one if mesh is None else sharding(k, tuple(v["shape"]), mesh) for k, v in leaves.items()}
    parts: dict[int, list[str]] = {}
    for name, entry in leaves.items():
        parts.setdefault(int(entry.get("part", 0)), []).append(name)
    # files first: damaged bytes never reach orbax's decoders
    if damage := _file_damage(folder, manifest["files"], {0, *parts}):
        raise InputError(f"{folder}: {'; '.join(damage[:5])}; copy the folder again")
    arrays: dict[str, Any] = {}
    for number, names in parts.items():
        try:
            read = _read_arrays(_folder(folder, number), {k: places[k] for k in names if math.prod(leaves[k]["shape"])})
        except Exception as e:  # orbax and tensorstore raise what they like
            raise InputError(f"{folder}: orbax cannot read {ARRAYS}: {e}; restore it with the versions in {MANIFEST}") from e
        for name in names:
            if name not in read:  # holds nothing
                empty = np.zeros(leaves[name]["shape"], jnp.dtype(leaves[name]["dtype"]))
                read[name] = empty if on_host else jax.device_put(empty, places[name])
        if damage := [f"array {k}: {d}" for k, v in read.items() if (d := _leaf_damage(v, leaves[k]))]:
            raise InputError(f"{folder}: {'; '.join(damage[:5])}; copy the folder again")
        arrays |= read
    return rebuild(manifest["tree"], arrays, folder), manifest


# --- parts


def _parts(arrays: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the arrays' names, part by part; one at least."""
    limit = max([PART, *(v.nbytes for v in arrays.values())])
    part: list[str] = []
    held = 0
    for name, value in arrays.items():
        if part and held + value.nbytes > limit:
            yield part
            part, held = [], 0
        part.append(name)
        held += value.nbytes
    yield part


def _folder(checkpoint: Path, part: int) -> Path:
    return checkpoint / (f"{ARRAYS}_{part}" if part else ARRAYS)


def _gathered(leaf: Any) -> Any:
    """Return a leaf that orbax writes from one process alone: with several, who all call this, host memory of what they hold together."""
    return on_host(leaf) if isinstance(leaf, jax.Array) and jax.process_count() > 1 else leaf


def _value(leaf: Any) -> Any:
    if not isinstance(leaf, Deferred):
        return leaf
    value = leaf.read()
    if (value.shape, value.dtype) != (leaf.shape, leaf.dtype):
        raise ValueError(f"read gave {value.dtype}{value.shape}; the leaf was described as {leaf.dtype}{leaf.shape}")
    return value


# --- checksums and files


def _entry(array: Any) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": _digest(array)}


def _digest(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(on_host(array)).reshape(-1).view(np.uint8).data).hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _file_damage(folder: Path, files: dict[str, Any], parts: Iterable[int]) -> list[str]:
    """Compare the files of the parts with the manifest; a file that it does not know counts too."""
    damage = []
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            damage.append(f"{name} is missing")
        elif file.stat().st_size != entry["bytes"]:
            damage.append(f"{name} has {file.stat().st_size:,} bytes, expected {entry['bytes']:,}")
        elif _file_digest(file) != entry["sha256"]:
            damage.append(f"{name} differs from its checksum")
    held = (f for part in parts for f in _folder(folder, part).rglob("*") if not f.is_dir())
    present = {f.relative_to(folder).as_posix() for f in held}
    return damage + [f"{name} is not in {MANIFEST}" for name in sorted(present - files.keys())]


def _leaf_damage(array: Any, entry: dict[str, Any]) -> str:
    found, wanted = (array.dtype.name, list(array.shape)), (entry["dtype"], entry["shape"])
    if found != wanted:
        return f"{found[0]} {found[1]}, expected {wanted[0]} {wanted[1]}"
    return "" if _digest(array) == entry["sha256"] else "differs from its checksum"


def _check_target(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise InputError(f"{target} exists; choose another folder or pass --overwrite (overwrite=True)")
    if not is_checkpoint(target) and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target} exists and is not a checkpoint, so it is not overwritten; choose another folder")


# --- orbax: the only two functions that know it; imported late because it takes a second


def _write_arrays(folder: Path, arrays: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp

    if arrays:
        alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(arrays))


def _read_arrays(folder: Path, places: dict[str, jax.sharding.Sharding | None]) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    if not places:
        return {}
    how = {
        k: ocp.RestoreArgs(restore_type=np.ndarray)
        if place is None
        else ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=place)
        for k, place in places.items()
    }
    wanted = ocp.args.PyTreeRestore(item=dict.fromkeys(places, 0), restore_args=how)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored: dict[str, Any] = checkpointer.restore(folder.absolute(), args=wanted)
    return restored

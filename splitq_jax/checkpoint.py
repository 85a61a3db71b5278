"""Checkpoints: a folder of orbax arrays and a manifest that restores the typed tree with no template.

orbax stores neither static fields nor checksums: a tree saved with ``bits=4`` restores into a ``bits=2`` template
without a word, and of 150 flipped bits 14 came back as wrong values. So `manifest.json` holds the tree's structure, every
typed leaf's class and static fields, and a SHA-256 for every array, every file and itself. Only the last two functions
know orbax.
"""

import hashlib
import importlib.metadata
import math
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from splitq_jax.errors import InputError
from splitq_jax.manifest import FORMAT, MANIFEST, VERSION, describe, plain, read_manifest, rebuild, seal

__all__ = ["read_manifest", "restore", "save"]

ARRAYS = "arrays"
SPARE = 1 << 24  # bytes on disk beyond the arrays: orbax's index and the manifest
PACKAGES = ("splitq-jax", "jax", "flax", "orbax-checkpoint")


def save(
    path: str | Path, params: Any, *, recipe: Any = None, config: Any = None, extra: Any = None, overwrite: bool = False
) -> Path:
    """Write a parameter tree; the folder appears whole or not at all.

    Args:
      path: the folder to make.
      params: nested dicts, tuples, lists and None, with arrays or `flax.struct.dataclass` leaves of this package.
      recipe: what quantized it; with ``config`` and ``extra``, a dataclass or anything that JSON holds.
      config: the model's configuration.
      extra: anything else worth keeping: seed, data set, command.
      overwrite: replace a checkpoint that is already there.

    Returns:
      ``path``.

    Raises:
      InputError: the folder exists; the disk is too full; a leaf, key or static field of a type that is not restored.
    """
    target = Path(path).resolve()
    _check_target(target, overwrite)
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
        "leaves": {k: {"shape": list(v.shape), "dtype": v.dtype.name, "sha256": _digest(v)} for k, v in arrays.items()},
    }
    draft = _sibling(target)
    try:
        draft.mkdir(parents=True)
        needed, free = sum(v.nbytes for v in arrays.values()) + SPARE, shutil.disk_usage(draft).free
        if free < needed:
            raise InputError(f"{target}: {free:,} bytes are free on this disk, {needed:,} are needed; make room")
        _write_arrays(draft / ARRAYS, {k: v for k, v in arrays.items() if v.size})  # orbax fails on empty arrays
        manifest["files"] = {
            f.relative_to(draft).as_posix(): {"bytes": f.stat().st_size, "sha256": _file_digest(f)}
            for f in sorted(draft.rglob("*"))
            if f.is_file()
        }
        (draft / MANIFEST).write_bytes(seal(manifest))
        _publish(draft, target)
    except OSError as e:
        raise InputError(f"{target}: cannot be written: {e}; choose another folder") from e
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Path(path)


def restore(path: str | Path) -> tuple[Any, dict[str, Any]]:
    """Read a checkpoint, bit for bit as it was saved, in any process; no template is needed.

    Returns:
      The parameter tree and the manifest.

    Raises:
      InputError: a file is missing, extra or differs from its checksum; an array differs from its own; another format;
        a type that is not a leaf of this package.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    leaves = manifest["leaves"]
    stored = {k: v for k, v in leaves.items() if math.prod(v["shape"])}
    # files first: damaged bytes never reach orbax's decoders
    if damage := _file_damage(folder, manifest["files"]):
        raise InputError(f"{folder}: {'; '.join(damage[:5])}; copy the folder again")
    try:
        arrays = _read_arrays(folder / ARRAYS, stored)
    except Exception as e:  # orbax and tensorstore raise what they like
        raise InputError(f"{folder}: orbax cannot read {ARRAYS}: {e}; restore it with the versions in {MANIFEST}") from e
    arrays |= {k: jnp.zeros(v["shape"], v["dtype"]) for k, v in leaves.items() if k not in stored}
    if damage := [f"array {k}: {d}" for k, v in arrays.items() if (d := _leaf_damage(v, leaves[k]))]:
        raise InputError(f"{folder}: {'; '.join(damage[:5])}; copy the folder again")
    return rebuild(manifest["tree"], arrays, folder), manifest


# --- checksums and files


def _digest(array: Any) -> str:
    return hashlib.sha256(np.asarray(array).tobytes()).hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _file_damage(folder: Path, files: dict[str, Any]) -> list[str]:
    """Compare the files under ``arrays`` with the manifest; a file that it does not know counts too."""
    damage = []
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            damage.append(f"{name} is missing")
        elif file.stat().st_size != entry["bytes"]:
            damage.append(f"{name} has {file.stat().st_size:,} bytes, expected {entry['bytes']:,}")
        elif _file_digest(file) != entry["sha256"]:
            damage.append(f"{name} differs from its checksum")
    present = {f.relative_to(folder).as_posix() for f in (folder / ARRAYS).rglob("*") if not f.is_dir()}
    return damage + [f"{name} is not in {MANIFEST}" for name in sorted(present - files.keys())]


def _leaf_damage(array: Any, entry: dict[str, Any]) -> str:
    found, wanted = (array.dtype.name, list(array.shape)), (entry["dtype"], entry["shape"])
    if found != wanted:
        return f"{found[0]} {found[1]}, expected {wanted[0]} {wanted[1]}"
    return "" if _digest(array) == entry["sha256"] else "differs from its checksum"


def _sibling(target: Path) -> Path:
    """Return a hidden name beside the target, on the same disk, so that a rename publishes it."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")


def _check_target(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise InputError(f"{target} exists; choose another folder or pass --overwrite (overwrite=True)")
    if not (target / MANIFEST).is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target} exists and is not a checkpoint, so it is not overwritten; choose another folder")


def _publish(draft: Path, target: Path) -> None:
    if not target.exists():
        draft.rename(target)
        return
    old = _sibling(target)
    target.rename(old)
    try:
        draft.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


# --- orbax: the only two functions that know it; imported late because it takes a second


def _write_arrays(folder: Path, arrays: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp

    if arrays:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(arrays))


def _read_arrays(folder: Path, leaves: dict[str, Any]) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp

    if not leaves:
        return {}
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    how = ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)
    wanted = ocp.args.PyTreeRestore(item=dict.fromkeys(leaves, 0), restore_args=dict.fromkeys(leaves, how))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored: dict[str, jax.Array] = checkpointer.restore(folder.absolute(), args=wanted)
    return restored

"""Hugging Face folders to parameter trees and back; where each leaf comes from is the family's table (`splitq_jax.models.names`)."""

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import save_file

from splitq_jax.checkpoint import Deferred, restore
from splitq_jax.errors import InputError
from splitq_jax.manifest import MANIFEST, plain
from splitq_jax.models.families import FAMILIES, model_of
from splitq_jax.models.model import VisionLanguageModel
from splitq_jax.models.names import Source
from splitq_jax.models.weights import SINGLE, Weights, read_json
from splitq_jax.output import drafted
from splitq_jax.sharding import empty, place, sharding

Params = dict[str, Any]
PARAMS = "params"  # the checkpoint inside a converted or quantized folder
DTYPES = tuple(map(np.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read and check ``config.json``.

    Raises:
      InputError: no such file; code of its own (``auto_map``); a model type that is not supported.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if isinstance(part, dict) and "auto_map" in part:
            raise InputError(
                f"{path}: auto_map asks to run the folder's own code, which is never run; use a model type that is supported"
            )
    if not isinstance(config.get("model_type"), str) or config["model_type"] not in FAMILIES:
        raise InputError(f"{path}: model_type {config.get('model_type')!r}; supported are {', '.join(FAMILIES)}")
    return config


def load(
    folder: str | Path, *, dtype: Any = jnp.float32, mesh: Mesh | None = None, on_host: bool = False, follow_links: bool = False
) -> tuple[VisionLanguageModel, Params]:
    """Load a model: a Hugging Face folder, or one that ``splitq convert`` or ``splitq quantize`` wrote.

    Leaves are read, cast and placed one by one: the host holds one beyond what lies on its devices, or of a converted folder a part,
    which is some leaves.

    Args:
      folder: the folder.
      dtype: of the parameters; a converted or quantized folder keeps its own.
      mesh: devices to place the parameters on, with some of the axes ``data``, ``fsdp`` and ``tensor``; see `splitq_jax.sharding`.
        None: the default device.
      on_host: leave the parameters in host memory, as numpy arrays: to quantize what is larger than a device.
      follow_links: allow weights that link out of the folder, as in the hub's cache.

    Returns:
      The Flax model and its parameters: ``model.apply({"params": params}, **batch)`` gives logits.

    Raises:
      InputError: what `Weights` and `read_config` refuse; tensors that are missing, extra, of another shape or not finite; a mesh of
        other axes.
    """
    folder = Path(folder)
    _check_dtype(dtype)
    if is_converted(folder):
        model = _model(folder)
        params, manifest = restore(folder / PARAMS, mesh=mesh, on_host=on_host)
        _check_config(folder, model, manifest["config"])
        return model, params
    model, tree = deferred(folder, dtype=dtype, follow_links=follow_links)
    leaves = flatten_dict(tree, sep="/")
    if on_host:
        return model, unflatten_dict({path: leaf.read() for path, leaf in leaves.items()}, sep="/")
    places = {path: None if mesh is None else sharding(path, leaf.shape, mesh) for path, leaf in leaves.items()}
    return model, unflatten_dict({path: place(leaf.read(), places[path]) for path, leaf in leaves.items()}, sep="/")


def _model(folder: Path) -> VisionLanguageModel:
    config = read_config(folder)
    try:
        return model_of(config)
    except InputError as e:  # which knows the file, not the folder
        raise InputError(f"{folder}: {e}") from None


def _check_config(folder: Path, model: VisionLanguageModel, kept: Any) -> None:
    """Compare a converted folder's ``config.json`` with what its parameters were made for; fields of other releases are left alone."""

    def compare(found: Any, wanted: Any, name: str) -> None:
        if isinstance(found, dict) and isinstance(wanted, dict):
            for key in found.keys() & wanted.keys():
                compare(found[key], wanted[key], f"{name}.{key}")
        elif found != wanted:
            raise InputError(
                f"{folder}: config.json makes {name} {found}, the parameters were written with {wanted}; restore the file"
            )

    if kept is not None:
        compare(plain(model.config, "config"), kept, "config")


def is_converted(folder: str | Path) -> bool:
    """Say whether ``splitq convert`` or ``splitq quantize`` wrote a folder."""
    return (Path(folder) / PARAMS / MANIFEST).is_file()


def deferred(folder: str | Path, *, dtype: Any = jnp.float32, follow_links: bool = False) -> tuple[VisionLanguageModel, Params]:
    """Open a Hugging Face folder: names and shapes are checked, and each leaf is read when it is asked for.

    Args:
      folder: the folder.
      dtype: of the parameters.
      follow_links: allow weights that link out of the folder, as in the hub's cache.

    Returns:
      The Flax model and a tree of `splitq_jax.checkpoint.Deferred`.

    Raises:
      InputError: what `load` refuses; entries that are not finite or past the range of ``dtype`` when the leaf is read.
    """
    folder = Path(folder)
    _check_dtype(dtype)
    model = _model(folder)
    sources, weights = model.table(), Weights(folder, follow_links)
    names: dict[str, str] = {}
    for name in weights.shapes:
        known = model.spelling.canonical(name)
        if known in names:
            raise InputError(f"{folder}: tensors {names[known]!r} and {name!r} are the same one, spelled twice")
        names[known] = name
    _check_names(model, names, {n for s in sources.values() for n in s.names}, weights, folder)
    for source in sources.values():  # before anything is read
        for name, wanted in zip(source.names, source.shapes, strict=True):
            if weights.shapes[names[name]] != wanted:
                raise InputError(
                    f"{folder}: tensor {names[name]!r} has shape {weights.shapes[names[name]]}; config.json makes it {wanted}"
                )
    leaves = {
        path: Deferred(source.shape, np.dtype(dtype), partial(_read, source, names, weights, np.dtype(dtype)))
        for path, source in sources.items()
    }
    return model, unflatten_dict(leaves, sep="/")


def _check_dtype(dtype: Any) -> None:
    if np.dtype(dtype) not in DTYPES:
        raise InputError(f"dtype {dtype}: expected float32, bfloat16 or float16; codes come from quantize")


def _read(source: Source, names: Mapping[str, str], weights: Weights, dtype: np.dtype[Any]) -> np.ndarray:
    """Make a leaf, row by row of its tensors: nothing of its size is held beside it."""
    leaf = empty(source.shape, dtype)
    for i, name in enumerate(source.names):
        for start, rows in weights.rows(names[name]):
            with np.errstate(over="ignore"):  # refused in the next line
                cast = rows.astype(dtype, copy=False)
            if cast is not rows and not np.isfinite(cast).all():
                raise InputError(f"{weights.folder}: {names[name]!r} has entries past the range of {dtype}; load it as float32")
            source.put(leaf, i, start, cast)
    return leaf


def _check_names(model: VisionLanguageModel, names: Mapping[str, str], wanted: set[str], weights: Weights, folder: Path) -> None:
    if missing := sorted(wanted - names.keys()):
        raise InputError(
            f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]!r}; get the files again, or the config.json that is theirs"
        )
    extra = {n for n in names.keys() - wanted if not model.is_unused(n)}
    if model.config.tied and model.spelling.head in extra:
        extra.discard(model.spelling.head)
        if not weights.equal(names[model.spelling.head], names[model.spelling.embedding]):
            raise InputError(
                f"{folder}: {names[model.spelling.head]!r} differs from the embedding, but config.json ties them; set tie_word_embeddings to false"
            )
    if extra:
        first = names[min(extra)]
        raise InputError(
            f"{folder}: {len(extra)} tensors that config.json has no place for, the first is {first!r}; check config.json"
        )


def export(out: str | Path, config: Mapping[str, Any], params: Params, files: Mapping[str, bytes]) -> Path:
    """Write float parameters as a Hugging Face folder, which transformers and `load` read alike; whole or not at all.

    Args:
      out: the folder; it must not exist.
      config: ``config.json``.
      params: the float tree of that config, float32 or bfloat16.
      files: further files by name: tokenizer, processor.

    Raises:
      InputError: the folder exists; the vision tower is cut after the selected layer, so that the rest is lost; parameters that are
        quantized, missing, extra, of another shape or not finite; a disk that cannot be written.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise InputError(f"{out}: exists; give another folder")
    if wrong := [n for n in files if Path(n).name != n or n in {"", "..", SINGLE, "config.json"}]:
        raise InputError(f"{out}: file {wrong[0]!r}; expected plain names beside {SINGLE} and config.json")
    model = model_of(dict(config))
    tensors, table = model.unread(), model.table()
    leaves = _float_leaves(params, {path: source.shape for path, source in table.items()})
    for path, source in table.items():
        tensors |= source.part(leaves[path])
    text = json.dumps(config, indent=2)
    with drafted(out) as draft:
        try:
            save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, draft / SINGLE, {"format": "pt"})
        except SafetensorError as e:
            raise OSError(str(e)) from e
        (draft / "config.json").write_text(text, encoding="utf-8")
        for name, content in files.items():
            (draft / name).write_bytes(content)
    return out


def _float_leaves(params: Params, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return the leaves by path; they are those that the config has, whole and finite."""
    leaves = flatten_dict(params, sep="/")
    if differ := sorted(leaves.keys() ^ wanted.keys()):
        raise InputError(
            f"params: {differ[0]} is {'missing' if differ[0] in wanted else 'nothing that the config has a place for'}"
        )
    for path, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(
                f"params: {path} is a {getattr(leaf, 'dtype', type(leaf).__name__)}; only float parameters can be exported"
            )
        if leaf.shape != wanted[path]:
            raise InputError(f"params: {path} has shape {leaf.shape}; the config makes it {wanted[path]}")
        if not jnp.isfinite(leaf).all():
            raise InputError(f"params: {path} has NaN or infinite entries")
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}

"""Hugging Face folders to parameter trees and back; where each leaf comes from is the family's table (`splitq_jax.models.names`)."""

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save_file

from splitq_jax.checkpoint import restore
from splitq_jax.errors import InputError
from splitq_jax.manifest import MANIFEST
from splitq_jax.models.families import FAMILIES, model_of
from splitq_jax.models.model import VisionLanguageModel, shapes
from splitq_jax.models.weights import SINGLE, Weights, read_json

Params = dict[str, Any]
PARAMS = "params"  # the checkpoint inside a converted or quantized folder


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
    if config.get("model_type") not in FAMILIES:
        raise InputError(f"{path}: model_type {config.get('model_type')!r}; supported are {', '.join(FAMILIES)}")
    return config


def load(folder: str | Path, *, dtype: Any = jnp.float32, follow_links: bool = False) -> tuple[VisionLanguageModel, Params]:
    """Load a model: a Hugging Face folder, or one that ``splitq convert`` or ``splitq quantize`` wrote.

    Args:
      folder: the folder.
      dtype: of the parameters; a converted or quantized folder keeps its own.
      follow_links: allow weights that link out of the folder, as in the hub's cache.

    Returns:
      The Flax model and its parameters: ``model.apply({"params": params}, **batch)`` gives logits.

    Raises:
      InputError: what `Weights` and `read_config` refuse; tensors that are missing, extra, of another shape or not finite.
    """
    folder = Path(folder)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"dtype {dtype}: expected float32, bfloat16 or float16; codes come from quantize")
    model = model_of(read_config(folder))
    if (folder / PARAMS / MANIFEST).is_file():
        return model, restore(folder / PARAMS)[0]
    return model, _from_tensors(model, Weights(folder, follow_links), dtype, folder)


def _from_tensors(model: VisionLanguageModel, weights: Weights, dtype: Any, folder: Path) -> Params:
    sources = model.table()
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
    tree: Params = {}
    for path, source in sources.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        with np.errstate(over="ignore"):  # refused in the next line
            node[leaf] = jnp.asarray(source.fuse([weights.read(names[n]) for n in source.names]), dtype)
        if not jnp.isfinite(node[leaf]).all():
            raise InputError(
                f"{folder}: {names[source.names[0]]!r} has entries past the range of {jnp.dtype(dtype)}; load it as float32"
            )
    return tree


def _check_names(model: VisionLanguageModel, names: Mapping[str, str], wanted: set[str], weights: Weights, folder: Path) -> None:
    if missing := sorted(wanted - names.keys()):
        raise InputError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]!r}; get the files again")
    extra = {n for n in names.keys() - wanted if not model.is_unused(n)}
    if model.config.tied and model.spelling.head in extra:
        extra.discard(model.spelling.head)
        head, embedding = (weights.read(names[n]) for n in (model.spelling.head, model.spelling.embedding))
        if not np.array_equal(head, embedding):
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
    tensors = model.unread()
    leaves = _float_leaves(params, shapes(model))
    for path, source in model.table().items():
        tensors |= source.part(leaves[path])
    text = json.dumps(config, indent=2)
    draft = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        draft.mkdir(parents=True)
        save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, draft / SINGLE, {"format": "pt"})
        (draft / "config.json").write_text(text, encoding="utf-8")
        for name, content in files.items():
            (draft / name).write_bytes(content)
        draft.rename(out)
    except (OSError, SafetensorError) as e:
        raise InputError(f"{out}: cannot be written: {e}; choose another folder") from e
    finally:
        shutil.rmtree(draft, ignore_errors=True)
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

"""`manifest.json`: a parameter tree as JSON, and the seal that shows a single changed byte.

A tree is ``{"dict": ...}``, ``{"tuple": ...}``, ``{"list": ...}``, ``{"type": ..., "fields": ..., "static": ...}``,
``null``, or the path of an array. Its arrays are kept elsewhere, by path.
"""

import dataclasses
import hashlib
import importlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from splitq_jax.errors import InputError

FORMAT, VERSION = "splitq_jax checkpoint", 1
MANIFEST = "manifest.json"
DTYPES = ("bool", "int4", "int8", "int16", "int32", "uint8", "uint16", "uint32", "bfloat16", "float16", "float32")
SEAL = re.compile(rb'"manifest_sha256": "([0-9a-f]{64})"\n}\Z')
TYPE_NAME = re.compile(r"(splitq_jax(?:\.\w+)+):(\w+)")


@dataclass(frozen=True)
class Deferred:
    """A leaf that is not made before it is needed.

    Attributes:
      shape: its shape.
      dtype: its type.
      read: makes it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.size * self.dtype.itemsize


def is_checkpoint(folder: Path) -> bool:
    """Say whether a folder is a checkpoint, damaged or not."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read and check the manifest alone, without the arrays.

    Raises:
      InputError: no manifest, one that differs from its own checksum, or one of another format.
    """
    file = Path(path) / MANIFEST
    try:
        text = file.read_bytes()
    except OSError as e:
        raise InputError(f"{file}: {e.strerror}; expected a folder written by `splitq quantize` or `save`") from e
    found = SEAL.search(text)
    if found is None:
        raise InputError(f"{file}: it does not end in its own checksum; it was damaged or is another format")
    if hashlib.sha256(text[: found.start(1)] + b"0" * 64 + text[found.end(1) :]).hexdigest().encode() != found[1]:
        raise InputError(f"{file}: its checksum does not match its content; copy the folder again")
    manifest: dict[str, Any] = json.loads(text)
    name, version = manifest.get("format"), manifest.get("version")
    if (name, version) != (FORMAT, VERSION) or not {"tree", "leaves", "files"} <= manifest.keys():
        raise InputError(f"{file}: format {name!r}, version {version!r}; expected {FORMAT!r}, version {VERSION}")
    return manifest


def seal(manifest: dict[str, Any]) -> bytes:
    """Turn a manifest into the bytes of its file, which end in the checksum of all the others."""
    text = json.dumps({**manifest, "manifest_sha256": "0" * 64}, indent=1).encode()
    head, zeros, tail = text.rpartition(b"0" * 64)
    return head + hashlib.sha256(head + zeros + tail).hexdigest().encode() + tail


def describe(node: Any, path: str, arrays: dict[str, Any]) -> Any:
    """Turn a tree into JSON and collect its arrays by path."""
    if node is None:
        return None
    if isinstance(node, Mapping):
        for key in node:
            if not isinstance(key, str) or not key or "/" in key:
                raise InputError(f"{path or 'params'}: key {key!r}; expected a non-empty string without '/'")
        return {"dict": {k: describe(v, _join(path, k), arrays) for k, v in node.items()}}
    if type(node) in (tuple, list):
        return {type(node).__name__: [describe(v, _join(path, str(i)), arrays) for i, v in enumerate(node)]}
    if getattr(type(node), "_flax_dataclass", False):
        name = f"{type(node).__module__}:{type(node).__qualname__}"
        _resolve(name, path)
        is_node = {f.name: f.metadata.get("pytree_node", True) for f in dataclasses.fields(node)}
        values = {k: getattr(node, k) for k in is_node}
        fields = {k: describe(v, _join(path, k), arrays) for k, v in values.items() if is_node[k]}
        static = {k: _static(v, _join(path, k)) for k, v in values.items() if not is_node[k]}
        return {"type": name, "fields": fields, "static": static}
    if not isinstance(node, jax.Array | np.ndarray | Deferred) or node.dtype.name not in DTYPES:
        found = f"{type(node).__name__} of {node.dtype}" if hasattr(node, "dtype") else type(node).__name__
        raise InputError(f"{path or 'params'}: {found}; expected an array of one of {', '.join(DTYPES)}")
    arrays[path or "params"] = node
    return path or "params"


def rebuild(node: Any, arrays: dict[str, jax.Array], folder: Path) -> Any:
    """Undo `describe`."""
    match node:
        case None:
            return None
        case str() if node in arrays:
            return arrays[node]
        case {"dict": items}:
            return {k: rebuild(v, arrays, folder) for k, v in items.items()}
        case {"tuple": items}:
            return tuple(rebuild(v, arrays, folder) for v in items)
        case {"list": items}:
            return [rebuild(v, arrays, folder) for v in items]
        case {"type": name, "fields": fields, "static": static}:
            values = {k: rebuild(v, arrays, folder) for k, v in fields.items()}
            values |= {k: _unstatic(v) for k, v in static.items()}
            cls = _resolve(name, str(folder))
            wanted = {f.name for f in dataclasses.fields(cls)}
            if values.keys() != wanted:
                raise InputError(f"{folder}: {name} was saved with the fields {sorted(values)}, this release has {sorted(wanted)}")
            return cls(**values)
    raise InputError(f"{folder / MANIFEST}: neither an array that it lists nor a known kind of node: {str(node)[:80]}")


def _resolve(name: str, where: str) -> type[Any]:
    """Find a leaf's class; only flax dataclasses of this package are ever looked up."""
    if match := TYPE_NAME.fullmatch(name):
        try:
            cls = getattr(importlib.import_module(match[1]), match[2], None)
        except ImportError:
            cls = None
        if isinstance(cls, type) and getattr(cls, "_flax_dataclass", False):
            return cls
    raise InputError(f"{where}: {name!r} is not a flax.struct.dataclass of a splitq_jax module; only those can be restored")


def _static(value: Any, path: str) -> Any:
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if type(value) is tuple:
        return {"tuple": [_static(v, path) for v in value]}
    raise InputError(f"{path}: static field {value!r}; expected None, bool, int, finite float, string or a tuple of these")


def _unstatic(value: Any) -> Any:
    return tuple(map(_unstatic, value["tuple"])) if isinstance(value, dict) else value


def plain(value: Any, path: str) -> Any:
    """Turn dataclasses into dicts and everything else into what JSON holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{path}.{k}") for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v, f"{path}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    raise InputError(f"{path}: a {type(value).__name__}; expected dataclasses, dicts, lists, numbers and strings")


def _join(path: str, key: str) -> str:
    return f"{path}/{key}" if path else key

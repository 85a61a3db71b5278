"""Tensors of a Hugging Face folder, read one at a time, with everything refused that should not be trusted."""

import json
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from splitq_jax.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PLAIN_NAME = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)
FLOATS = {"F32": np.dtype(np.float32), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16)}
MAX_HEADER = 100_000_000  # bytes; safetensors' own bound
BLOCK = 1 << 19  # bytes that are read at a time: they are checked, cast and transposed while they lie in the cache


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      InputError: a file that is missing, not JSON or not an object; a key that stands twice in one object.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := _twice(k for k, _ in items):
            raise InputError(f"{path}: the key {twice!r} stands twice")
        return dict(items)

    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=pairs)
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}; expected a model folder in Hugging Face's format") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not JSON ({e})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON {type(value).__name__}; expected an object")
    return value


class Weights:
    """The tensors of a folder by name; nothing is read before `rows` or `read` asks for it.

    Attributes:
      folder: where they lie.
      shapes: shape of every tensor.

    Args:
      folder: holds ``model.safetensors``, or shards and their index.
      follow_links: allow files that link out of the folder, as in Hugging Face's hub cache.

    Raises:
      InputError: no safetensors; a shard's name that leaves the folder; a damaged or missing file; a tensor that stands twice, is
        missing from its shard, or is no float.
    """

    def __init__(self, folder: Path, follow_links: bool = False) -> None:
        self.folder = folder
        files = _files(folder, follow_links)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._home: dict[str, Path] = {}
        self._begin: dict[str, int] = {}
        self._dtype: dict[str, np.dtype[Any]] = {}
        for file, listed in files.items():
            found, data = _header(file)
            if listed is not None and (absent := sorted(listed - found.keys())):
                raise InputError(f"{file}: tensor {absent[0]!r} is missing; {INDEX} says that it is here")
            for name, entry in found.items():
                if name in self._home:
                    raise InputError(f"{file}: tensor {name!r} stands in {self._home[name].name} too")
                self._home[name], self.shapes[name] = file, tuple(entry["shape"])
                if entry["dtype"] not in FLOATS and not name.endswith("position_ids"):
                    raise InputError(f"{file}: tensor {name!r} is {entry['dtype']}; expected {', '.join(FLOATS)}")
                if entry["dtype"] in FLOATS:
                    self._begin[name], self._dtype[name] = data + entry["data_offsets"][0], FLOATS[entry["dtype"]]

    def rows(self, name: str) -> Iterator[tuple[int, Float[np.ndarray, "..."]]]:
        """Yield a tensor in blocks: the index of the first row and some rows, in the file's type; the next block may take its place.

        Files are read and not mapped: what was mapped stays in memory until somebody else needs it.

        Raises:
          InputError: entries that are not finite; a file that has become shorter or cannot be read any more.
        """
        file, shape, dtype = self._home[name], self.shapes[name], self._dtype[name]
        count, width = (shape[0], prod(shape[1:])) if shape else (1, 1)
        step = max(1, BLOCK // max(1, 4 * width))  # of any type, so that two tensors come in the same blocks
        buffer = np.empty((min(step, count), *shape[1:]), dtype)
        try:
            with file.open("rb", buffering=0) as f:
                f.seek(self._begin[name])
                for start in range(0, count, step):
                    block = buffer[: min(step, count - start)]
                    if _fill(f, block) < block.nbytes:
                        raise InputError(f"{file}: ends within tensor {name!r}; get the file again")
                    if not np.isfinite(block).all():
                        raise InputError(f"{file}: tensor {name!r} has NaN or infinite entries; get the file again")
                    yield start, block
        except OSError as e:
            raise InputError(f"{file}: cannot be read ({e.strerror}); get it again") from None

    def equal(self, name: str, other: str) -> bool:
        """Compare two tensors.

        Raises:
          InputError: what `rows` refuses.
        """
        if self.shapes[name] != self.shapes[other]:
            return False
        return all(np.array_equal(a, b) for (_, a), (_, b) in zip(self.rows(name), self.rows(other), strict=True))

    def read(self, name: str) -> Float[np.ndarray, "..."]:
        """Return a tensor.

        Raises:
          InputError: what `rows` refuses.
        """
        value = np.empty(self.shapes[name], self._dtype[name])
        for start, block in self.rows(name):
            np.atleast_1d(value)[start : start + len(block)] = block
        return value


def _fill(f: Any, block: np.ndarray) -> int:
    """Read an array from a file; the system may give less at a time than it is asked for."""
    view = block.reshape(-1).view(np.uint8).data
    got = 0
    while got < len(view) and (count := f.readinto(view[got:])):
        got += count
    return got


def _files(folder: Path, follow_links: bool) -> dict[Path, set[str] | None]:
    """Return the files and, with an index, the tensors that it puts there."""
    if (folder / INDEX).is_file() and (folder / SINGLE).is_file():
        raise InputError(f"{folder}: holds both {SINGLE} and {INDEX}; remove the one that is not meant")
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{folder / INDEX}: no weight_map")
        listed: dict[str, set[str]] = {}
        for tensor, shard in weight_map.items():
            if not isinstance(shard, str) or not PLAIN_NAME.fullmatch(shard):
                raise InputError(f"{folder / INDEX}: tensor {tensor!r} in {shard!r}; expected a plain file name, like {SINGLE}")
            listed.setdefault(shard, set()).add(tensor)
        files: dict[Path, set[str] | None] = {folder / shard: tensors for shard, tensors in sorted(listed.items())}
    elif (folder / SINGLE).is_file():
        files = {folder / SINGLE: None}
    else:
        pickled = _first(folder.glob("*.bin")) or _first(folder.glob("*.pt*"))
        hint = f"; {pickled.name} is pickled, which runs code: convert it to safetensors first" if pickled else ""
        raise InputError(f"{folder}: neither {SINGLE} nor {INDEX}{hint}")
    for file in files:
        try:
            linked = file.resolve(strict=True).parent != folder.resolve()
        except (OSError, RuntimeError) as e:  # Python below 3.13 raises RuntimeError where links go round in a circle
            raise InputError(f"{file}: cannot be read ({getattr(e, 'strerror', None) or e}); get it again") from None
        if linked and not follow_links:
            raise InputError(f"{file}: links to {file.resolve()}, out of the folder; if you trust it, allow it (--follow-links)")
    return files


def _first(paths: Iterable[Path]) -> Path | None:
    return next(iter(sorted(paths)), None)


def _twice(names: Iterable[str]) -> str | None:
    return next((name for name, count in sorted(Counter(names).items()) if count > 1), None)


def _header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Return name → dtype, shape and offsets, and where data begins; safetensors checks sizes but lets a name stand twice."""
    try:
        with safe_open(file, "numpy"):
            pass
        with file.open("rb") as f:
            (size,) = struct.unpack("<Q", f.read(8))
            raw = f.read(min(size, MAX_HEADER))
    except (SafetensorError, OSError, struct.error) as e:
        raise InputError(f"{file}: not a whole safetensors file ({e}); get it again") from None
    names: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names.extend(k for k, v in items if isinstance(v, dict) and "data_offsets" in v)
        return dict(items)

    header: dict[str, Any] = json.loads(raw, object_pairs_hook=pairs)
    if twice := _twice(names):
        raise InputError(f"{file}: tensor {twice!r} stands twice in its header; get the file again")
    return {k: v for k, v in header.items() if k != "__metadata__"}, 8 + size

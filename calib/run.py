"""A resumable calibration run: a folder with one safetensors file a finished block, and a fingerprint of what it was made from."""

import contextlib
import fcntl
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from splitq_jax.errors import InputError
from splitq_jax.processes import by_first, is_first
from splitq_jax.sharding import on_host


def fingerprint(*trees: Any) -> str:
    """Return the SHA-256 of arrays and of the ``repr`` of everything else, such as recipes and settings."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        digest.update(jax.tree_util.keystr(path).encode())
        if isinstance(leaf, jax.Array | np.ndarray):
            digest.update(f"{leaf.dtype}{leaf.shape}".encode())
            digest.update(np.ascontiguousarray(on_host(leaf)).tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


MANIFEST, LOCK = "run.json", "writer.lock"


def discard(folder: Path) -> None:
    """Delete a finished run; what is not a run's stays."""
    if is_first() and (folder / MANIFEST).is_file():
        for file in (*folder.glob("block_*.safetensors"), *folder.glob(".*.tmp"), folder / LOCK, folder / MANIFEST):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # holds something else
            folder.rmdir()


class Run:
    """Keeps finished blocks under ``folder``; a second writer and a different fingerprint are refused.

    Of several processes (`jax.distributed`) the first reads and writes; what one calls, all call.
    """

    def __init__(self, folder: str | Path, fingerprint: str) -> None:
        """Open or create the run.

        Raises:
          InputError: the folder is no run's or a different run's, cannot be made, or another run, of this process or another, writes to it.
        """
        self.folder = Path(folder)
        by_first(partial(self._open, fingerprint))

    def _open(self, fingerprint: str) -> None:
        manifest = self.folder / MANIFEST
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not manifest.exists() and any(f.name != LOCK and f.suffix != ".tmp" for f in self.folder.iterdir()):
                raise InputError(f"run folder {self.folder}: holds other files; give an empty folder or one that is not there yet")
        except OSError as e:
            raise InputError(f"run folder {self.folder}: cannot be made ({e.strerror}); give another one") from None
        self._lock()
        if manifest.exists():
            found = self._found(manifest)
            if found != fingerprint:
                self.close()
                raise InputError(
                    f"{manifest}: fingerprint {found[:12]}… of another run, this one has {fingerprint[:12]}… (weights, recipe, "
                    "calibration set or versions differ); use another folder or delete this one"
                )
        else:
            _write(manifest, json.dumps({"fingerprint": fingerprint}).encode())

    def _found(self, manifest: Path) -> str:
        try:
            return str(json.loads(manifest.read_text())["fingerprint"])
        except (ValueError, KeyError, TypeError) as e:
            self.close()
            raise InputError(f"{manifest}: damaged ({e!r}); delete the folder to train anew") from None

    def _lock(self) -> None:
        self._writer = (self.folder / LOCK).open("a")  # never removed while in use: others would lock another file of that name
        try:
            fcntl.flock(self._writer, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which ends with the process, however it ends
        except OSError:
            self._writer.close()
            raise InputError(f"run folder {self.folder}: another run writes to it; wait for it or use another folder") from None

    def close(self) -> None:
        """Release the folder."""
        if is_first():
            self._writer.close()

    def save(self, block: int, theta: Any, error: tuple[float, float]) -> None:
        """Keep a finished block.

        Args:
          block: its number.
          theta: its learnable arrays.
          error: its relative output error before and after training, NaN where it was not measured.
        """
        by_first(partial(self._save, block, theta, error))

    def _save(self, block: int, theta: Any, error: tuple[float, float]) -> None:
        flat = {jax.tree_util.keystr(p): np.ascontiguousarray(v) for p, v in jax.tree_util.tree_leaves_with_path(theta)}
        temporary = self.folder / f".block_{block:03d}.tmp"
        save_file(flat, temporary, metadata={"before": repr(error[0]), "after": repr(error[1]), "sha256": fingerprint(flat)})
        temporary.replace(self._file(block))

    def load(self, block: int, like: Any) -> tuple[Any, tuple[float, float]] | None:
        """Return a finished block's learnable arrays, shaped like ``like``, and its errors; None if it is not finished.

        Raises:
          InputError: a damaged file.
        """
        found = by_first(partial(self._load, block))
        if found is None:
            return None
        flat, errors = found
        paths, tree = jax.tree_util.tree_flatten_with_path(like)
        return jax.tree.unflatten(tree, [jax.numpy.asarray(flat[jax.tree_util.keystr(p)]) for p, _ in paths]), errors

    def _load(self, block: int) -> tuple[dict[str, np.ndarray], tuple[float, float]] | None:
        file = self._file(block)
        if not file.exists():
            return None
        try:
            with safe_open(file, "numpy") as f:
                flat, metadata = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: {error}; delete the file to train this block again") from None
        if fingerprint(flat) != metadata["sha256"]:
            raise InputError(f"{file}: checksum differs; delete the file to train this block again")
        return flat, (float(metadata["before"]), float(metadata["after"]))

    def _file(self, block: int) -> Path:
        return self.folder / f"block_{block:03d}.safetensors"


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)

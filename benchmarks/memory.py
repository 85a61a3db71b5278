"""Measures the peak memory of conversion and loading: ``python benchmarks/memory.py --out benchmarks/results/memory.json``.

A LLaVA with random bfloat16 weights is written to a temporary folder in shards, and each way to read it runs in a process of its own,
whose largest resident size is printed. The folder is deleted in the end.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from splitq_jax.models.families import model_of
from splitq_jax.models.names import parameters

SHARD = 2_000_000_000  # bytes, at most
CHUNK = 1 << 22  # numbers drawn at a time
DEVICES = "--xla_force_host_platform_device_count=8"
# each prints, last, its resident size when all is imported and the largest one
STATUS = "import re; sizes = lambda: re.findall(r'Vm(?:HWM|RSS):\\s*(\\d+)', open('/proc/self/status').read())"
START = (
    f"{STATUS}; import jax; from splitq_jax import cli, commands, models; import orbax.checkpoint; jax.devices(); base = sizes()[1]"
)
END = "print(); print(base, sizes()[0])"
MESH = "mesh = jax.make_mesh((2, 4), ('fsdp', 'tensor'))"
WAYS = {
    "splitq convert --dtype bfloat16": "assert cli.main(['convert', FOLDER, '--out', OUT, '--dtype', 'bfloat16', '--overwrite']) == 0",
    "models.load of what it wrote": "_, params = models.load(OUT)",
    "models.load of what it wrote, 2 x 4 devices": f"{MESH}; _, params = models.load(OUT, mesh=mesh)",
    "models.load, bfloat16": "_, params = models.load(FOLDER, dtype='bfloat16')",
    "models.load, bfloat16, 2 x 4 devices": f"{MESH}; _, params = models.load(FOLDER, dtype='bfloat16', mesh=mesh)",
    "splitq convert --dtype float32": "assert cli.main(['convert', FOLDER, '--out', OUT, '--dtype', 'float32', '--overwrite']) == 0",
}


def config(size: float) -> dict[str, Any]:
    """Return a LLaVA with CLIP-L/336 and as many decoder blocks as fill ``size`` bytes in bfloat16."""
    text = {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 32064,
        "num_hidden_layers": 1,
    }
    whole: dict[str, Any] = {"model_type": "llava", "image_token_index": 32000, "vision_feature_layer": -2, "text_config": text}
    one = parameters(model_of(whole).table())
    block = parameters(model_of(whole | {"text_config": text | {"num_hidden_layers": 2}}).table()) - one
    return whole | {"text_config": text | {"num_hidden_layers": 1 + max(0, math.ceil((size / 2 - one) / block))}}


def write(folder: Path, config: dict[str, Any]) -> int:
    """Write random shards, their index and ``config.json``; return the bytes of the tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {n: s for source in model_of(config).table().values() for n, s in zip(source.names, source.shapes, strict=True)}
    shards = list(_shards(shapes))
    rng, weight_map = np.random.default_rng(0), {}
    for i, names in enumerate(shards, start=1):
        file = folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        header, end = {}, 0
        for name in names:
            begin, end = end, end + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
            weight_map[name] = file.name
        text = json.dumps(header).encode()
        with file.open("wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for start in range(0, end // 2, CHUNK):
                draw = rng.integers(0, 1 << 16, min(CHUNK, end // 2 - start), np.uint16)
                f.write(((draw & 0x81FF) | 0x3C00).tobytes())  # any sign and mantissa, between 2^-7 and 2^-3
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return 2 * sum(map(math.prod, shapes.values()))


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, shape in shapes.items():
        if names and held + 2 * math.prod(shape) > SHARD:
            yield names
            names, held = [], 0
        names.append(name)
        held += 2 * math.prod(shape)
    yield names


def measure(way: str, folder: Path) -> dict[str, Any]:
    """Run one of `WAYS` in a process of its own; sizes are in bytes."""
    begin = f"FOLDER, OUT = {str(folder / 'model')!r}, {str(folder / 'out')!r}"
    code = "\n".join((START, begin, WAYS[way], END))
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"XLA_FLAGS": DEVICES}, stdout=subprocess.PIPE, text=True, check=True
    )
    base, peak = (1024 * int(size) for size in done.stdout.split()[-2:])
    return {"way": way, "base": base, "peak": peak, "seconds": round(time.monotonic() - start, 1)}


def main() -> None:
    """Write the checkpoint, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=6.0, help="of the checkpoint (default: 6)")
    parser.add_argument("--runs", type=int, default=1, help="of each way (default: 1)")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="what to measure (default: all)")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the temporary folder")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    chosen = config(options.gigabytes * 1e9)
    leaves = [2 * math.prod(source.shape) for source in model_of(chosen).table().values()]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        size = write(Path(name) / "model", chosen)
        print(f"{size / 1e9:.2f} GB of bfloat16, the largest leaf {max(leaves) / 1e9:.2f} GB\n")
        print("| | resident at start | at most | s |\n|---|---|---|---|")
        versions = {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "orbax-checkpoint", "numpy", "safetensors")}
        rows: list[dict[str, Any]] = []
        facts = {
            "config": chosen,
            "bytes": size,
            "largest_leaf": max(leaves),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
        }
        for _ in range(options.runs):
            for way in options.ways:
                rows.append(measure(way, Path(name)))
                r = rows[-1]
                print(f"| {way} | {r['base'] / 1e9:.2f} GB | {r['peak'] / 1e9:.2f} GB | {r['seconds']:.0f} |", flush=True)
                if options.out is not None:
                    options.out.write_text(json.dumps(facts | {"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

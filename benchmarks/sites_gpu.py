"""Times a whole site on a Hopper GPU, tokens in and products out: ``python benchmarks/sites_gpu.py --out benchmarks/results/sites_gpu_h200.json``.

What a decoding step does at each of a block's four sites, once with the kernel that quantizes few tokens
(`splitq_jax.kernels.gpu_quantizer`) and once with XLA in its place. Each is compared with the reference in float32 first; a wrong product
ends the run. A time is the median over repetitions of the sum of the site's kernels as the GPU's own event records (CUPTI) give it; "in a
loop" is a pass of a loop on the device, gaps between kernels included.
"""

import argparse
import datetime
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from splitq_jax.kernels import gpu, gpu_quantizer, reference
from splitq_jax.linear import SplitWeight

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from kernel_reference import site_of

LOOP, REPEATS = 50, 10
COLUMNS = 4096
Tokens = tuple[jax.Array, jax.Array]  # and which of them are text


def product(tokens: Tokens, w: SplitWeight) -> jax.Array:
    """Return the site's products."""
    return gpu.decode_matmul(tokens[0], w, tokens[1], None, dtype=jnp.bfloat16)


def looped(tokens: Tokens, w: SplitWeight) -> jax.Array:
    """Return them after `LOOP` passes, none of which the compiler can leave out."""

    def body(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, _ = carry
        out: tuple[jax.Array, jax.Array] = jax.lax.optimization_barrier((x, product((x, tokens[1]), w)))
        return out

    start = jnp.zeros((tokens[0].shape[0], w.shape[1]), jnp.bfloat16)
    return jax.lax.fori_loop(0, LOOP, body, (tokens[0], start))[1]


def lowered(function: Callable[..., Any], kernel: bool, *args: Any) -> Any:
    """Lower a function with the quantizer's kernel or with XLA in its place."""
    kept = gpu_quantizer.TOKENS
    gpu_quantizer.TOKENS = kept if kernel else 0
    try:
        return jax.jit(partial(function)).lower(*args)  # a function of its own: jit must not find the other's trace
    finally:
        gpu_quantizer.TOKENS = kept


def kernels_of(run: Any, *args: Any) -> tuple[int, float]:
    """Return how many kernels ran and the median of their summed microseconds."""
    _, found = profiler.measure(run, aggregate=False, iterations=REPEATS)(*args)
    return len(found[0]), 1e3 * statistics.median(sum(t for _, t in kernels) for kernels in found)


def pass_of(run: Any, *args: Any) -> float:
    """Return the microseconds of a pass of a loop."""
    jax.block_until_ready(run(*args))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times) / LOOP


def main() -> None:
    """Time everything and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument(
        "--widths", nargs="+", type=int, default=(4096, 11008, 18944), help=f"channels of a token; the site has {COLUMNS} columns"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=(1, 16, 64))
    args = parser.parse_args()
    rows = []
    for width in args.widths:
        w = site_of(0, width, COLUMNS, (4, 4), ranks=(80, 128))
        laid = jax.jit(gpu.relayout)(w)
        for m in args.tokens:
            rng = np.random.default_rng(m)
            tokens = jnp.asarray(rng.standard_normal((m, width)), jnp.bfloat16), jnp.asarray(rng.random(m) < 0.7)
            with jax.default_matmul_precision("highest"):
                exact = np.asarray(reference.decode_matmul(tokens[0], w, tokens[1], None, jnp.float32), np.float64)
            stages = [lowered(function, kernel, tokens, laid) for kernel in (False, True) for function in (product, looped)]
            with ThreadPoolExecutor() as pool:
                runs = list(pool.map(lambda stage: stage.compile(), stages))
            for kernel, (once, many) in zip((False, True), (runs[:2], runs[2:]), strict=True):
                found = np.asarray(once(tokens, laid), np.float64)
                error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
                if not error < 2e-2:  # the old path's transforms are TF32's
                    raise SystemExit(f"width {width}, {m} tokens, kernel {kernel}: relative error {error:.1e}")
                count, microseconds = kernels_of(once, tokens, laid)
                rows.append({"width": width, "tokens": m, "quantizer": "kernel" if kernel else "XLA", "kernels": count})
                rows[-1] |= {"us": round(microseconds, 1), "us_in_a_loop": round(pass_of(many, tokens, laid), 1), "error": error}
                print(json.dumps(rows[-1]), flush=True)
    facts = {
        "date": datetime.date.today().isoformat(),
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "jaxlib")},
        "device": jax.devices()[0].device_kind,
        "columns": COLUMNS,
    }
    args.out.write_text(json.dumps({"settings": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

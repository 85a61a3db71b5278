"""Times the GPU kernels beside cuBLAS in bfloat16. Needs a Hopper GPU (compute capability 9.0) and ``jax[cuda13]``.

    python benchmarks/kernels_gpu.py --out benchmarks/results/kernels_gpu_h200.json

Every row is checked against float64 numpy on some output channels before it is timed; a wrong product ends the run. A time is the median
over repetitions of the sum of a product's kernels as the GPU's own event records (CUPTI) give it, without the gaps between launches. Before
each repetition a buffer of several times the L2 cache is read, so the weights come from memory. Activations are quantized beforehand:
the time is the product's, as in the tables of the peers. A row that the output file holds already is not timed again.
"""

import argparse
import datetime
import importlib.metadata
import json
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from splitq_jax.kernels.fragment import PLANES, unpack_fragments
from splitq_jax.kernels.gpu_matmul import choose_tile, matmul
from splitq_jax.kernels.gpu_tile import SIDE_STEP, STEP, Operands

K, N = 4096, 14336
BASELINE = "cuBLAS bf16"
TOKENS = (1, 16, 32, 256, 2048)
SIDE = ((64, True), (64, True), (128, False))  # text and vision group, the branches' V
KINDS = {  # bits of the weight, integer activations, group, narrow segments
    "W4A8": (4, True, None, ()),
    "W4A8 + side": (4, True, None, SIDE),
    "W3A8": (3, True, None, ()),
    "W4A16": (4, False, None, ()),
    "W4A16 g128": (4, False, 128, ()),
    "W3A16": (3, False, None, ()),
}
TARGETS = {(kind, tokens): 8.0 for kind in ("W4A8", "W4A16") for tokens in (1, 16, 32)} | {("W4A8", 2048): 200.0}  # microseconds
BANDWIDTH = {"H200": 4.8e6, "H100": 3.35e6}  # bytes a microsecond, the vendor's
FLUSH_BYTES = 256 * 2**20
CHECKED = 64  # output channels
REPEATS = 30


def name_of(kind: str, tokens: int) -> str:
    """Return a row's key."""
    return f"{kind}, {tokens} tokens"


def operands_of(kind: str, tokens: int) -> tuple[Any, ...]:
    """Draw a product's operands: random words are random codes of the whole range."""
    if kind == BASELINE:
        shapes = (tokens, K), (K, N)
        return tuple(jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes))
    bits, integer, group, side = KINDS[kind]
    rng = np.random.default_rng(0)

    def words(width: int, field: int, step: int = STEP) -> jax.Array:
        return jnp.asarray(rng.integers(-(2**31), 2**31, (width // step, N, step * field // 32), dtype=np.int64).astype(np.int32))

    columns = np.exp(rng.standard_normal((sum(scaled for _, scaled in side), 1, N))).astype(np.float32)
    x = rng.integers(-128, 128, (tokens, K)).astype(np.int8) if integer else rng.standard_normal((tokens, K))
    operands = Operands(
        x=jnp.asarray(x, jnp.int8 if integer else jnp.bfloat16),
        planes=tuple(words(K, field) for field in PLANES[bits]),
        scale=jnp.asarray(np.exp(rng.standard_normal((K // group if group else 1, N))), jnp.float32),
        token_scale=jnp.asarray(np.exp(rng.standard_normal(tokens)), jnp.float32) if integer else None,
        side=jnp.asarray(rng.standard_normal((tokens, sum(w for w, _ in side))), jnp.bfloat16) if side else None,
        side_words=tuple(words(width, 4, SIDE_STEP) for width, _ in side),
        side_scale=tuple(jnp.asarray(scale) for scale in columns),
        bias=None,
    )
    return (operands,)


def product_of(kind: str) -> Callable[..., Any]:
    """Return the product of a kind's operands."""
    if kind == BASELINE:
        return jnp.dot
    bits, _, group, _ = KINDS[kind]
    return lambda o: matmul(o, bits, group, jnp.bfloat16)


def check(o: Operands, bits: int, got: jax.Array) -> None:
    """Compare some output channels with float64, within one rounding and the error of float32 sums.

    Raises:
      SystemExit: they differ.
    """
    channels = np.sort(np.random.default_rng(1).choice(N, CHECKED, replace=False))

    def codes(planes: tuple[jax.Array, ...], width: int, elements: int) -> np.ndarray:
        return np.asarray(unpack_fragments(tuple(p[:, channels] for p in planes), width, elements), np.float64)

    scale = np.asarray(o.scale, np.float64)[:, channels]
    x = np.asarray(o.x, np.float64) * (1 if o.token_scale is None else np.asarray(o.token_scale, np.float64)[:, None])
    terms = [(x, codes(o.planes, bits, 2 if o.token_scale is None else 4) * np.repeat(scale, K // scale.shape[0], 0))]
    begin = 0
    for i, packed in enumerate(o.side_words):
        narrow = codes((packed,), 4, 2)
        if i < len(o.side_scale):
            narrow = narrow * np.asarray(o.side_scale[i][0, channels], np.float64)
        terms.append((np.asarray(o.side[:, begin : begin + len(narrow)], np.float64), narrow))
        begin += len(narrow)
    value, magnitude = (sum(f(a) @ f(b) for a, b in terms) for f in (np.asarray, np.abs))
    excess = np.abs(np.asarray(got[:, channels], np.float64) - value) - np.abs(value) * 2.0**-8 - magnitude * 2.0**-20
    if not (excess <= 0).all():
        raise SystemExit(f"wrong product: {(excess > 0).mean():.1%} of the entries are off, the worst by {excess.max():.3g}")


def flushed(product: Callable[..., Any]) -> Callable[..., Any]:
    """Return a product before which a buffer of several times the cache is read: the weights are not there, and nothing has to be written back."""

    def run(buffer: jax.Array, *args: Any) -> Any:
        peak, args = jax.lax.optimization_barrier((jnp.max(buffer), args))
        return peak, product(*args)

    return run


def kernels_of(run: Any, *args: Any, repeats: int) -> list[list[tuple[str, float]]]:
    """Return name and milliseconds of the kernels of each run."""
    from jax.experimental.mosaic.gpu import profiler

    _, found = profiler.measure(run, aggregate=False, iterations=repeats)(*args)
    if found is None:
        raise SystemExit("the profiler saw no kernel: is another tool using CUPTI?")
    return found


def hopper() -> jax.Device:
    """Return the GPU.

    Raises:
      SystemExit: there is none, or it is no Hopper.
    """
    device = jax.devices()[0]
    if device.platform != "gpu" or getattr(device, "compute_capability", "") != "9.0":
        raise SystemExit(
            f"kernels_gpu: needs a Hopper GPU (compute capability 9.0); JAX runs on {device.platform}: {device.device_kind}"
        )
    return device


def main() -> None:
    """Time what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written after every row")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    args = parser.parse_args()
    device = hopper()
    bandwidth = next((rate for name, rate in BANDWIDTH.items() if name in device.device_kind), BANDWIDTH["H200"])
    settings = {
        "device": device.device_kind,
        "shape": f"{K} x {N}",
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "jaxlib")},
    }
    stored = json.loads(args.out.read_text()) if args.out.exists() else {"settings": settings, "rows": {}}
    if stored["settings"] != settings:
        raise SystemExit(f"{args.out}: rows of {stored['settings']}, this run has {settings}; use another --out")
    cases = [(kind, tokens) for tokens in args.tokens for kind in (BASELINE, *args.kinds)]
    wanted = [case for case in cases if name_of(*case) not in stored["rows"]]
    operands = {case: operands_of(*case) for case in wanted}
    buffer = jnp.zeros(FLUSH_BYTES // 4, jnp.int32)
    flush = len(kernels_of(lambda b: jax.lax.optimization_barrier(jnp.max(b)), buffer, repeats=2)[0])  # kernels before a product's
    lowered = [jax.jit(flushed(product_of(kind))).lower(buffer, *operands[kind, tokens]) for kind, tokens in wanted]
    with ThreadPoolExecutor() as pool:
        compiled = list(pool.map(lambda stage: stage.compile(), lowered))
    for (kind, tokens), run in zip(wanted, compiled, strict=True):
        given = operands[kind, tokens]
        row: dict[str, Any] = {}
        if kind != BASELINE:
            check(given[0], KINDS[kind][0], run(buffer, *given)[1])
            floor = sum(plane.size * 4 for plane in given[0].planes) / bandwidth
            row = {"floor_us": floor, "tile": str(choose_tile(tokens, N, K, KINDS[kind][2] is not None, floats=not KINDS[kind][1]))}
            row |= {"target_us": TARGETS[kind, tokens]} if (kind, tokens) in TARGETS else {}
        times = [sum(time for _, time in kernels[flush:]) for kernels in kernels_of(run, buffer, *given, repeats=REPEATS)]
        row |= {"us": 1e3 * statistics.median(times)}
        row |= {"times_bf16": stored["rows"][name_of(BASELINE, tokens)]["us"] / row["us"]} if kind != BASELINE else {}
        stored["rows"][name_of(kind, tokens)] = row | {"date": datetime.date.today().isoformat()}
        args.out.write_text(json.dumps(stored, indent=2) + "\n")
        print(kind, tokens, {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


if __name__ == "__main__":
    main()

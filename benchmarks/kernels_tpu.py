"""The static cost of the TPU kernels beside XLA's own products: estimated from the compiled programs, measured on no hardware.

    python benchmarks/kernels_tpu.py --estimator PATH/llo_cost.py --out benchmarks/results/kernels_tpu.json

The estimator compiles for a TPU that is not there and replays the program's scalar unit; see benchmarks/README.md for what it cannot see.
A row that the output file holds already is not computed again.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
K, N = 4096, 14336
TARGETS = {  # microseconds
    "v6e 2048 W4A4": 75,
    "v6e 2048 W4A4 + side": 92,
    "v6e 2048 W4A8": 140,
    "v6e 2048 W4A8 + side": 158,
    "v6e 16 W4A8": 20,
    "v6e 16 W3A4": 15.5,
    "v6e 16 W4A16 g128": 22,
    "v5e 2048 W4A4 4096x4096": 93,
}


def load(path: Path) -> Any:
    """Import the estimator, which has to come before jax."""
    spec = importlib.util.spec_from_file_location("llo_cost", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path}: no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def programs() -> dict[str, tuple[str, Callable[..., Any], list[Any]]]:
    """Return (chip, function, arguments) of every row."""
    import jax
    import jax.numpy as jnp

    sys.path.insert(0, str(ROOT / "tests"))  # shapes of sites
    from tpu_targets import activations, array, matrix, site

    from splitq_jax.kernels import tpu
    from splitq_jax.kernels.operands import dense_sides
    from splitq_jax.numerics import encode, scale_of
    from splitq_jax.qtensor import integer_dot

    def ours(tokens: int, k: int, n: int, bits: tuple[int, int], split: bool) -> tuple[Callable[..., Any], list[Any]]:
        w = site(k, n, bits, split)
        return lambda a, w: tpu.quantized_matmul(a, w, None, dtype=jnp.bfloat16, interpret=False), [activations(tokens, w), w]

    def weight_only(tokens: int, bits: int, group: int) -> tuple[Callable[..., Any], list[Any]]:
        product = lambda x, w: tpu.weight_only_matmul(x, w, None, dtype=jnp.bfloat16, interpret=False)  # noqa: E731
        return product, [array((tokens, K), "bfloat16"), matrix(K, N, bits, group)]

    def quantizer(tokens: int, bits: tuple[int, int], split: bool) -> tuple[Callable[..., Any], list[Any]]:
        w = jax.eval_shape(dense_sides, site(K, N, bits, split))  # as `native` leaves it
        args = [array((tokens, K), "bfloat16"), w, array((tokens,), "bool")]
        return lambda x, w, m: tpu.quantize_activations(x, w, m, interpret=False), args

    def fused(tokens: int, bits: tuple[int, int], split: bool) -> tuple[Callable[..., Any], list[Any]]:
        w = jax.eval_shape(dense_sides, site(K, N, bits, split))  # as `native` leaves it
        args = [array((tokens, K), "bfloat16"), w, array((tokens,), "bool")]
        return lambda x, w, m: tpu.decode_matmul(x, w, m, None, dtype=jnp.bfloat16, interpret=False), args

    def xla(tokens: int, kind: str) -> tuple[Callable[..., Any], list[Any]]:
        x, w4 = array((tokens, K), "bfloat16"), array((K, N), "int4")
        if kind == "bf16":
            return lambda x, w: x @ w, [x, array((K, N), "bfloat16")]
        if kind == "W4A8":

            def dynamic(x: Any, w: Any, scale: Any) -> Any:
                step = scale_of(x.astype(jnp.float32), 8)
                codes = encode(x.astype(jnp.float32), step, 8)
                return (integer_dot(codes, w.astype(jnp.int8)).astype(jnp.float32) * step * scale).astype(jnp.bfloat16)

            return dynamic, [x, w4, array((1, N), "float32")]

        def grouped(x: Any, w: Any, scale: Any) -> Any:
            decoded = (w.reshape(K // 128, 128, N).astype(jnp.bfloat16) * scale[:, None]).reshape(K, N)
            return x @ decoded

        return grouped, [x, w4, array((K // 128, N), "bfloat16")]

    rows: dict[str, tuple[str, Callable[..., Any], list[Any]]] = {}
    for tokens in (16, 256, 2048):
        for kind in ("bf16", "W4A8", "W4A16 g128"):
            rows[f"v6e {tokens} XLA {kind}"] = ("v6e", *xla(tokens, kind))
        for bits in ((4, 8), (4, 4), (3, 4)):
            for split in (False, True):
                rows[f"v6e {tokens} W{bits[0]}A{bits[1]}{' + side' * split}"] = ("v6e", *ours(tokens, K, N, bits, split))
        rows[f"v6e {tokens} W4A16"] = ("v6e", *weight_only(tokens, 4, 0))
        rows[f"v6e {tokens} W4A16 g128"] = ("v6e", *weight_only(tokens, 4, 128))
    rows["v5e 2048 W4A4 4096x4096"] = ("v5e", *ours(2048, K, K, (4, 4), False))
    for tokens in (256, 2048):
        for split in (False, True):
            rows[f"v6e {tokens} quantizer W4A4{' + side' * split}"] = ("v6e", *quantizer(tokens, (4, 4), split))
    rows["v6e 16 fused W4A4"] = ("v6e", *fused(16, (4, 4), False))
    rows["v6e 16 fused W4A4 + side"] = ("v6e", *fused(16, (4, 4), True))
    return rows


def main() -> None:
    """Compute the rows that the output file lacks, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimator", type=Path, help="path of llo_cost.py; without it the file's rows are printed")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/kernels_tpu.json")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--again", action="store_true", help="compute rows that are there already")
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.is_file() else {"rows": {}}
    if options.estimator is not None:
        estimator = load(options.estimator)
        import jax

        for name, (chip, function, args) in programs().items():
            if options.only not in name or (name in found["rows"] and not options.again):
                continue
            cost = estimator.llo_cost(function, args, chip)
            # the replay does not see the copies that XLA's own products leave to the hardware: their arguments are read at least once
            least = sum(a.size * (0.5 if a.dtype == "int4" else a.dtype.itemsize) for a in jax.tree.leaves(args))
            least = min(least, cost["hlo"].memory_analysis().argument_size_in_bytes)  # the quantizer reads no weight
            floor = max(cost["dma_bytes"], least) / estimator.CHIP[chip]["hbm"] * 1e6
            found["rows"][name] = {
                "us": round(max(cost["est_us"], floor), 1),
                "issue_us": round(cost["issue_us"], 1),
                "mxu_us": round(cost["mxu_cycles"] / estimator.CHIP[chip]["clk"] * 1e6, 1),
                "hbm_us": round(floor, 1),
                "vmem_mib": round(cost["vmem_bytes"] / 2**20, 1),
                "compile_s": cost["compile_s"],
            }
            found["date"] = datetime.date.today().isoformat()
            found["versions"] = {p: importlib.metadata.version(p) for p in ("jax", "libtpu")}
            options.out.write_text(json.dumps(found, indent=1) + "\n")
            print(name, found["rows"][name], flush=True)
    print("\n| row | estimated µs | target | binds: issue · MXU · HBM |\n|---|---|---|---|")
    for name, row in found["rows"].items():
        print(f"| {name} | {row['us']} | {TARGETS.get(name, '')} | {row['issue_us']} · {row['mxu_us']} · {row['hbm_us']} |")


if __name__ == "__main__":
    main()

"""Device memory of calibration on a TPU that is not there: ``python benchmarks/calibration_tpu.py --chip v5e --model Qwen2.5-VL-7B``.

Every program that calibration runs for one decoder block is compiled by the real compiler for four chips, which share the samples, one each; what
it says of its memory is printed and kept. Nothing is run. The training step takes minutes to compile.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from splitq_jax import quantization, recipes
from splitq_jax.calib import reconstruction, statistics
from splitq_jax.calib.blocks import block_params
from splitq_jax.mocd import RANK_BINS, SiteStats
from splitq_jax.models.llava import Llava, LlavaConfig
from splitq_jax.rounding import _codes
from splitq_jax.site import learnable

CHIPS, TEXT, IMAGE = 4, 64, 990  # text tokens a sample; the image's placeholder
GB = 1e9


def main() -> None:
    """Compile what the file lacks and print it."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # shapes of real models
    from tpu_targets import SIZES, TOPOLOGIES, target

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chip", default="v5e", choices=list(TOPOLOGIES))
    parser.add_argument("--model", default="Qwen2.5-VL-7B", choices=list(SIZES))
    parser.add_argument("--tokens", type=int, default=1024, help="of a sample")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/calibration_tpu.json"))
    args = parser.parse_args()
    rows: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    with target(args.chip, {"data": CHIPS}, dump=False) as mesh, jax.default_matmul_precision("highest"):
        for name, function, arguments in programs(SIZES[args.model], args.tokens, mesh):
            row = f"{args.chip} {args.model} {args.tokens} {name}"
            if row not in rows:
                m = function.lower(*arguments).compile().memory_analysis()
                sizes = {
                    "arguments": m.argument_size_in_bytes,
                    "results": m.output_size_in_bytes,
                    "temporary": m.temp_size_in_bytes,
                }
                versions = {p: importlib.metadata.version(p) for p in ("jax", "libtpu")}
                rows[row] = {k: round(v / GB, 2) for k, v in sizes.items()} | versions
                args.out.write_text(json.dumps(rows, indent=1) + "\n")
            print(row, rows[row], flush=True)


def programs(size: tuple[int, int, int, int], tokens: int, mesh: Mesh) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield (name, jitted function, arguments) of what one block of a decoder of these sizes runs, shapes alone."""
    hidden, inner, heads, kv_heads = size
    text = {"vocab_size": 1000, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 1}
    text |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56}
    model = Llava(
        LlavaConfig.from_hf({"model_type": "llava", "image_token_index": IMAGE, "text_config": text, "vision_config": tower})
    )
    ids = np.ones((CHIPS, tokens), np.int32)
    pixels = np.zeros((CHIPS, 3, 56, 56), np.float32)
    ids[:, 1 : 1 + (56 // 14) ** 2] = IMAGE
    batch = {"input_ids": ids, "attention_mask": np.ones(ids.shape, bool), "pixel_values": pixels}
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), **batch))["params"]
    hiddens = jax.eval_shape(lambda p: model.apply({"params": p}, **batch, method="embed"), params)
    whole, shared = PartitionSpec(), PartitionSpec("data")

    def placed(tree: Any, spec: PartitionSpec) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)), tree)

    def shape(*dims: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))

    x, context = placed(shape(*hiddens.x.shape), shared), placed(hiddens.context, shared)
    block, weights = model.block(0), placed(block_params(params, 0), whole)
    kernels = quantization.kernels(block_params(params, 0))

    first, second = statistics._passes(block, mesh, True, True)
    yield "statistics, first pass, with Gram matrices", first, (weights, x, context)
    where = {"index": shape(CHIPS, TEXT, dtype="int32"), "real": shape(CHIPS, TEXT, dtype="bool")}
    main = {name: shape(w.shape[0], dtype="bool") for name, w in kernels.items()}
    yield "statistics, second pass", second, (weights, x, context, placed(where, shared), placed(main, whole))

    recipe = recipes.splitq("w4a4")

    def stats(width: int) -> SiteStats:
        k, bins = recipe.split.channels(width), shape(width, RANK_BINS, dtype="int32")
        return SiteStats(shape(3, width), shape(3, width), shape(3), shape(k, dtype="int32"), bins)

    found = {f"decoder/blocks_0/{name}": stats(w.shape[0]) for name, w in kernels.items()}
    prepared = jax.eval_shape(lambda p, s: quantization.prepare(p, s, recipe), params, found)
    student = block_params(prepared, 0)
    theta = {name: learnable(site) for name, site in quantization.kernels(student).items()}
    step, optimizer, _ = reconstruction._functions(block, mesh, dataclasses.replace(reconstruction.FULL, batch_size=CHIPS), 128)
    state = jax.eval_shape(optimizer.init, theta)
    yield "training step", step, (*placed((student, theta, state), whole), x, x, context)

    rows, columns = kernels["down"].shape
    scales = shape(3, columns), shape(rows, dtype="int32"), shape(3, dtype="int32")
    yield "GPTQ of down", _codes, placed((shape(rows, columns), shape(rows, rows), *scales), whole)


if __name__ == "__main__":
    main()

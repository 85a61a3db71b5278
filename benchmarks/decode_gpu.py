"""Times decoding on a GPU: ``python benchmarks/decode_gpu.py --out benchmarks/results/decode_gpu_h200.json``.

A step is a pass of the loop of `generate` that appends tokens without a word to the host, on caches that hold a prompt; the model is the
decoder of the demo VLM (8 blocks), whole, and a block of LLaVA 7B: half of what three blocks take beyond one. In bfloat16 and as
codes. Weights are drawn at random, for only their speed is asked for. Medians over repetitions that take turns.
"""

import argparse
import datetime
import importlib.metadata
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from splitq_jax import demo_model
from splitq_jax.kernels.layout import native
from splitq_jax.linear import SplitWeight
from splitq_jax.models.cache import empty
from splitq_jax.models.generate import State, advance
from splitq_jax.models.llava import Llava, LlavaConfig
from splitq_jax.models.sampling import Sampling
from splitq_jax.quantization import kernels, replace_kernels

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # shapes of sites
from tpu_targets import array, site

PROMPT, ROOM = 512, 1024
SCHEMES = {  # bits of weights and activations, whether channels are split off and branches added; None for bfloat16
    "bfloat16": None,
    "W4A16": (4, 16, True),
    "W4A8": (4, 8, True),
    "W4A4": (4, 4, True),
    "W4A4 main group alone": (4, 4, False),
}
SEVEN = {"model_type": "llava", "text_config": {}}
MODELS = {"demo": (demo_model.hf_config("demo"), 8), "one block": (SEVEN, 1), "three blocks": (SEVEN, 3)}
STOPS = np.full(8, -2, np.int32)  # no token


def drawn(tree: Any) -> Any:
    """Draw every leaf: integers over their whole range, small floats."""
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            limits = np.iinfo(leaf.dtype)
            return jnp.asarray(rng.integers(limits.min, limits.max, leaf.shape, leaf.dtype, endpoint=True))
        return jnp.asarray((0.02 * rng.random(leaf.shape, np.float32) - 0.01).astype(leaf.dtype))

    return jax.tree.map(draw, tree)


def decoder(config: dict[str, Any], layers: int, scheme: tuple[int, int, bool] | None) -> tuple[Any, Any]:
    """Return a LLaVA of so many blocks and random parameters of its decoder, as they are multiplied on this machine."""
    text = config["text_config"] | {"num_hidden_layers": layers}
    model = Llava(LlavaConfig.from_hf(config | {"text_config": text}))
    shapes = jax.eval_shape(lambda batch: model.init(jax.random.key(0), **batch), model.example())["params"]
    params = {"decoder": jax.tree.map(lambda a: array(a.shape, "bfloat16"), shapes["decoder"])}
    if scheme is None:
        return model, drawn(params)
    w_bits, a_bits, split = scheme
    found = {path: leaf.shape for path, leaf in kernels(params).items() if path.startswith("decoder/blocks_")}
    params = drawn(replace_kernels(params, {path: site(*shape, (w_bits, a_bits), split) for path, shape in found.items()}))
    if split:  # what was drawn for them are no permutations
        sites = kernels(params)
        params = replace_kernels(params, {path: replace(sites[path], perm=order_of(sites[path])) for path in found})
    return model, native(params)


def order_of(w: SplitWeight) -> jax.Array:
    """Draw ``[C_m | C_t | C_v]`` of a site, C_m ascending."""
    main, side = np.split(np.random.default_rng(0).permutation(w.shape[0]), [w.groups[0].w.rows])
    return jnp.asarray(np.concatenate([np.sort(main), side]), jnp.int32)


def state_of(model: Any, rows: int) -> State:
    """Return caches that hold `PROMPT` tokens."""
    text = model.config.text
    shape = (rows, ROOM, text.num_kv_heads, text.head_dim)
    return State(
        caches=[empty(shape, jnp.dtype("bfloat16"), 16) for _ in range(model.config.num_layers)],
        used=jnp.broadcast_to(jnp.arange(ROOM) < PROMPT - 1, (rows, ROOM)),
        tokens=jnp.zeros((rows, ROOM), jnp.int32),
        at=jnp.int32(PROMPT - 1),
        turns=jnp.full((rows, 1), PROMPT - 1, jnp.int32),
        ended=jnp.zeros(rows, bool),
        key=jax.random.key(0),
    )


def compiled(cases: list[tuple[Any, Any, int]]) -> list[Any]:
    """Return the compiled loop of each model, parameters and batch."""
    lowered = [advance.lower(model, params, state_of(model, rows), Sampling(), STOPS, 0) for model, params, rows in cases]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda stage: stage.compile(), lowered))


def seconds_of(run: Any, model: Any, params: Any, rows: int, steps: int) -> float:
    """Return how long a step takes."""
    state = jax.block_until_ready(state_of(model, rows))
    start = time.perf_counter()
    state = run(params, state, Sampling(), STOPS, PROMPT + steps)
    if int(state.at) != PROMPT + steps - 1:
        raise SystemExit(f"the loop ended at {int(state.at)}, not at {PROMPT + steps - 1}")
    return (time.perf_counter() - start) / steps


def main() -> None:
    """Time everything and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 16))
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    args = parser.parse_args()
    made = {(name, s): decoder(*MODELS[name], SCHEMES[s]) for name in MODELS for s in args.schemes}
    keys = [(*key, batch) for batch in args.batches for key in made]
    runs = dict(zip(keys, compiled([(*made[name, s], batch) for name, s, batch in keys]), strict=True))
    times: dict[tuple[str, str, int], list[float]] = {key: [] for key in keys}
    for repeat in range(args.repeats + 1):
        for name, s, batch in keys:
            seconds = seconds_of(runs[name, s, batch], *made[name, s], batch, args.steps)
            times[name, s, batch] += [seconds] if repeat else []  # the first run warms up
    rows = []
    for batch in args.batches:
        for s in args.schemes:
            demo, one, three = (times[name, s, batch] for name in MODELS)
            block = statistics.median((b - a) / 2 for a, b in zip(one, three, strict=True))
            rows.append({"scheme": s, "batch": batch, "demo_us": 1e6 * statistics.median(demo), "block_7b_us": 1e6 * block})
            print(json.dumps(rows[-1]), flush=True)
    facts = {
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "date": datetime.date.today().isoformat(),
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "jaxlib")},
        "device": jax.devices()[0].device_kind,
        "prompt": PROMPT,
    }
    args.out.write_text(json.dumps({"settings": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

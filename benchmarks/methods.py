"""Compares the methods on a demo VLM: ``python benchmarks/methods.py --out benchmarks/results/demo_light.json``.

One row a method, scheme and calibration seed, each written when it is done; started again, it goes on with the rows that are missing.
Test questions are only reported on; pass ``--split validation`` to choose a setting.
"""

import argparse
import json
import platform
import tempfile
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path

import jax

from splitq_jax import calib, demo_model, recipe
from splitq_jax import eval as evaluation
from splitq_jax.calib.easy_vqa import EasyVqa
from splitq_jax.calib.reconstruction import EFFORTS, FitConfig
from splitq_jax.commands.quantize import FIT_FLAGS, RECIPE_FLAGS
from splitq_jax.flags import add_fields, given
from splitq_jax.output import make_console, progress_bar
from splitq_jax.pipeline import Setup, keep_freed_memory, quantized, result_row
from splitq_jax.recipe import Recipe

METHODS = ("rtn", "smoothquant", "flatquant", "random-channels", "mocd", "mocd-cws", "splitq", "splitq-fixed")
SCHEMES = ("w4a8", "w4a4", "w3a3", "w3a2")


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written after every row")
    parser.add_argument("--size", default="demo", choices=list(demo_model.SIZES))
    parser.add_argument("--model-seed", type=int, default=0)
    parser.add_argument("--effort", default="light", choices=list(EFFORTS))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=list(recipe.METHODS))
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--limit", type=int, default=0, help="ask only the first so many questions; 0 for all")
    parser.add_argument("--split", dest="part", default="test", choices=("validation", "test"), help="of the questions")
    add_fields(parser.add_argument_group("recipe", "added to the methods' names in the table"), Recipe, RECIPE_FLAGS)
    add_fields(parser.add_argument_group("training"), FitConfig, FIT_FLAGS)
    args = parser.parse_args()
    console = make_console()
    config = FitConfig(**(vars(EFFORTS[args.effort]) | given(args, FitConfig)))
    settings = {
        "size": args.size,
        "model_seed": args.model_seed,
        "split": args.part,
        "limit": args.limit,
        "training": asdict(config),
    }
    stored = json.loads(args.out.read_text()) if args.out.exists() else {"settings": settings, "rows": []}
    if stored["settings"] != settings:
        raise SystemExit(f"{args.out}: rows of {stored['settings']}, this run has {settings}; use another --out")
    rows = [evaluation.Row(**r) for r in stored["rows"]]
    done = {(r.method, r.scheme, r.seed) for r in rows}
    changes = given(args, Recipe)
    wanted = []
    for scheme, seed, method in product(args.schemes, args.seeds, args.methods):
        made = recipe.named(method, scheme)
        named = made.replace(method=",".join((made.method, *(f"{k}={v}" for k, v in changes.items()))), seed=seed, **changes)
        if (named.method, scheme, seed) not in done:
            wanted.append(named)
    if not wanted:
        console.print(evaluation.table(rows))
        return
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder, progress_bar(console) as bar:
        demo_model.build(args.size, Path(folder) / "model", seed=args.model_seed)
        setup = Setup.open(Path(folder) / "model", EasyVqa(Path(folder) / "data"))
        questions = setup.questions(args.part, args.limit)
        reference = evaluation.evaluate(setup.model, setup.params, questions, progress=bar, label="float")
        if ("float", "float", 0) not in done:
            rows.append(result_row(reference, setup.params, "float", "float", 0, 0.0))
        held_out = setup.calibration(32, 0, "validation")
        for seed in args.seeds:
            todo = [r for r in wanted if r.seed == seed]
            if not todo:
                continue
            samples = setup.calibration(128, seed)
            start = time.monotonic()
            gram = any(r.rounding == "gptq" for r in todo)
            stats = calib.collect(setup.model, setup.params, samples, todo[0].split, gram=gram, progress=bar)
            collecting = time.monotonic() - start
            for part in todo:
                out = quantized(setup, stats, part, config, samples, held_out=held_out, progress=bar)
                result = evaluation.evaluate(setup.model, out.params, questions, reference, progress=bar, label=part.method)
                row = result_row(result, out.params, part.method, part.scheme, seed, collecting + out.seconds)
                rows.append(row)
                blocks = " ".join(f"{e.after:.3f}" for e in out.errors)
                console.print(
                    f"{row.scheme} {row.method} seed {seed}: {100 * row.accuracy:.1f} %, KL {row.kl:.4f}, blocks {blocks}"
                )
                facts = {"jax": jax.__version__, "python": platform.python_version(), "device": jax.devices()[0].device_kind}
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(
                    json.dumps({"settings": settings, "facts": facts, "rows": [asdict(r) for r in rows]}, indent=1) + "\n"
                )
    console.print(evaluation.table(rows))


if __name__ == "__main__":
    main()

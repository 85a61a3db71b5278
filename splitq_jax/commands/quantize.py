"""``splitq quantize``: statistics, training and packed codes."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

import splitq_jax as sq
from splitq_jax import calib, models, quantization, recipe, summary
from splitq_jax.calib.reconstruction import EFFORTS, FitConfig
from splitq_jax.calib.run import discard
from splitq_jax.commands.calibrate import collect, drawn, float_setup
from splitq_jax.commands.common import add_calibration, add_model, add_output, answer_to, layer_table, output_of
from splitq_jax.errors import InputError
from splitq_jax.flags import add_fields, given
from splitq_jax.mocd import SiteStats, SplitSize
from splitq_jax.models.convert import PARAMS
from splitq_jax.output import make_console, progress_bar
from splitq_jax.pipeline import CHANNELS, by_key, by_path, quantized, run_folder
from splitq_jax.processes import by_first, check_alike, join, together

RECIPE_FLAGS = (
    *("select", "clusters", "group_size", "side_bits", "transform", "clip", "lwc_start", "cws", "mac"),
    *("cws_rate", "mac_rate", "mac_tokens", "svd_per", "cws_start", "mac_start", "rounding", "train", "vision", "sites"),
)
FIT_FLAGS = ("epochs", "steps", "batch_size", "transform_lr", "clip_lr", "loss", "epsilon")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``splitq quantize``."""
    add_model(parser)
    add_output(parser)
    parser.add_argument("--scheme", default="w4a4", help="wXaY: X-bit weights, Y-bit activations, 16 for none (default: w4a4)")
    parser.add_argument(
        "--method", default="splitq", choices=list(recipe.METHODS), help="a named recipe (default: splitq); further flags change it"
    )
    parser.add_argument("--effort", default="full", choices=list(EFFORTS), help="training of each block (default: full)")
    parser.add_argument("--stats", type=Path, default=None, help="statistics of splitq calibrate; collected here if not given")
    parser.add_argument(
        "--run-folder", type=Path, default=None, help="where finished blocks are kept, to resume (default: OUT.run)"
    )
    add_calibration(parser)
    add_fields(parser.add_argument_group("recipe"), recipe.Recipe, RECIPE_FLAGS)
    add_fields(parser.add_argument_group("training"), FitConfig, FIT_FLAGS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Quantize and write a model."""
    if options.distributed:
        join()
    console = make_console()
    size = SplitSize(options.split_rate, options.split_align)
    chosen = recipe.named(options.method, options.scheme).replace(split=size, **given(options, recipe.Recipe))
    config = FitConfig(**(vars(EFFORTS[options.effort]) | given(options, FitConfig)))
    runs = options.run_folder or run_folder(options.out)
    with output_of(options) as folder:
        check_alike("recipe and training", lambda: repr((chosen, config)))
        setup = float_setup(options)
        _print_plan(console, quantization.match(setup.params, chosen))
        batches, made_of = drawn(setup, options)
        with progress_bar(console) as bar:
            if options.stats is None:
                stats = collect(setup, options, batches, chosen.rounding == "gptq", chosen.vision != "float", bar)
            else:
                stats = together(lambda: _restore_stats(options.stats, made_of))
            done = quantized(setup, stats, chosen, config, batches, run_folder=runs, mesh=calib.data_mesh(), progress=bar)
        errors = calib.site_errors(setup.model, setup.params, done.params, batches)
        facts = {"site_errors": errors, "block_errors": [vars(e) for e in done.errors], "training": config, "seconds": done.seconds}
        sq.save(folder / PARAMS, done.params, recipe=chosen, config=setup.model.config, extra=made_of | facts)
        sq.save(folder / CHANNELS, by_key({path: s.absmax for path, s in stats.items()}))
        by_first(lambda: models.copy_processor(options.model, folder))
    if chosen.train:
        discard(runs)
    before, after = summary.stored_bytes(setup.params), summary.stored_bytes(done.params)
    console.print(layer_table(done.params, errors))
    bits = summary.effective_bits(done.params)
    console.print(
        f"{before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB after; {bits:.2f} bits a quantized weight, all told; {done.seconds:.0f} s"
    )
    console.print(f"Wrote {options.out}")
    record = setup.data.records("train", [0])[0]
    answer = answer_to(setup.model, done.params, setup.processor, record["question"], [record["image"]], 16)
    console.print(f"A sample: {record['question']} [bold]{answer}[/bold] (expected: {record['answer']})")


def _print_plan(console: Console, matched: Mapping[str, recipe.Recipe]) -> None:
    for part in dict.fromkeys(matched.values()):
        paths = [path for path, r in matched.items() if r == part]
        console.print(f"{part.method} {part.scheme}: {len(paths)} layers match {', '.join(part.sites)} ({paths[0]} … {paths[-1]})")


def _restore_stats(folder: Path, wanted: Mapping[str, Any]) -> dict[str, SiteStats]:
    tree, manifest = sq.restore(folder / PARAMS, on_host=True)  # Gram matrices are as large as weights
    found = manifest["extra"] or {}
    if not tree or not all(isinstance(s, SiteStats) for s in tree.values()):
        raise InputError(f"--stats {folder}: holds no statistics; give a folder of splitq calibrate")
    for name, value in wanted.items():
        if found.get(name) != value:
            raise InputError(
                f"--stats {folder}: collected with {name} {found.get(name)}, here it is {value}; collect them anew or give the same"
            )
    return by_path(tree)

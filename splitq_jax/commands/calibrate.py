"""``splitq calibrate``: statistics of the layers' inputs."""

import argparse
import hashlib
from pathlib import Path
from typing import Any

from rich.progress import Progress

import splitq_jax as sq
from splitq_jax import calib
from splitq_jax.calib.run import fingerprint
from splitq_jax.commands.common import add_calibration, add_model, add_output, is_quantized, output_of
from splitq_jax.errors import InputError
from splitq_jax.eval.easy_vqa import Batch
from splitq_jax.mocd import SiteStats, SplitSize
from splitq_jax.models.convert import PARAMS
from splitq_jax.output import make_console, progress_bar
from splitq_jax.pipeline import Setup, by_key, keep_freed_memory, source
from splitq_jax.processes import check_alike, join, together


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``splitq calibrate``."""
    add_model(parser)
    add_output(parser)
    add_calibration(parser)
    parser.add_argument("--gram", action="store_true", help="also collect X^T X, which GPTQ needs")
    parser.add_argument(
        "--vision-tower", action="store_true", help="also collect maxima for the vision tower, which --vision needs"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Collect and write statistics."""
    if options.distributed:
        join()
    console = make_console()
    with output_of(options) as folder, progress_bar(console) as bar:
        setup = float_setup(options)
        batches, made_of = drawn(setup, options)
        stats = collect(setup, options, batches, options.gram, options.vision_tower, bar)
        sq.save(folder / PARAMS, by_key(stats), extra=made_of)
    console.print(f"Wrote {options.out}: statistics of {len(stats)} sites from {options.samples} samples")


def float_setup(options: argparse.Namespace) -> Setup:
    """Open the model, in host memory, and the data; a quantized model is refused."""
    keep_freed_memory()
    setup = together(lambda: Setup.open(options.model, source(options.data, options.data_dir), options.follow_links, on_host=True))
    if is_quantized(setup.params):
        raise InputError(f"{options.model}: is quantized already; give the float model")
    return setup


def drawn(setup: Setup, options: argparse.Namespace) -> tuple[list[Batch], dict[str, Any]]:
    """Draw the calibration set, and say what statistics depend on, which is the same in all processes."""
    batches, made_of = together(lambda: (setup.calibration(options.samples, options.seed), provenance(setup, options)))
    check_alike("weights or data", lambda: repr(made_of))
    return batches, made_of


def collect(
    setup: Setup, options: argparse.Namespace, batches: Any, gram: bool, vision: bool, bar: Progress
) -> dict[str, SiteStats]:
    """Collect statistics over all devices."""
    size = SplitSize(options.split_rate, options.split_align)
    flags = {"skip_first": options.skip_first, "gram": gram, "vision_tower": vision}
    return calib.collect(setup.model, setup.params, batches, size, mesh=calib.data_mesh(), progress=bar, **flags)


def provenance(setup: Setup, options: argparse.Namespace) -> dict[str, Any]:
    """Return what statistics depend on: the data, how they were drawn and the weights."""
    names = ("samples", "seed", "split_rate", "split_align", "skip_first")
    # a file by what it says, wherever it lies
    data = options.data if options.data == "easy-vqa" else f"sha256 {hashlib.sha256(Path(options.data).read_bytes()).hexdigest()}"
    return {"data": data} | {name: getattr(options, name) for name in names} | {"weights": fingerprint(setup.params)}

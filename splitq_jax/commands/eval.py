"""``splitq eval``: the questions of a data set."""

import argparse
import dataclasses
from pathlib import Path

from splitq_jax import eval as evaluation
from splitq_jax import models
from splitq_jax.commands.common import add_data, add_mesh, add_model, add_output, is_quantized, made_by, mesh_of, output_of
from splitq_jax.errors import InputError
from splitq_jax.manifest import read_manifest
from splitq_jax.models.convert import PARAMS
from splitq_jax.output import make_console, progress_bar
from splitq_jax.pipeline import Setup, result_row, source


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``splitq eval``."""
    add_model(parser)
    add_mesh(parser)
    add_data(parser)
    add_output(parser, required=False)
    parser.add_argument("--reference", type=Path, default=None, help="the float model's folder, for agreement and KL")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"), help="of easy-vqa (default: test)")
    parser.add_argument("--limit", type=int, default=0, help="ask only the first so many questions; 0 for all (default: 0)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Evaluate a model and print (and write) its row."""
    console = make_console()
    mesh, data = mesh_of(options), source(options.data, options.data_dir)
    setup = Setup.open(options.model, data, options.follow_links, mesh=mesh)
    questions = setup.questions(options.split, options.limit)
    rows, reference = [], None
    with progress_bar(console) as bar:
        if options.reference is not None:
            model, params = models.load(options.reference, mesh=mesh, follow_links=options.follow_links)
            if is_quantized(params):
                raise InputError(f"--reference {options.reference}: is quantized; give the float model")
            reference = evaluation.evaluate(model, params, questions, progress=bar, label="float")
            rows.append(result_row(reference, params, "float", "float", 0, 0.0))
        result = evaluation.evaluate(setup.model, setup.params, questions, reference, progress=bar, label=str(options.model))
    manifest = read_manifest(options.model / PARAMS) if models.is_converted(options.model) else {}
    method, scheme, seed = made_by(manifest, setup.params)
    if rows and (method, scheme) == ("float", "float"):
        method = "float (MODEL)"
    row = result_row(result, setup.params, method, scheme, seed, (manifest.get("extra") or {}).get("seconds"))
    rows.append(dataclasses.replace(row, agreement=None, kl=None) if reference is None else row)
    console.print(evaluation.table(rows))
    if options.out is not None:
        facts = {"model": str(options.model), "reference": str(options.reference), "data": options.data, "split": options.split}
        with output_of(options) as folder:
            evaluation.write(evaluation.Report(f"{method} {scheme} on {options.data}", facts, tuple(rows)), folder)
        console.print(f"Wrote {options.out}")

"""``splitq convert``: Hugging Face to Flax parameters, a leaf at a time."""

import argparse

import jax.numpy as jnp

import splitq_jax as sq
from splitq_jax import models, quantization, summary
from splitq_jax.commands.common import add_model, add_output, output_of
from splitq_jax.errors import InputError
from splitq_jax.models.convert import PARAMS
from splitq_jax.output import make_console, progress_bar


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``splitq convert``."""
    add_model(parser)
    add_output(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the parameters (default: float32)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Convert a Hugging Face folder, a leaf at a time."""
    if models.is_converted(options.model):
        raise InputError(f"{options.model}: is converted or quantized already; give the folder that it was made from, or copy it")
    console = make_console()
    model, params = models.deferred(options.model, dtype=jnp.dtype(options.dtype), follow_links=options.follow_links)
    with output_of(options) as folder, progress_bar(console) as bar:
        sq.save(folder / PARAMS, params, config=model.config, progress=bar)
        models.copy_processor(options.model, folder)
    size = summary.stored_bytes(params)
    console.print(f"Wrote {options.out}: {len(quantization.kernels(params))} linear layers, {size / 1e6:,.1f} MB")

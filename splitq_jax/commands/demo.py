"""``splitq demo``: the comparison on a demo VLM."""

import argparse

from splitq_jax.demo import DemoConfig
from splitq_jax.demo import run as run_demo
from splitq_jax.flags import add_fields, given


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``splitq demo``."""
    flags = ("out", "scheme", "method", "effort", "rounding", "limit", "size", "samples", "seed", "model_seed", "base")
    add_fields(parser, DemoConfig, flags)
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    parser.set_defaults(run=lambda options: run_demo(DemoConfig(**given(options, DemoConfig))))

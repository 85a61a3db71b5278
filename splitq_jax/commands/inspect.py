"""``splitq inspect``: a quantized model layer by layer."""

import argparse
from pathlib import Path

import splitq_jax as sq
from splitq_jax import quantization, summary
from splitq_jax.commands.common import is_quantized, layer_table, made_by
from splitq_jax.errors import InputError
from splitq_jax.eval.plots import channel_maxima
from splitq_jax.models.convert import PARAMS
from splitq_jax.output import make_console
from splitq_jax.pipeline import CHANNELS, by_key, by_path, channels_of


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``splitq inspect``."""
    parser.add_argument("model", type=Path, help="a quantized model's folder")
    parser.add_argument(
        "--plots", type=Path, default=None, help="folder for a plot (SVG) of each site's per-channel maxima, split channels marked"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Show a quantized model layer by layer."""
    params, manifest = sq.restore(options.model / PARAMS, on_host=True)
    if not is_quantized(params):
        raise InputError(f"{options.model}: is not quantized; run splitq quantize first")
    console = make_console()
    method, scheme, seed = made_by(manifest, params)
    console.print(f"{method} {scheme}, seed {seed}; written with {manifest['versions']}")
    console.print(layer_table(params, (manifest["extra"] or {}).get("site_errors", {})))
    console.print(
        f"{summary.stored_bytes(params) / 1e6:,.1f} MB; {summary.effective_bits(params):.2f} bits a quantized weight, all told"
    )
    if options.plots is not None:
        maxima, _ = sq.restore(options.model / CHANNELS, on_host=True)
        leaves = quantization.kernels(params)
        plots = {
            path: channel_maxima(channels_of(path, absmax, leaves[path]))
            for path, absmax in by_path(maxima).items()
            if path in leaves
        }
        try:
            options.plots.mkdir(parents=True, exist_ok=True)
            for name, svg in by_key(plots).items():
                (options.plots / f"{name}.svg").write_text(svg, encoding="utf-8")
        except OSError as e:
            raise InputError(f"--plots {options.plots}: cannot be written ({e.strerror}); give another folder") from None
        console.print(f"Wrote {len(plots)} plots to {options.plots}")

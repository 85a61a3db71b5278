"""What the commands share: flags, the check of a tree, an answer, and the table of layers."""

import argparse
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.table import Table

from splitq_jax import models, quantization, summary
from splitq_jax.linear import SplitWeight
from splitq_jax.output import output_folder
from splitq_jax.sharding import mesh_of_sizes


def add_output(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add ``--out`` and ``--overwrite``."""
    parser.add_argument("--out", type=Path, required=required, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")


def output_of(options: argparse.Namespace) -> contextlib.AbstractContextManager[Path]:
    """Return the context of ``--out`` (see `output_folder`), which nothing that is read may lie in."""
    return output_folder(
        options.out, options.overwrite, *(getattr(options, name, None) for name in ("model", "reference", "stats"))
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model's folder."""
    parser.add_argument("model", type=Path, help="model folder: Hugging Face's, converted or quantized")
    parser.add_argument(
        "--follow-links", action="store_true", help="allow weights that link out of the folder, as in the hub's cache"
    )


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Add ``--mesh``."""
    parser.add_argument(
        "--mesh", default=None, metavar="AXIS=SIZE,…", help="split the parameters over devices, as tensor=8 (default: one device)"
    )


def mesh_of(options: argparse.Namespace) -> Mesh | None:
    """Return the devices that ``--mesh`` names; None: the default one."""
    return None if options.mesh is None else mesh_of_sizes(options.mesh)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add ``--data``."""
    parser.add_argument(
        "--data", default="easy-vqa", help="easy-vqa, or a .jsonl file with image, question and answer a line (default: easy-vqa)"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path.home() / "tensorflow_datasets",
        help="where easy-vqa is built (default: ~/tensorflow_datasets)",
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add what decides the statistics."""
    add_data(parser)
    parser.add_argument("--samples", type=int, default=128, help="calibration images (default: 128)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn samples, their order and random factors (default: 0)")
    parser.add_argument("--split-rate", type=float, default=0.02, help="share of the channels in each side group (default: 0.02)")
    parser.add_argument(
        "--split-align",
        type=int,
        default=None,
        help="round the side groups to the nearest multiple of this (default: 64; below 1024 channels, up to one of 8)",
    )
    parser.add_argument(
        "--skip-first",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave each sample's first token out of the scores",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="share the samples with other processes, one a host, as on a TPU pod; all read the same files, the first writes",
    )


def is_quantized(params: Any) -> bool:
    """Return whether a tree holds packed codes."""
    return any(isinstance(leaf, SplitWeight) for leaf in quantization.kernels(params).values())


def made_by(manifest: Mapping[str, Any], params: Any) -> tuple[str, str, int]:
    """Return method, scheme and seed of a tree: the scheme by its codes, the others by the recipe or recipes that were kept with it."""
    if not is_quantized(params):
        return "float", "float", 0
    kept = manifest.get("recipe")
    recipes = [recipe for recipe in (kept if isinstance(kept, list) else [kept]) if isinstance(recipe, dict)]
    methods = dict.fromkeys(str(recipe.get("method", "quantized")) for recipe in recipes) or {"quantized": None}
    schemes = dict.fromkeys(f"w{s.bits[0]}a{s.bits[1]}" for s in summary.summarize(params) if s.path.startswith("decoder/"))
    return " + ".join(methods), " + ".join(schemes), next((recipe["seed"] for recipe in recipes if "seed" in recipe), 0)


def answer_to(
    model: Any, params: Any, processor: models.Processor, question: str, images: list[Any], room: int, **numbers: Any
) -> str:
    """Return the answer to a question, of ``room`` tokens at most."""
    (tokens,) = models.generate(model, params, processor.inputs(question, images), room, processor.stop_ids, **numbers)
    return processor.decode(tokens)


def layer_table(params: Any, errors: Mapping[str, float]) -> Table:
    """Return what each quantized layer holds, and its error where it was measured."""
    table = Table("Layer", "Shape", "Bits", "Groups", "Ranks", "KB", "Bits/weight", "Error", box=None, padding=(0, 2, 0, 0))
    for s in summary.summarize(params):
        groups, ranks = " + ".join(map(str, s.groups)), f"{s.ranks[0]}, {s.ranks[1]}"
        error = f"{100 * errors[s.path]:.2f} %" if s.path in errors else "–"
        scheme = f"W{s.bits[0]}A{s.bits[1]}" + (f" g{s.group_size}" if s.group_size < s.groups[0] else "")
        table.add_row(
            s.path,
            f"{s.shape[0]} x {s.shape[1]}",
            scheme,
            groups,
            ranks,
            f"{s.stored_bytes / 1e3:,.0f}",
            f"{s.effective_bits:.2f}",
            error,
        )
    table.caption = (
        "Groups: main + text + vision channels. Ranks: CWS, MAC. Error: of the layer's output on the calibration set, relative."
    )
    return table

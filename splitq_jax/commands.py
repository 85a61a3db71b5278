"""The commands' flags and what they do; each reads a folder and writes a folder, whole or not at all."""

import argparse
import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import splitq_jax as sq
from splitq_jax import calib, models, quantization, recipe
from splitq_jax import eval as evaluation
from splitq_jax.calib.reconstruction import EFFORTS, FitConfig
from splitq_jax.calib.run import discard, fingerprint
from splitq_jax.demo import DemoConfig
from splitq_jax.demo import run as run_demo
from splitq_jax.errors import InputError
from splitq_jax.eval.plots import channel_maxima
from splitq_jax.flags import add_fields, given
from splitq_jax.linear import SplitWeight
from splitq_jax.manifest import read_manifest
from splitq_jax.mocd import SiteStats, SplitSize
from splitq_jax.models.convert import PARAMS
from splitq_jax.output import make_console, output_folder, progress_bar
from splitq_jax.pipeline import CHANNELS, Setup, channels_of, keep_freed_memory, quantized, result_row, source

RECIPE_FLAGS = (
    *("select", "clusters", "group", "side_bits", "transform", "clip", "lwc_start", "cws", "mac"),
    *("cws_rate", "mac_rate", "mac_tokens", "svd_per", "cws_start", "mac_start", "rounding", "train", "vision", "sites"),
)
FIT_FLAGS = ("epochs", "steps", "batch", "transform_rate", "clip_rate", "loss", "epsilon")


def _add_output(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--out", type=Path, required=required, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")


def _output(options: argparse.Namespace) -> contextlib.AbstractContextManager[Path]:
    return output_folder(
        options.out, options.overwrite, *(getattr(options, name, None) for name in ("model", "reference", "stats"))
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="model folder: Hugging Face's, converted or quantized")
    parser.add_argument(
        "--follow-links", action="store_true", help="allow weights that link out of the folder, as in the hub's cache"
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", default="easy-vqa", help="easy-vqa, or a .jsonl file with image, question and answer a line (default: easy-vqa)"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path.home() / "tensorflow_datasets",
        help="where easy-vqa is built (default: ~/tensorflow_datasets)",
    )


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
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


# --- convert


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``splitq convert``."""
    _add_model(parser)
    _add_output(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the parameters (default: float32)")
    parser.set_defaults(run=convert)


def convert(options: argparse.Namespace) -> None:
    """Convert a Hugging Face folder, a leaf at a time."""
    if models.is_converted(options.model):
        raise InputError(f"{options.model}: is converted or quantized already; give the folder that it was made from, or copy it")
    console = make_console()
    model, params = models.deferred(options.model, dtype=jnp.dtype(options.dtype), follow_links=options.follow_links)
    with _output(options) as folder, progress_bar(console) as bar:
        sq.save(folder / PARAMS, params, config=model.config, progress=bar)
        models.copy_processor(options.model, folder)
    size = quantization.stored_bytes(params)
    console.print(f"Wrote {options.out}: {len(quantization.kernels(params))} linear layers, {size / 1e6:,.1f} MB")


# --- calibrate


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``splitq calibrate``."""
    _add_model(parser)
    _add_output(parser)
    _add_calibration(parser)
    parser.add_argument("--gram", action="store_true", help="also collect X^T X, which GPTQ needs")
    parser.add_argument(
        "--vision-tower", action="store_true", help="also collect maxima for the vision tower, which --vision needs"
    )
    parser.set_defaults(run=calibrate)


def calibrate(options: argparse.Namespace) -> None:
    """Collect and write statistics."""
    setup = _float_setup(options)
    with _output(options) as folder, progress_bar() as bar:
        batches = setup.calibration(options.samples, options.seed)
        stats = _collect(setup, options, batches, options.gram, options.vision_tower, bar)
        # a key may not hold a slash
        sq.save(folder / PARAMS, {path.replace("/", "."): s for path, s in stats.items()}, extra=_provenance(setup, options))
    make_console().print(f"Wrote {options.out}: statistics of {len(stats)} sites from {options.samples} samples")


def _float_setup(options: argparse.Namespace) -> Setup:
    keep_freed_memory()
    setup = Setup.open(options.model, source(options.data, options.data_dir), options.follow_links)
    if _is_quantized(setup.params):
        raise InputError(f"{options.model}: is quantized already; give the float model")
    return setup


def _is_quantized(params: Any) -> bool:
    return any(isinstance(leaf, SplitWeight) for leaf in quantization.kernels(params).values())


def _collect(
    setup: Setup, options: argparse.Namespace, batches: Any, gram: bool, vision: bool, bar: Progress
) -> dict[str, SiteStats]:
    size = SplitSize(options.split_rate, options.split_align)
    flags = {"skip_first": options.skip_first, "gram": gram, "vision_tower": vision}
    return calib.collect(setup.model, setup.params, batches, size, mesh=calib.data_mesh(), progress=bar, **flags)


def _provenance(setup: Setup, options: argparse.Namespace) -> dict[str, Any]:
    names = ("samples", "seed", "split_rate", "split_align", "skip_first")
    # a file by what it says, wherever it lies
    data = options.data if options.data == "easy-vqa" else f"sha256 {hashlib.sha256(Path(options.data).read_bytes()).hexdigest()}"
    return {"data": data} | {name: getattr(options, name) for name in names} | {"weights": fingerprint(setup.params)}


# --- quantize


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``splitq quantize``."""
    _add_model(parser)
    _add_output(parser)
    parser.add_argument("--scheme", default="w4a4", help="wXaY: X-bit weights, Y-bit activations, 16 for none (default: w4a4)")
    parser.add_argument(
        "--method", default="splitq", choices=list(recipe.METHODS), help="a named recipe (default: splitq); further flags change it"
    )
    parser.add_argument("--effort", default="full", choices=list(EFFORTS), help="training of each block (default: full)")
    parser.add_argument("--stats", type=Path, default=None, help="statistics of splitq calibrate; collected here if not given")
    parser.add_argument(
        "--run-folder", type=Path, default=None, help="where finished blocks are kept, to resume (default: OUT.run)"
    )
    _add_calibration(parser)
    add_fields(parser.add_argument_group("recipe"), recipe.Recipe, RECIPE_FLAGS)
    add_fields(parser.add_argument_group("training"), FitConfig, FIT_FLAGS)
    parser.set_defaults(run=quantize)


def quantize(options: argparse.Namespace) -> None:
    """Quantize and write a model."""
    console = make_console()
    size = SplitSize(options.split_rate, options.split_align)
    chosen = recipe.named(options.method, options.scheme).replace(split=size, **given(options, recipe.Recipe))
    config = FitConfig(**(vars(EFFORTS[options.effort]) | given(options, FitConfig)))
    setup = _float_setup(options)
    _print_plan(console, quantization.match(setup.params, chosen))
    runs = options.run_folder or options.out.with_name(f"{options.out.name}.run")
    with _output(options) as folder:
        batches, made_of = setup.calibration(options.samples, options.seed), _provenance(setup, options)
        with progress_bar(console) as bar:
            if options.stats is None:
                stats = _collect(setup, options, batches, chosen.rounding == "gptq", chosen.vision != "float", bar)
            else:
                stats = _restore_stats(options.stats, made_of)
            done = quantized(setup, stats, chosen, config, batches, run_folder=runs, mesh=calib.data_mesh(), progress=bar)
        errors = calib.site_errors(setup.model, setup.params, done.params, batches)
        facts = {"site_errors": errors, "block_errors": [vars(e) for e in done.errors], "training": config, "seconds": done.seconds}
        sq.save(folder / PARAMS, done.params, recipe=chosen, config=setup.model.config, extra=made_of | facts)
        sq.save(folder / CHANNELS, {path.replace("/", "."): s.absmax for path, s in stats.items()})
        models.copy_processor(options.model, folder)
    if chosen.train:
        discard(runs)
    before, after = quantization.stored_bytes(setup.params), quantization.stored_bytes(done.params)
    console.print(_layers(done.params, errors))
    bits = quantization.effective_bits(done.params)
    console.print(
        f"{before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB after; {bits:.2f} bits a quantized weight, all told; {done.seconds:.0f} s"
    )
    console.print(f"Wrote {options.out}")
    record = setup.data.records("train", [0])[0]
    answer = _answer(setup.model, done.params, setup.processor, record["question"], [record["image"]], 16)
    console.print(f"A sample: {record['question']} [bold]{answer}[/bold] (expected: {record['answer']})")


def _print_plan(console: Console, matched: Mapping[str, recipe.Recipe]) -> None:
    for part in dict.fromkeys(matched.values()):
        paths = [path for path, r in matched.items() if r == part]
        console.print(f"{part.method} {part.scheme}: {len(paths)} layers match {', '.join(part.sites)} ({paths[0]} … {paths[-1]})")


def _restore_stats(folder: Path, wanted: Mapping[str, Any]) -> dict[str, SiteStats]:
    tree, manifest = sq.restore(folder / PARAMS)
    found = manifest["extra"] or {}
    if not tree or not all(isinstance(s, SiteStats) for s in tree.values()):
        raise InputError(f"--stats {folder}: holds no statistics; give a folder of splitq calibrate")
    for name, value in wanted.items():
        if found.get(name) != value:
            raise InputError(
                f"--stats {folder}: collected with {name} {found.get(name)}, here it is {value}; collect them anew or give the same"
            )
    return {path.replace(".", "/"): s for path, s in tree.items()}


# --- eval


def add_eval(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``splitq eval``."""
    _add_model(parser)
    _add_data(parser)
    _add_output(parser, required=False)
    parser.add_argument("--reference", type=Path, default=None, help="the float model's folder, for agreement and KL")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"), help="of easy-vqa (default: test)")
    parser.add_argument("--limit", type=int, default=None, help="ask only the first so many questions")
    parser.set_defaults(run=evaluate)


def evaluate(options: argparse.Namespace) -> None:
    """Evaluate a model and print (and write) its row."""
    console = make_console()
    data = source(options.data, options.data_dir)
    setup = Setup.open(options.model, data, options.follow_links)
    questions = setup.questions(options.split, options.limit)
    rows, reference = [], None
    with progress_bar(console) as bar:
        if options.reference is not None:
            model, params = models.load(options.reference, follow_links=options.follow_links)
            if _is_quantized(params):
                raise InputError(f"--reference {options.reference}: is quantized; give the float model")
            reference = evaluation.evaluate(model, params, questions, progress=bar, label="float")
            rows.append(result_row(reference, params, "float", "float", 0, 0.0))
        result = evaluation.evaluate(setup.model, setup.params, questions, reference, progress=bar, label=str(options.model))
    manifest = options.model / PARAMS / "manifest.json"
    made = (read_manifest(manifest.parent) if manifest.is_file() else {}).get("recipe") or {}
    method, scheme = made.get("method", "float"), made.get("scheme", "float")
    if rows and (method, scheme) == ("float", "float"):
        method = "float (MODEL)"
    rows.append(result_row(result, setup.params, method, scheme, made.get("seed", 0), 0.0))
    console.print(evaluation.table(rows))
    if options.out is not None:
        facts = {"model": str(options.model), "reference": str(options.reference), "data": options.data, "split": options.split}
        with _output(options) as folder:
            evaluation.write(evaluation.Report(f"{method} {scheme} on {options.data}", facts, tuple(rows)), folder)
        console.print(f"Wrote {options.out}")


# --- generate


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``splitq generate``."""
    _add_model(parser)
    parser.add_argument("question", help="what to ask")
    parser.add_argument("--image", action="append", default=[], help="an image file; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="a bound on the answer (default: 64)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token, 1 draws as the model says (default: 0)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest tokens that reach this share (default: 1)"
    )
    parser.add_argument("--top-k", type=int, default=None, help="draw from the so many likeliest tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument(
        "--kv-bits", type=int, default=16, choices=(8, 16), help="of kept keys and values; 16: unrounded (default: 16)"
    )
    parser.add_argument("--stream", action="store_true", help="print the answer as it is made")
    parser.set_defaults(run=generate)


def generate(options: argparse.Namespace) -> None:
    """Print the answer to a question."""
    processor = models.Processor.from_folder(options.model)
    images = [models.open_image(path) for path in options.image]
    model, params = models.load(options.model, follow_links=options.follow_links)
    numbers = {name: getattr(options, name) for name in ("temperature", "top_p", "top_k", "seed", "kv_bits")}
    shown = _Shown(processor.tokenizer) if options.stream else None
    numbers["on_token"] = shown
    answer = _answer(model, params, processor, options.question, images, options.max_new_tokens, **numbers)
    print(answer if shown is None else shown.rest(answer))


class _Shown:
    """Prints an answer token by token."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.text = tokenizer, ""
        self.tokens: list[int] = []

    def __call__(self, tokens: np.ndarray) -> None:
        """Take the next token and print what is certain by now: half a character may wait for its other half."""
        self.tokens += [int(t) for t in tokens if t >= 0]
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True).lstrip()
        if text.startswith(self.text) and text == text.rstrip() and not text.endswith("\ufffd"):
            print(text[len(self.text) :], end="", flush=True)
            self.text = text

    def rest(self, answer: str) -> str:
        """Return what is not printed yet."""
        return answer[len(self.text) :] if answer.startswith(self.text) else f"\n{answer}"


def _answer(
    model: Any, params: Any, processor: models.Processor, question: str, images: list[Any], room: int, **numbers: Any
) -> str:
    (tokens,) = models.generate(model, params, processor.inputs(question, images), room, processor.stop_ids, **numbers)
    return processor.decode(tokens)


# --- inspect


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``splitq inspect``."""
    parser.add_argument("model", type=Path, help="a quantized model's folder")
    parser.add_argument(
        "--plots", type=Path, default=None, help="folder for a plot (SVG) of each site's per-channel maxima, split channels marked"
    )
    parser.set_defaults(run=inspect)


def inspect(options: argparse.Namespace) -> None:
    """Show a quantized model layer by layer."""
    params, manifest = sq.restore(options.model / PARAMS)
    if manifest["recipe"] is None:
        raise InputError(f"{options.model}: is not quantized; run splitq quantize first")
    console = make_console()
    made = manifest["recipe"]
    console.print(f"{made['method']} {made['scheme']}, seed {made['seed']}; written with {manifest['versions']}")
    console.print(_layers(params, (manifest["extra"] or {}).get("site_errors", {})))
    console.print(
        f"{quantization.stored_bytes(params) / 1e6:,.1f} MB; {quantization.effective_bits(params):.2f} bits a quantized weight, all told"
    )
    if options.plots is not None:
        maxima, _ = sq.restore(options.model / CHANNELS)
        leaves = quantization.kernels(params)
        plots = {
            name: channel_maxima(channels_of(path, np.asarray(absmax), leaves[path]))
            for name, absmax in maxima.items()
            if (path := name.replace(".", "/")) in leaves
        }
        try:
            options.plots.mkdir(parents=True, exist_ok=True)
            for name, svg in plots.items():
                (options.plots / f"{name}.svg").write_text(svg, encoding="utf-8")
        except OSError as e:
            raise InputError(f"--plots {options.plots}: cannot be written ({e.strerror}); give another folder") from None
        console.print(f"Wrote {len(plots)} plots to {options.plots}")


def _layers(params: Any, errors: Mapping[str, float]) -> Table:
    table = Table("Layer", "Shape", "Bits", "Groups", "Ranks", "KB", "Bits/weight", "Error", box=None, padding=(0, 2, 0, 0))
    for s in quantization.summarize(params):
        groups, ranks = " + ".join(map(str, s.groups)), f"{s.ranks[0]}, {s.ranks[1]}"
        error = f"{100 * errors[s.path]:.2f} %" if s.path in errors else "–"
        scheme = f"W{s.bits[0]}A{s.bits[1]}" + (f" g{s.scale_rows}" if s.scale_rows < s.groups[0] else "")
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


# --- demo


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``splitq demo``."""
    flags = ("out", "scheme", "method", "effort", "rounding", "limit", "size", "samples", "seed", "model_seed", "base")
    add_fields(parser, DemoConfig, flags)
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    parser.set_defaults(run=lambda options: run_demo(DemoConfig(**given(options, DemoConfig))))

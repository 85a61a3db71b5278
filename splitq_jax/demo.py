"""`splitq demo`: the main job in one go, on a VLM that is small and real."""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import splitq_jax as sq
from splitq_jax import calib, demo_model, models, recipe
from splitq_jax import eval as evaluation
from splitq_jax.calib import easy_vqa
from splitq_jax.calib.reconstruction import EFFORTS
from splitq_jax.errors import InputError
from splitq_jax.linear import SplitWeight
from splitq_jax.mocd import TEXT, VISION, SiteStats
from splitq_jax.pipeline import Params, Setup, quantized, result_row
from splitq_jax.quantization import kernels

BASELINES = ("rtn", "smoothquant", "flatquant", "random-channels")
SHOWN_SITES = ("qkv", "down")


@dataclass(frozen=True)
class DemoConfig:
    """The demo's flags.

    Attributes:
      out: folder to write.
      scheme: weight and activation bits.
      method: what the checkpoint holds; the baselines are evaluated beside it.
      effort: training of each block.
      limit: test questions; None for all 9,673.
      size: ``demo`` (8 blocks) or ``smolvlm`` (30).
      samples: calibration images.
      seed: of the calibration.
      model_seed: which trained demo.
      base: SmolLM2 folder; None for the package.
      overwrite: replace ``out``.
    """

    out: Path = Path("splitq-demo")
    scheme: str = "w4a4"
    method: str = "splitq"
    effort: str = "light"
    limit: int | None = 1000
    size: str = "demo"
    samples: int = 128
    seed: int = 0
    model_seed: int = 0
    base: Path | None = None
    overwrite: bool = False


def progress_bar(console: Console) -> Progress:
    """Return the bar that all commands show."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def run(config: DemoConfig) -> Path:
    """Build, calibrate, quantize, evaluate, report, answer.

    Raises:
      InputError: bad flags; an output that exists without ``overwrite``; packages that are missing.
    """
    began, console = time.monotonic(), Console()
    names = [n for n in (*BASELINES, config.method) if n != config.method] + [config.method]
    chosen = [recipe.named(name, config.scheme).replace(seed=config.seed) for name in names]
    if config.effort not in EFFORTS:
        raise InputError(f"--effort {config.effort!r}: expected one of {', '.join(EFFORTS)}")
    out = fresh_folder(config.out, config.overwrite)
    console.print(f"Building the demo VLM ({demo_model.SIZES[config.size]} blocks of SmolLM2-135M) in {out / 'model'}")
    demo_model.build(config.size, out / "model", seed=config.model_seed, base=config.base)
    setup = Setup(*models.load(out / "model"), models.Processor.from_folder(out / "model"), out / "data")
    test = setup.questions("test", config.limit)
    samples = setup.calibration(config.samples, config.seed)
    with progress_bar(console) as bar:
        reference = evaluation.evaluate(setup.model, setup.params, test, progress=bar, label="float: evaluating")
        rows = [result_row(reference, setup.params, "float", "float", config.seed, 0.0)]
        start = time.monotonic()
        stats = calib.collect(setup.model, setup.params, samples, chosen[-1].split, gram=config.method == "gptq", progress=bar)
        collecting = time.monotonic() - start
        held_out = setup.calibration(32, config.seed, "validation")
        for part in chosen:
            done = quantized(setup, stats, part, EFFORTS[config.effort], samples, held_out=held_out, progress=bar)
            label = f"{part.method} {part.scheme}: evaluating"
            result = evaluation.evaluate(setup.model, done.params, test, reference, progress=bar, label=label)
            rows.append(result_row(result, done.params, part.method, part.scheme, config.seed, collecting + done.seconds))
    console.print(evaluation.table(rows))
    extra = {"model": config.size, "seed": config.seed, "block_errors": [vars(e) for e in done.errors]}
    sq.save(out / "quantized" / "params", done.params, recipe=chosen[-1], config=setup.model.config, extra=extra)
    models.copy_processor(out / "model", out / "quantized")
    answers = sample_answers(setup, done.params)
    for answer in answers:
        console.print(f"{answer.question}  [bold]{answer.said[config.method]}[/bold]  (float: {answer.said['float']}, true: {answer.answer})")
    report = evaluation.Report(
        title=f"SplitQ demo: {config.scheme.upper()} on easy-VQA",
        facts=facts(config, time.monotonic() - began),
        rows=tuple(rows),
        channels=tuple(shown_channels(stats, done.params)),
        samples=tuple(answers),
    )
    _, page = evaluation.write(report, out)
    console.print(f"Wrote {out / 'quantized'} and {page} in {time.monotonic() - began:.0f} s")
    return out


def fresh_folder(out: Path, overwrite: bool) -> Path:
    """Return an empty folder; an existing one is refused, or emptied if it is a demo's and ``overwrite`` is given."""
    import shutil

    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise InputError(f"--out {out}: exists; give another folder or --overwrite")
        if not (out / "report.json").exists() and not (out / "model").exists():
            raise InputError(f"--out {out}: exists and is not a demo's output; it is left alone; give another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    return out


def sample_answers(setup: Setup, params: Params, count: int = 3) -> list[evaluation.Sample]:
    """Let the float and the quantized model answer ``count`` test questions about different images."""
    found = easy_vqa.records(setup.data_dir, "test", range(count))
    firsts = {r["image_id"]: r for r in reversed(found)}
    shown = [firsts[i] for i in sorted(firsts)]
    batch = setup.processor([r["question"] for r in shown], [r["image"] for r in shown])
    said = {}
    for name, tree in (("float", setup.params), ("quantized", params)):
        tokens = models.generate(setup.model, tree, batch, 8, stop_ids=(setup.processor.tokenizer.eos_token_id,))
        said[name] = [setup.processor.tokenizer.decode(t, skip_special_tokens=True).strip() for t in tokens]
    return [
        evaluation.Sample(r["image"], r["question"], r["answer"], {name: texts[i] for name, texts in said.items()})
        for i, r in enumerate(shown)
    ]


def shown_channels(stats: dict[str, SiteStats], params: Params) -> list[evaluation.Channels]:
    """Return the per-channel maxima of a middle block's sites and the channels that its leaves split off."""
    leaves = kernels(params)
    middle = len({path.split("/")[1] for path in leaves if path.startswith("decoder/blocks_")}) // 2
    out = []
    for name in SHOWN_SITES:
        path = f"decoder/blocks_{middle}/{name}"
        leaf, site = leaves[path], stats[path]
        out.append(channels_of(path, site, leaf))
    return out


def channels_of(path: str, site: SiteStats, leaf: Any) -> evaluation.Channels:
    """Return one site's maxima and its split."""
    text = vision = np.zeros(0, np.int32)
    if isinstance(leaf, SplitWeight) and leaf.perm is not None:
        perm, sizes = np.asarray(leaf.perm), [g.w.rows for g in leaf.groups]
        text, vision = perm[sizes[0] : sizes[0] + sizes[1]], perm[sizes[0] + sizes[1] :]
    maxima = np.asarray(site.absmax)
    return evaluation.Channels(path, maxima[VISION], maxima[TEXT], vision, text)


def facts(config: DemoConfig, seconds: float) -> dict[str, Any]:
    """Return what is needed to do it again."""
    command = f"splitq demo --size {config.size} --scheme {config.scheme} --method {config.method} --effort {config.effort}"
    command += f" --samples {config.samples} --seed {config.seed}" + (f" --limit {config.limit}" if config.limit else " --limit 0")
    return {
        "model": f"SmolLM2-135M-Instruct, {demo_model.SIZES[config.size]} blocks, with an image encoder trained on easy-VQA",
        "data": "easy-VQA, test split",
        "calibration": f"{config.samples} images, seed {config.seed}",
        "command": command,
        "versions": f"jax {jax.__version__}, Python {platform.python_version()}",
        "device": jax.devices()[0].device_kind,
        "seconds": round(seconds),
        "settings": json.loads(json.dumps(vars(config), default=str)),
    }


__all__: Sequence[str] = ["DemoConfig", "run"]

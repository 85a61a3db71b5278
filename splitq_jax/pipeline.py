"""What the demo, the command line and the benchmarks share: batches for a model, and one method from calibration to result."""

import ctypes
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from rich.progress import Progress

from splitq_jax import calib, models, quantization, summary
from splitq_jax import eval as evaluation
from splitq_jax.calib.easy_vqa import EasyVqa
from splitq_jax.calib.jsonl import Jsonl
from splitq_jax.calib.reconstruction import BlockError, FitConfig
from splitq_jax.calib.run import Run, fingerprint
from splitq_jax.errors import InputError
from splitq_jax.eval.easy_vqa import Batch, Example, Prompt, examples, pack, split
from splitq_jax.linear import SplitWeight
from splitq_jax.mocd import TEXT, VISION, SiteStats
from splitq_jax.recipe import Recipe

Params = dict[str, Any]
MANY = 2000  # questions, from which on several lengths of rows save more in padding than they cost in compilation
MALLOPT = ((-4, 0), (-1, 2**31 - 1), (-8, 1))  # glibc's M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
CHANNELS = "channels"  # the per-channel maxima beside a quantized model's parameters


class Source(Protocol):
    """Questions with images: `EasyVqa` or `Jsonl`."""

    def count(self, split: str) -> int:
        """Return the number of a split's images."""

    def records(self, split: str, images: Iterable[int] | None = None) -> list[dict[str, Any]]:
        """Return one record a question."""


def source(data: str, data_dir: Path) -> Source:
    """Return ``easy-vqa``, built under ``data_dir``, or the JSON-lines file of that name.

    Raises:
      InputError: neither.
    """
    if data == "easy-vqa":
        return EasyVqa(data_dir)
    if data.endswith((".jsonl", ".json")):
        return Jsonl(data)
    raise InputError(f"--data {data!r}: expected easy-vqa or a .jsonl file")


def run_folder(out: Path) -> Path:
    """Return where the finished blocks of what becomes ``out`` are kept, beside it."""
    target = out.resolve()
    return target.with_name(f"{target.name}.run")


def by_key(of_sites: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree that can be saved, of what is known of sites by their paths: a key may not hold a slash."""
    return {path.replace("/", "."): value for path, value in of_sites.items()}


def by_path(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `by_key`."""
    return {key.replace(".", "/"): value for key, value in tree.items()}


def keep_freed_memory() -> None:
    """Let this process keep what it frees, where the C library is glibc.

    XLA's CPU buffers are large and short-lived: each would come from the system anew, page by page, a seventh of training's time, and
    threads with heaps of their own would hold more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in MALLOPT:
            mallopt(parameter, value)


@dataclass(frozen=True)
class Setup:
    """A model and its data.

    Attributes:
      model: the Flax model.
      params: its parameters.
      processor: the folder's tokenizer and image arithmetic.
      data: questions with images.
    """

    model: Any
    params: Params
    processor: models.Processor
    data: Source

    @classmethod
    def open(
        cls, folder: Path, data: Source, follow_links: bool = False, *, mesh: Mesh | None = None, on_host: bool = False
    ) -> "Setup":
        """Load a model folder (see `models.load`)."""
        model, params = models.load(folder, mesh=mesh, follow_links=follow_links, on_host=on_host)
        return cls(model, params, models.Processor.from_folder(folder), data)

    def batches(self, records: Sequence[Mapping[str, Any]], batch_size: int, lengths: int = 1) -> list[Batch]:
        """Pack questions behind their images (see `splitq_jax.eval.easy_vqa.pack`)."""
        packed = pack(examples(records), self.prompt, self.processor.vision, batch_size=batch_size, lengths=lengths)
        # what has three positions a token computes them from the pictures
        left_out = {"positions"} if self.model.config.text.ropes[0].axes > 1 else set()
        return [{k: v for k, v in batch.items() if k not in left_out} for batch in packed]

    def prompt(self, example: Example) -> Prompt:
        """Return a question's tokens, split behind its image."""
        asked, told = self.processor.exchange(example.question, example.image, example.answer)
        return split(asked, told, self.model.config.placeholders, self.processor.stop_ids)

    def questions(self, split: str, limit: int = 0) -> list[Batch]:
        """Return the questions of a split, the first ``limit`` of them; 0 for all.

        Raises:
          InputError: a negative limit.
        """
        if limit < 0:
            raise InputError(f"--limit {limit}: expected a number of questions, or 0 for all")
        images = range(min(limit, self.data.count(split))) if limit else None
        records = self.data.records(split, images)[: limit or None]
        return self.batches(records, 16, 3 if len(records) >= MANY else 1)

    def calibration(self, samples: int, seed: int, split: str = "train") -> list[Batch]:
        """Draw ``samples`` images without replacement and one question with its answer for each.

        Raises:
          InputError: more samples than images; a negative seed.
        """
        if seed < 0:
            raise InputError(f"--seed {seed}: expected 0 or more")
        count = self.data.count(split)
        if not 1 <= samples <= count:
            raise InputError(f"--samples {samples}: the set has {count} images; expected 1 to {count}")
        rng = np.random.default_rng((seed, samples))
        chosen = rng.choice(count, samples, replace=False)
        by_image: dict[int, list[dict[str, Any]]] = {}
        for record in self.data.records(split, chosen):
            by_image.setdefault(record["image_id"], []).append(record)
        drawn = [group[rng.integers(len(group))] for group in by_image.values()]
        # no batch is filled up with copies, which would count as samples
        whole = max(size for size in range(1, 17) if samples % size == 0)
        return [inputs(batch) for batch in self.batches(drawn, whole)]


def inputs(batch: Batch) -> Batch:
    """Leave the labels out."""
    return {k: v for k, v in batch.items() if k not in {"targets", "question"}}


@dataclass(frozen=True)
class Outcome:
    """A quantized model and what it cost.

    Attributes:
      params: the frozen tree.
      errors: of the blocks (see `calib.fit`).
      seconds: to quantize and train.
    """

    params: Params
    errors: list[BlockError]
    seconds: float


def quantized(
    setup: Setup,
    stats: Mapping[str, SiteStats],
    recipe: Recipe,
    config: FitConfig,
    batches: Sequence[Batch],
    *,
    held_out: Sequence[Batch] | None = (),
    run_folder: Path | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Prepare, train and freeze one recipe.

    Args:
      setup: the float model.
      stats: `calib.collect`'s.
      recipe: what to do.
      config: how to train.
      batches: the calibration set.
      held_out: what the blocks' errors are measured on (see `calib.fit`).
      run_folder: where finished blocks are kept until the end, to resume an interrupted run; None keeps nothing.
      mesh: devices to share the samples (axis ``data``).
      progress: a rich progress bar to add tasks to.

    Raises:
      InputError: what `prepare` and `fit` refuse; a folder of a different run.
    """
    start = time.monotonic()
    prepared = quantization.prepare(setup.params, stats, recipe)
    errors: list[BlockError] = []
    if recipe.train:
        run = None
        if run_folder is not None:
            # statistics choose the channels; Gram matrices train nothing
            scores = {path: replace(s, gram=None) for path, s in stats.items()}
            run = Run(run_folder, fingerprint(setup.params, scores, list(batches), recipe, config, jax.__version__))
        try:
            prepared, errors = calib.fit(
                *(setup.model, setup.params, prepared, batches, config), held_out=held_out, run=run, mesh=mesh, progress=progress
            )
        finally:
            if run is not None:
                run.close()
    frozen = quantization.freeze(prepared, recipe)
    jax.block_until_ready(frozen)
    return Outcome(frozen, errors, time.monotonic() - start)


def result_row(
    result: evaluation.Result, params: Params, method: str, scheme: str, seed: int, seconds: float | None
) -> evaluation.Row:
    """Return the table's row of an evaluated tree; of a float tree with its own bits a weight."""
    bits, kernel = summary.effective_bits(params), next(iter(quantization.kernels(params).values()))
    return evaluation.row_of(
        result,
        method=method,
        scheme=scheme,
        seed=seed,
        effective_bits=8.0 * kernel.dtype.itemsize if np.isnan(bits) else bits,
        size=summary.stored_bytes(params),
        seconds=seconds,
    )


def channels_of(path: str, absmax: np.ndarray, leaf: Any) -> evaluation.Channels:
    """Return one site's maxima per channel, ``absmax`` of shape (3, D), and the channels that its leaf splits off."""
    text = vision = np.zeros(0, np.int32)
    if isinstance(leaf, SplitWeight) and leaf.perm is not None:
        perm, sizes = np.asarray(leaf.perm), [g.w.rows for g in leaf.groups]
        text, vision = perm[sizes[0] : sizes[0] + sizes[1]], perm[sizes[0] + sizes[1] :]
    return evaluation.Channels(path, absmax[VISION], absmax[TEXT], vision, text)

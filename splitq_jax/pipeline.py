"""What `demo`, the command line and the benchmarks share: easy-VQA batches for a model, and one method from calibration to result."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import Progress

from splitq_jax import calib, quantization
from splitq_jax import eval as evaluation
from splitq_jax.calib import easy_vqa
from splitq_jax.calib.reconstruction import BlockError, FitConfig
from splitq_jax.errors import InputError
from splitq_jax.eval.easy_vqa import Batch, examples, packed_batches
from splitq_jax.mocd import SiteStats
from splitq_jax.recipe import Recipe

Params = dict[str, Any]
CALIBRATION_LENGTH = 96  # tokens of a calibration sample: image, one question, its answer
EVALUATION_LENGTHS = (224, 288, 416)


@dataclass(frozen=True)
class Setup:
    """A float model and its data.

    Attributes:
      model: the Flax model.
      params: its float parameters.
      processor: the folder's tokenizer and image arithmetic.
      data_dir: where easy-VQA is built.
    """

    model: Any
    params: Params
    processor: Any
    data_dir: Path

    def batches(self, records: Sequence[Mapping[str, Any]], batch_size: int, lengths: Sequence[int]) -> list[Batch]:
        """Pack questions behind their images (see `splitq_jax.eval.packed_batches`)."""
        return packed_batches(
            examples(records),
            self.processor.tokenizer,
            self.processor.pixels,
            image_token=self.processor.image_token,
            image_length=self.model.config.tokens_per_image,
            batch_size=batch_size,
            lengths=lengths,
        )

    def questions(self, split: str, limit: int | None) -> list[Batch]:
        """Return the questions of the first images of a split, at least ``limit`` of them unless the split has fewer; None: all.

        Whole images are taken, so that packing stays dense; the surplus is cut off.
        """
        if limit is None:
            records = easy_vqa.records(self.data_dir, split)
        else:
            if limit < 1:
                raise InputError(f"--limit {limit}: expected at least one question")
            records = easy_vqa.records(self.data_dir, split, range(min(-(-limit // 2), _images(split))))[:limit]
        return self.batches(records, 16, EVALUATION_LENGTHS)

    def calibration(self, samples: int, seed: int, split: str = "train") -> list[Batch]:
        """Draw ``samples`` images without replacement and one question with its answer for each.

        Raises:
          InputError: more samples than images.
        """
        if not 1 <= samples <= _images(split):
            raise InputError(f"--samples {samples}: easy-VQA {split} has {_images(split)} images; expected 1 to {_images(split)}")
        rng = np.random.default_rng((seed, samples))
        chosen = rng.choice(_images(split), samples, replace=False)
        by_image: dict[int, list[dict[str, Any]]] = {}
        for record in easy_vqa.records(self.data_dir, split, chosen):
            by_image.setdefault(record["image_id"], []).append(record)
        drawn = [group[rng.integers(len(group))] for group in by_image.values()]
        batches = self.batches(drawn, min(16, samples), (CALIBRATION_LENGTH,))
        return [inputs(batch) for batch in batches]


def inputs(batch: Batch) -> Batch:
    """Leave the labels out."""
    return {k: v for k, v in batch.items() if k not in {"targets", "question"}}


def _images(split: str) -> int:
    return {"train": easy_vqa.TRAIN_IMAGES, "validation": 400, "test": 1000}[split]


@dataclass(frozen=True)
class Outcome:
    """A quantized model and what it cost.

    Attributes:
      params: the frozen tree.
      errors: the blocks' held-out errors.
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
    held_out: Sequence[Batch] = (),
    run: Any = None,
    progress: Progress | None = None,
) -> Outcome:
    """Prepare, train and freeze one recipe."""
    start = time.monotonic()
    prepared = quantization.prepare(setup.params, stats, recipe)
    errors: list[BlockError] = []
    if recipe.train:
        prepared, errors = calib.fit(
            setup.model, setup.params, prepared, batches, config, held_out=held_out, run=run, progress=progress
        )
    frozen = quantization.freeze(prepared, recipe)
    jax.block_until_ready(frozen)
    return Outcome(frozen, errors, time.monotonic() - start)


def result_row(
    result: evaluation.Result, params: Params, method: str, scheme: str, seed: int, seconds: float
) -> evaluation.Row:
    """Return the table's row of an evaluated tree; a float tree stores 32 bits a weight."""
    bits = quantization.effective_bits(params)
    return evaluation.row_of(
        result,
        method=method,
        scheme=scheme,
        seed=seed,
        effective_bits=32.0 if np.isnan(bits) else bits,
        size=quantization.stored_bytes(params),
        seconds=seconds,
    )

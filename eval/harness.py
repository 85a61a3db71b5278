"""Scores a model on questions whose answers are known, by teacher forcing, and measures what it lost against a reference.

Several questions are packed behind one image. With the gold answer as input, every answer token (the end token too) is the
argmax at its position if and only if greedy generation gives exactly that answer; so one forward pass scores all questions.
Blocks run one after another through one compiled function, and only the answers' positions meet the vocabulary.
"""

import time
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from rich.progress import Progress

from splitq_jax.errors import InputError
from splitq_jax.eval.metrics import kl_divergence, perplexity, wilson
from splitq_jax.kernels.layout import native
from splitq_jax.output import counter
from splitq_jax.quantization import without_blocks
from splitq_jax.sharding import on_mesh_of

Batch = Mapping[str, np.ndarray]
Params = dict[str, Any]
LABELS = ("targets", "question")  # what a batch holds beyond the model's input


@dataclass(frozen=True)
class Result:
    """What a model made of Q questions, whose answers have T tokens.

    Attributes:
      question: the questions' numbers, ascending.
      correct: whether the whole answer is what greedy generation gives.
      first_correct: whether the first token of the answer is.
      token_question: the question of each answer token; tokens in the order in which they were read.
      predicted: the argmax at each answer token, given the gold answer before it.
      log_prob: log-probability of each answer token.
      kl: ``KL(reference || model)`` at each answer token, in nats.
      agrees: whether all of a question's ``predicted`` are the reference's.
      seconds: wall time, compilation included.
      hidden: what entered the final norm at each answer token. It stands for the distribution over the vocabulary, which would
        be some hundred times as large; a later run recomputes that with ``outer``.
      outer: the parameters outside the blocks.
    """

    question: Int[np.ndarray, " Q"]
    correct: Bool[np.ndarray, " Q"]
    first_correct: Bool[np.ndarray, " Q"]
    token_question: Int[np.ndarray, " T"]
    predicted: Int[np.ndarray, " T"]
    log_prob: Float[np.ndarray, " T"]
    kl: Float[np.ndarray, " T"]
    agrees: Bool[np.ndarray, " Q"]
    seconds: float
    hidden: Float[np.ndarray, "T D"] = field(repr=False)
    outer: Params = field(repr=False)

    @property
    def accuracy(self) -> float:
        """Share of questions answered exactly."""
        return float(np.mean(self.correct))

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        return wilson(int(np.sum(self.correct)), self.correct.size)

    @property
    def first_accuracy(self) -> float:
        """Share of questions whose answer starts right."""
        return float(np.mean(self.first_correct))

    @property
    def agreement(self) -> float:
        """Share of questions on which the model says what the reference says, right or wrong."""
        return float(np.mean(self.agrees))

    @property
    def mean_kl(self) -> float:
        """Mean KL divergence from the reference, in nats an answer token."""
        return float(np.mean(self.kl, dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """Perplexity of the answers' tokens."""
        return perplexity(self.log_prob)


def evaluate(
    model: Any,
    params: Params,
    batches: Iterable[Batch],
    reference: Result | None = None,
    *,
    progress: Progress | None = None,
    label: str = "evaluating",
) -> Result:
    """Score a model.

    Args:
      model: the Flax model (``prepare``, ``embed``, ``block``, ``unembed``), hashable, so that its compiled functions are kept between calls.
      params: its parameters; kernels may be typed leaves.
      batches: the model's input with ``targets`` (B, L), the id of the answer token that a position predicts or -1, and
        ``question`` (B, L), the number of the question that it answers. All tokens of a question lie in one row.
      reference: the result of the float model on the same batches; None compares the model with itself.
      progress: a rich progress bar to add a task to.
      label: the task's name.

    Returns:
      What the model made of each question and of each token of the answers.

    Raises:
      InputError: no question; batches without labels or other than the reference's; a question in two places; logits that are
        not finite.
    """
    start = time.monotonic()
    total = len(batches) if isinstance(batches, Sized) else None
    count_batch = counter(progress, label, total)
    parts: list[dict[str, np.ndarray]] = []
    seen = 0
    with on_mesh_of(params):
        params = native(params)
        outer = without_blocks(params)  # one compiled `embed` and `unembed` serve every kind of quantized block
        for number, batch in enumerate(batches):
            rows = _answers(batch, number)
            compared = None
            if reference is not None:
                compared = _reference_rows(reference, rows, seen, number)
            x = _forward(model, params, outer, batch)
            part = _score(model, outer, x, rows.at, rows.target, compared, reference and reference.outer)
            kept = {k: np.asarray(v)[rows.used] for k, v in part.items()}  # T ...
            if not np.isfinite(kept["log_prob"]).all():
                raise InputError(f"evaluation: batch {number}: log-probabilities are not finite; check the weights and scales")
            parts.append(kept | {"question": rows.question[rows.used], "target": rows.target[rows.used]})
            seen += int(rows.used.sum())
            count_batch()
    if not seen:
        raise InputError("evaluation: no question with an answer; give at least one")
    if reference is not None and seen != reference.token_question.size:
        raise InputError(f"evaluation: {seen} answer tokens, the reference has {reference.token_question.size}; use its batches")
    joined = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    return _result(joined, outer, time.monotonic() - start)


@dataclass(frozen=True)
class _Rows:
    """The answers of a batch, A to a row at most: positions, targets, questions, and which of them are no padding."""

    at: Int[np.ndarray, "B A"]
    target: Int[np.ndarray, "B A"]
    question: Int[np.ndarray, "B A"]
    used: Bool[np.ndarray, "B A"]


def _answers(batch: Batch, number: int) -> _Rows:
    missing = [k for k in LABELS if k not in batch]
    if missing:
        raise InputError(f"evaluation: batch {number} has {sorted(batch)}, expected {' and '.join(missing)} as well")
    answers = batch["targets"] >= 0  # B L
    width = max(1, -(-int(answers.sum(axis=1).max()) // 16) * 16)  # few widths, few compilations
    at = np.argsort(~answers, axis=1, kind="stable")[:, :width]  # B A: the answers' positions first, in order
    at = np.pad(at, ((0, 0), (0, max(0, width - at.shape[1]))))
    used = np.arange(width) < answers.sum(axis=1, keepdims=True)
    target, question = (np.take_along_axis(batch[k], at, axis=1) for k in LABELS)
    return _Rows(at.astype(np.int32), np.where(used, target, 0).astype(np.int32), question, used)


def _reference_rows(reference: Result, rows: _Rows, seen: int, number: int) -> Float[np.ndarray, "B A D"]:
    """Spread the reference's hidden states over the batch's answers."""
    part = slice(seen, seen + int(rows.used.sum()))
    if not np.array_equal(reference.token_question[part], rows.question[rows.used]):
        raise InputError(f"evaluation: batch {number} holds other questions than the reference's; use the same batches")
    hidden = np.zeros((*rows.at.shape, reference.hidden.shape[1]), reference.hidden.dtype)
    hidden[rows.used] = reference.hidden[part]
    return hidden


def _forward(model: Any, params: Params, outer: Params, batch: Batch) -> Float[Array, "B L D"]:
    x, context = _embed(model, outer, model.prepare({k: v for k, v in batch.items() if k not in LABELS}))
    for i in range(model.config.num_layers):
        x = context.add_deepstack(i, _block(model.block(i), params["decoder"][f"blocks_{i}"], x, context))
    return x


@partial(jax.jit, static_argnames="model")
def _embed(model: Any, outer: Params, batch: dict[str, Array]) -> tuple[Float[Array, "B L D"], Any]:
    out = model.apply({"params": outer}, **batch, method="embed")
    return out.x, out.context


@partial(jax.jit, static_argnames="block")
def _block(block: Any, params: Params, x: Float[Array, "B L D"], context: Any) -> Float[Array, "B L D"]:
    y: Array = block.apply({"params": params}, x, context)
    return y


@partial(jax.jit, static_argnames="model")
def _score(
    model: Any,
    outer: Params,
    x: Float[Array, "B L D"],
    at: Int[Array, "B A"],
    target: Int[Array, "B A"],
    reference: Float[Array, "B A D"] | None,
    reference_outer: Params | None,
) -> dict[str, Array]:
    def log_probabilities(p: Params, h: Float[Array, "B A D"]) -> Float[Array, "B A V"]:
        return jax.nn.log_softmax(model.apply({"params": p}, h, method="unembed"))

    hidden = jnp.take_along_axis(x, at[..., None], axis=1)  # B A D
    log_q = log_probabilities(outer, hidden)
    log_p = log_q if reference is None else log_probabilities(reference_outer or outer, reference)
    predicted = jnp.argmax(log_q, axis=-1)
    return {
        "hidden": hidden,
        "predicted": predicted,
        "log_prob": jnp.take_along_axis(log_q, target[..., None], axis=-1)[..., 0],
        "kl": kl_divergence(log_p, log_q),
        "agrees": jnp.argmax(log_p, axis=-1) == predicted,
    }


def _result(tokens: dict[str, np.ndarray], outer: Params, seconds: float) -> Result:
    """Gather tokens, in the order in which they were read, into questions."""
    question = tokens["question"]
    starts = np.flatnonzero(np.diff(question, prepend=question[0] - 1))
    order = np.argsort(question[starts])
    numbers = question[starts][order]
    if repeated := numbers[:-1][numbers[:-1] == numbers[1:]].tolist():
        raise InputError(f"evaluation: question {repeated[0]} has its answer in two places; give every question its own number")
    right = tokens["predicted"] == tokens["target"]
    return Result(
        question=numbers,
        correct=np.logical_and.reduceat(right, starts)[order],
        first_correct=right[starts][order],
        token_question=question,
        predicted=tokens["predicted"],
        log_prob=tokens["log_prob"],
        kl=tokens["kl"],
        agrees=np.logical_and.reduceat(tokens["agrees"], starts)[order],
        seconds=seconds,
        hidden=tokens["hidden"],
        outer=outer,
    )

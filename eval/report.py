"""What a run found: one row a method, scheme and seed; means over seeds; the table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from rich.box import SIMPLE
from rich.table import Table

from splitq_jax.errors import InputError
from splitq_jax.eval.harness import Result
from splitq_jax.eval.metrics import wilson

FLOAT = "float"  # the scheme of the row that nothing was taken from


@dataclass(frozen=True)
class Row:
    """One method at one scheme with one calibration seed.

    Attributes:
      method: ``float``, ``rtn``, ``splitq``, …
      scheme: ``w4a4``, …; ``float`` for the float model.
      seed: of the calibration.
      questions: how many were asked.
      accuracy: share answered exactly.
      interval: Wilson's 95 % interval of it.
      first_accuracy: share whose first answer token is right.
      agreement: share on which the model says what the float model says; None where it was not compared.
      kl: mean ``KL(float || model)`` on the answers' tokens, nats; None likewise.
      perplexity: of the answers' tokens.
      effective_bits: bits per quantized weight: codes, scales, transforms, branches.
      bytes: of the parameter tree.
      seconds: to collect statistics, quantize and train; None where that is not known.
      evaluation_seconds: to answer the questions.
    """

    method: str
    scheme: str
    seed: int
    questions: int
    accuracy: float
    interval: tuple[float, float]
    first_accuracy: float
    agreement: float | None
    kl: float | None
    perplexity: float
    effective_bits: float
    bytes: int
    seconds: float | None
    evaluation_seconds: float


@dataclass(frozen=True)
class Sample:
    """An image (H, W, 3, uint8), a question about it, its answer, and what each model said."""

    image: Any
    question: str
    answer: str
    said: Mapping[str, str]


@dataclass(frozen=True)
class Channels:
    """One site's largest magnitude per input channel, by modality, and the channels that were split off."""

    site: str
    vision: Float[np.ndarray, " D"]
    text: Float[np.ndarray, " D"]
    vision_chosen: Int[np.ndarray, " Kv"]
    text_chosen: Int[np.ndarray, " Kt"]


@dataclass(frozen=True)
class Report:
    """Everything that a run found.

    Attributes:
      title: the page's heading.
      facts: model, data, settings, command, versions; anything that JSON holds.
      rows: the results.
      channels: sites to plot.
      samples: questions to show.
    """

    title: str
    facts: Mapping[str, Any]
    rows: tuple[Row, ...]
    channels: tuple[Channels, ...] = ()
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class Summary:
    """The mean over the seeds of a method and scheme.

    Attributes:
      row: the mean of each field; the interval is of the mean accuracy, over the questions.
      seeds: how many.
      spread: sample standard deviation of the accuracy over the seeds; 0 for one seed.
    """

    row: Row
    seeds: int
    spread: float


def row_of(result: Result, *, method: str, scheme: str, seed: int, effective_bits: float, size: int, seconds: float | None) -> Row:
    """Make a row of a result; ``size`` in bytes, ``seconds`` for everything before the evaluation."""
    return Row(
        method=method,
        scheme=scheme,
        seed=seed,
        questions=result.question.size,
        accuracy=result.accuracy,
        interval=result.interval,
        first_accuracy=result.first_accuracy,
        agreement=result.agreement,
        kl=result.mean_kl,
        perplexity=result.perplexity,
        effective_bits=effective_bits,
        bytes=size,
        seconds=seconds,
        evaluation_seconds=result.seconds,
    )


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """Average over seeds; methods and schemes stay in the order in which they first come.

    Raises:
      InputError: no row at all, or a method, scheme and seed that comes twice.
    """
    if not rows:
        raise InputError("report: no row; evaluate at least one method")
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        group = groups.setdefault((row.scheme, row.method), [])
        if any(r.seed == row.seed for r in group):
            raise InputError(f"report: {row.method} {row.scheme} seed {row.seed} comes twice")
        group.append(row)
    schemes = list(dict.fromkeys(scheme for scheme, _ in groups))
    return [_mean(group) for key, group in sorted(groups.items(), key=lambda g: schemes.index(g[0][0]))]


def _mean(rows: Sequence[Row]) -> Summary:
    first = rows[0]
    averaged = ("accuracy", "first_accuracy", "agreement", "kl", "perplexity", "effective_bits", "seconds")
    fields = {k: [getattr(r, k) for r in rows] for k in (*averaged, "evaluation_seconds")}
    means = {k: None if None in found else float(np.mean(found)) for k, found in fields.items()}
    accuracy = float(np.mean(fields["accuracy"]))
    correct, size = round(accuracy * first.questions), round(float(np.mean([r.bytes for r in rows])))
    mean = Row(**(asdict(first) | means | {"interval": wilson(correct, first.questions), "bytes": size}))
    spread = float(np.std([r.accuracy for r in rows], ddof=1)) if len(rows) > 1 else 0.0
    return Summary(mean, len(rows), spread)


COLUMNS = ("Scheme", "Method", "Accuracy", "95 %", "Agrees", "KL", "Bits", "MB", "s")


def cells(summary: Summary) -> tuple[str, ...]:
    """Return the texts of a table's line, in the order of `COLUMNS`."""
    r = summary.row
    accuracy = f"{100 * r.accuracy:.1f}" + (f" ± {100 * summary.spread:.1f}" if summary.seeds > 1 else "")
    interval = f"{100 * r.interval[0]:.1f}–{100 * r.interval[1]:.1f}"
    kl = "–" if r.kl is None else f"{r.kl:.4f}" if r.kl < 0.1 else f"{r.kl:.3f}"
    agreement = "–" if r.agreement is None else f"{100 * r.agreement:.1f}"
    seconds = "–" if r.seconds is None else f"{r.seconds:.0f}"
    return (
        *(r.scheme, r.method, accuracy, interval, agreement, kl),
        *(f"{r.effective_bits:.2f}", f"{r.bytes / 1e6:.1f}", seconds),
    )


def best(summaries: Sequence[Summary]) -> set[tuple[str, str]]:
    """Return the (scheme, method) with the lowest KL of each scheme where several methods compete."""
    found = set()
    for scheme in dict.fromkeys(s.row.scheme for s in summaries):
        rivals = {s.row.method: s.row.kl for s in summaries if s.row.scheme == scheme and s.row.kl is not None}
        if len(rivals) > 1:
            found.add((scheme, min(rivals, key=rivals.__getitem__)))
    return found


def table(rows: Sequence[Row]) -> Table:
    """Draw the results; the lowest KL of each scheme is bold."""
    summaries = summarise(rows)
    questions = summaries[0].row.questions
    caption = (
        f"{questions:,} questions. Agrees: with float, in %. KL: from float, nats an answer token. Bits: per weight, all told."
    )
    drawn = Table(caption=caption, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(COLUMNS):
        drawn.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
    winners, previous = best(summaries), ""
    for s in summaries:
        if previous not in ("", s.row.scheme):
            drawn.add_section()
        drawn.add_row(*cells(s), style="bold" if (s.row.scheme, s.row.method) in winners else None)
        previous = s.row.scheme
    return drawn

"""`report.json`, and `report.html`: table, figures and samples in one file that needs no network."""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from splitq_jax.errors import InputError
from splitq_jax.eval.plots import channel_maxima, losses
from splitq_jax.eval.report import COLUMNS, FLOAT, Report, Sample, Summary, best, cells, summarise

CSS = """
:root { color-scheme: light; --ink: #1c2733; --muted: #66727f; --line: #e3e7eb; --accent: #1f6fb2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 40px 28px 64px; background: #fff; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 44px 0 10px; padding-bottom: 6px; border-bottom: 1px solid var(--line); }
p { margin: 0 0 12px; max-width: 78ch; }
.lead, .note { color: var(--muted); }
.note { font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th { text-align: right; font-weight: 600; color: var(--muted); border-bottom: 1px solid var(--ink); padding: 6px 10px;
  white-space: nowrap; }
td { text-align: right; padding: 5px 10px; white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
th:first-child, td:first-child { padding-left: 0; }
.note { margin-top: 10px; }
tbody + tbody tr:first-child td { border-top: 1px solid var(--line); }
tr.best td { font-weight: 600; }
tr.best td:nth-child(2) { color: var(--accent); }
figure { margin: 14px 0; }
figure img { display: block; max-width: 100%; height: auto; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 20px 28px; }
.sample { display: flex; gap: 16px; }
.sample img { width: 112px; height: 112px; object-fit: contain; image-rendering: pixelated; border: 1px solid var(--line);
  flex: none; }
.sample p { margin: 0 0 6px; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 0; font-size: 13.5px; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
dd.wrong { color: #a3341f; }
dl.facts { font-size: 14px; gap: 4px 20px; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media print { body { padding: 0; } h2 { break-after: avoid; } figure, .sample { break-inside: avoid; } }
"""


def write(report: Report, folder: str | Path) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into a folder.

    Raises:
      InputError: no row; matplotlib is missing; a number that is not finite.
    """
    for row in report.rows:
        if broken := [k for k, v in asdict(row).items() if isinstance(v, float) and not math.isfinite(v)]:
            raise InputError(f"report: {row.method} {row.scheme} seed {row.seed}: {', '.join(broken)} is not finite")
    content = {
        "title": report.title,
        "facts": dict(report.facts),
        "rows": [asdict(r) for r in report.rows],
        "samples": [{"question": s.question, "answer": s.answer, "said": dict(s.said)} for s in report.samples],
    }
    texts = {"report.json": json.dumps(content, indent=1, default=str) + "\n", "report.html": page(report)}
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return out / "report.json", out / "report.html"


def page(report: Report) -> str:
    """Render the report as one HTML text.

    Raises:
      InputError: no row; matplotlib is missing.
    """
    summaries = summarise(report.rows)
    compared = [s for s in summaries if s.row.scheme != FLOAT]
    parts = [f"<h1>{escape(report.title)}</h1>", f'<p class="lead">{escape(_lead(summaries))}</p>']
    parts += ["<h2>Results</h2>", _table(summaries)]
    parts.append(
        '<p class="note">Accuracy: share of questions whose greedy answer is exactly the expected one, in %, with its 95 % Wilson '
        "interval; ± is the standard deviation over calibration seeds. Agrees: share of questions on which the model says "
        "what the float model says. KL: mean divergence from the float model at the answers’ tokens, in nats. Bits: "
        "everything stored for the quantized layers (codes, scales, transforms, low-rank branches), per weight. "
        "MB: all parameters. Seconds: calibration, training and quantization. Bold: the lowest KL of a scheme.</p>"
    )
    if compared:
        parts += ["<h2>What was lost</h2>", _figure(losses(summaries), "Accuracy and KL divergence of each method by scheme")]
        parts.append('<p class="note">Whiskers: 95 % intervals. Dashed line: the float model. The KL axis differs by scheme.</p>')
    if report.channels:
        parts.append("<h2>Channels that are split off</h2>")
        parts.append(
            "<p>The largest magnitude of each input channel over the calibration tokens. Filled: split off for this modality. "
            "Outlined: split off for the other. MOCD chooses vision channels by magnitude and text channels by the "
            "instability of their rank, so the latter need not be large.</p>"
        )
        parts += [_figure(channel_maxima(c), f"Per-channel maxima of {c.site}") for c in report.channels]
    if report.samples:
        parts += ["<h2>Sample answers</h2>", f'<div class="samples">{"".join(map(_sample, report.samples))}</div>']
    parts += ["<h2>How this was made</h2>", _facts(report.facts)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _lead(summaries: Sequence[Summary]) -> str:
    methods = len({s.row.method for s in summaries if s.row.scheme != FLOAT})
    schemes = [s.upper() for s in dict.fromkeys(s.row.scheme for s in summaries) if s != FLOAT]
    seeds = max(s.seeds for s in summaries)
    text = f"{summaries[0].row.questions:,} questions"
    if schemes:
        text += f" · {methods} method{'s' * (methods != 1)} at {', '.join(schemes)}"
    return text + (f" · mean of {seeds} calibration seeds" if seeds > 1 else "")


def _table(summaries: Sequence[Summary]) -> str:
    winners, bodies = best(summaries), []
    for scheme in dict.fromkeys(s.row.scheme for s in summaries):
        lines = []
        for s in summaries:
            if s.row.scheme == scheme:
                style = ' class="best"' if (scheme, s.row.method) in winners else ""
                lines.append(f"<tr{style}>{''.join(f'<td>{escape(c)}</td>' for c in cells(s))}</tr>")
        bodies.append(f"<tbody>{''.join(lines)}</tbody>")
    head = "".join(f"<th>{escape(c)}</th>" for c in COLUMNS)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>{"".join(bodies)}</table></div>'


def _figure(svg: str, text: str) -> str:
    # as an image, not inline: the ids inside several SVGs would clash
    data = base64.b64encode(svg.encode()).decode()
    return f'<figure><img alt="{escape(text)}" src="data:image/svg+xml;base64,{data}"></figure>'


def _sample(sample: Sample) -> str:
    out = io.BytesIO()
    Image.fromarray(np.asarray(sample.image, np.uint8)).save(out, format="PNG")
    image = base64.b64encode(out.getvalue()).decode()
    style = {True: "", False: ' class="wrong"'}
    said = "".join(
        f"<dt>{escape(name)}</dt><dd{style[text.strip() == sample.answer.strip()]}>{escape(text)}</dd>"
        for name, text in sample.said.items()
    )
    return (
        f'<div class="sample"><img alt="" src="data:image/png;base64,{image}"><div><p>{escape(sample.question)}</p>'
        f"<dl><dt>expected</dt><dd>{escape(sample.answer)}</dd>{said}</dl></div></div>"
    )


def _facts(facts: Mapping[str, Any]) -> str:
    lines = "".join(f"<dt>{escape(str(k))}</dt><dd>{_value(v)}</dd>" for k, v in facts.items())
    return f'<dl class="facts">{lines}</dl>'


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "<br>".join(f"{escape(str(k))} {_value(v)}" for k, v in value.items())
    return escape(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))

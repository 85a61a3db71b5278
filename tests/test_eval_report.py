import io
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from splitq_jax.errors import InputError
from splitq_jax.eval.metrics import wilson
from splitq_jax.eval.page import page, write
from splitq_jax.eval.plots import channel_maxima, losses
from splitq_jax.eval.report import Channels, Report, Row, Sample, summarise, table


def row(method: str, scheme: str, accuracy: float, kl: float, seed: int = 0) -> Row:
    interval = wilson(round(200 * accuracy), 200)
    return Row(method, scheme, seed, 200, accuracy, interval, accuracy, accuracy, kl, 1.2, 4.5, 12_000_000, 30.0, 5.0)


ROWS = (
    row("float", "float", 0.95, 0.0),
    row("rtn", "w4a4", 0.40, 2.0),
    row("splitq", "w4a4", 0.90, 0.125),
    row("rtn", "w4a4", 0.42, 2.2, seed=1),
    row("splitq", "w4a4", 0.93, 0.135, seed=1),
    row("splitq", "w3a3", 0.70, 0.5),
)


@pytest.fixture
def report() -> Report:
    rng = np.random.default_rng(0)
    chosen = rng.permutation(96)[:16]
    maxima = rng.exponential(size=(2, 96))
    maxima[1, 5] = 0  # a channel that text never uses
    image = np.full((8, 8, 3), 200, np.uint8)
    return Report(
        title="SplitQ <demo> & more",
        facts={"images": 128, "versions": {"jax": "0.10"}},
        rows=ROWS,
        channels=(Channels("decoder/blocks_0/qkv", maxima[0], maxima[1], chosen[:8], chosen[8:]),),
        samples=(Sample(image, "is it <b>red</b>?", "yes", {"float": "yes", "rtn": "no & no"}),),
    )


class Page(HTMLParser):
    """Collects links, images and the table's cells; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.sources += [v for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_summaries_by_hand() -> None:
    found = summarise(ROWS)
    assert [(s.row.scheme, s.row.method, s.seeds) for s in found] == [
        ("float", "float", 1),
        ("w4a4", "rtn", 2),
        ("w4a4", "splitq", 2),
        ("w3a3", "splitq", 1),
    ]
    mean = found[2]
    assert mean.row.accuracy == pytest.approx(0.915) and mean.row.kl == pytest.approx(0.13)
    assert mean.spread == pytest.approx(0.03 / np.sqrt(2)) and mean.row.interval == wilson(183, 200)
    assert found[0].spread == 0
    with pytest.raises(InputError, match="no row"):
        summarise([])
    with pytest.raises(InputError, match="rtn w4a4 seed 0 comes twice"):
        summarise([*ROWS, ROWS[1]])


def test_the_table_shows_every_summary() -> None:
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(table(ROWS))
    text = console.export_text()
    for expected in ("91.5 ± 2.1", "86.8–94.6", "0.130", "200 questions", "95.0 "):
        assert expected in text, text


def test_the_report_reads_back(report: Report, tmp_path: Path) -> None:
    json_file, html_file = write(report, tmp_path / "out")
    content = json.loads(json_file.read_text())
    assert [Row(**(r | {"interval": tuple(r["interval"])})) for r in content["rows"]] == list(ROWS)
    assert content["facts"]["images"] == 128
    parsed = Page(html_file.read_text())
    assert len(parsed.cells) == 4 * 9 and "91.5 ± 2.1" in parsed.cells
    assert len(parsed.sources) == 3 and all(s.startswith("data:image/") for s in parsed.sources)


def test_the_page_needs_no_network_and_runs_nothing(report: Report) -> None:
    text = page(report)
    assert "<script" not in text and not re.findall(r"(?:src|href)=\"(?!data:)", text)
    assert "is it &lt;b&gt;red&lt;/b&gt;?" in text and "SplitQ &lt;demo&gt; &amp; more" in text
    assert 'class="wrong">no &amp; no<' in text
    assert "@import" not in text and "url(" not in text


def test_the_same_report_is_the_same_bytes(report: Report) -> None:
    assert page(report) == page(report)


def test_nothing_is_written_for_broken_numbers(report: Report, tmp_path: Path) -> None:
    broken = replace(report, rows=(*ROWS, replace(ROWS[2], seed=7, kl=float("nan"))))
    with pytest.raises(InputError, match="splitq w4a4 seed 7: kl is not finite"):
        write(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_float_has_no_figure(report: Report) -> None:
    assert "What was lost" not in page(replace(report, rows=ROWS[:1]))
    with pytest.raises(InputError, match="nothing to compare"):
        losses(summarise(ROWS[:1]))


def test_figures_are_svg(report: Report) -> None:
    for svg in (losses(summarise(ROWS)), channel_maxima(report.channels[0])):
        assert svg.rstrip().endswith("</svg>") and len(svg) > 10_000


def test_without_matplotlib_the_mend_is_named(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'splitq-jax\[demo\]'"):
        channel_maxima(report.channels[0])

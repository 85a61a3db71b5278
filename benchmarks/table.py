"""Prints a result file as Markdown, seeds averaged: ``python benchmarks/table.py benchmarks/results/demo_light.json``.

Without a file it writes the tables of both READMEs from ``benchmarks/results`` anew.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    "rtn": "RTN",
    "smoothquant": "SmoothQuant",
    "flatquant": "FlatQuant",
    "random-channels": "FlatQuant + random channels",
    "mocd": "MOCD",
    "mocd-cws": "MOCD + CWS",
    "splitq": "**SplitQ** (MOCD + CWS + MAC)",
    "splitq-fixed": "SplitQ, fixed factors",
    "splitq,side_bits=8": "SplitQ, 8-bit side groups",
    "splitq,mac_start=0.0": "SplitQ, MAC's gate from 0",
    "splitq,mac_tokens=vision,mac_start=0.0": "the same, MAC on vision tokens",
}
GPTQ = "rounding=gptq"
SCHEMES = ("w4a8", "w4a4", "w3a3", "w3a2")
WEIGHTS = {  # weight-only
    f"{method}{group}{rounding}": f"{name}{', groups of 32' * bool(group)}"
    for method, rounding, name in (
        ("rtn", "", "RTN"),
        ("rtn", f",{GPTQ}", "GPTQ alone"),
        ("flatquant", f",{GPTQ}", "FlatQuant, GPTQ"),
        ("splitq", f",{GPTQ}", "SplitQ, GPTQ"),
    )
    for group in ("", ",group_size=32")
}
Rows = list[dict[str, Any]]


def means(rows: Rows, method: str, scheme: str) -> tuple[float, np.ndarray, float, int] | None:
    """Return mean accuracy, every seed's KL, mean bits and the number of seeds of one method and scheme; None where nothing was run."""
    seeds = [r for r in rows if (r["method"], r["scheme"]) == (method, scheme)]
    if not seeds:
        return None
    right, kl, bits = (np.array([r[key] for r in seeds]) for key in ("accuracy", "kl", "effective_bits"))
    return float(right.mean()), kl, float(bits.mean()), len(seeds)


def markdown(rows: Rows) -> str:
    """Return a table a scheme: accuracy as a share of float's, and KL with the range over the seeds."""
    exact = next(r for r in rows if r["method"] == "float")
    lines = [f"float: {100 * exact['accuracy']:.1f} % of {exact['questions']} questions"]
    for scheme in dict.fromkeys(r["scheme"] for r in rows if r is not exact):
        lines += [
            "",
            f"| {scheme.upper()} | right | of float | KL from float | range | bits a weight | seeds |",
            "|---|---|---|---|---|---|---|",
        ]
        for method in dict.fromkeys(r["method"] for r in rows if r["scheme"] == scheme):
            found = means(rows, method, scheme)
            assert found is not None  # this scheme has it
            right, kl, bits, seeds = found
            share, spread = 100 * right / exact["accuracy"], f"{kl.min():.3f}–{kl.max():.3f}"
            lines.append(f"| {method} | {100 * right:.1f} % | {share:.1f} % | {kl.mean():.3f} | {spread} | {bits:.2f} | {seeds} |")
    return "\n".join(lines)


def rounded(rows: Rows, gptq: bool) -> Rows:
    """Return the rows of one way to round weights, which then no longer stands in their methods' names."""
    chosen = [row for row in rows if (GPTQ in row["method"].split(",")) == gptq]
    return [row | {"method": row["method"].removesuffix(f",{GPTQ}")} for row in chosen]


def compared(columns: list[tuple[str, Rows, str]], bits_of: str = "", names: dict[str, str] = NAMES) -> str:
    """Return a table of the methods of these names: accuracy and KL with its range, for each column's title, rows and scheme.

    ``bits_of`` adds the bits of one scheme.

    Schemes that no row has, and methods that no column has, are left out; a dash stands where nothing was run.
    """
    columns = [column for column in columns if any(r["scheme"] == column[2] for r in column[1])]
    lines = [
        "| | " + " | | ".join(title for title, _, _ in columns) + " | |" + f" bits ({bits_of.upper()}) |" * bool(bits_of),
        "|---" * (1 + 2 * len(columns) + bool(bits_of)) + "|",
        "| " + "| right | KL " * len(columns) + "|" + " |" * bool(bits_of),
    ]
    for method, name in names.items():
        line, bits = f"| {name} |", "–"
        for _, rows, scheme in columns:
            found = means(rows, method, scheme)
            if found is None:
                line += " – | – |"
                continue
            right, kl, mean_bits, seeds = found
            digits = 1 if kl.mean() >= 10 else 2 if kl.mean() >= 0.995 else 3
            spread = f" ({kl.min():.{digits}f}–{kl.max():.{digits}f})" if seeds > 1 and kl.min() < kl.max() else ""
            line += f" {100 * right:.1f} % | {kl.mean():.{digits}f}{spread} |"
            bits = f"{mean_bits:.2f}" if scheme == bits_of else bits
        if "%" in line:
            lines.append(line + f" {bits} |" * bool(bits_of))
    return "\n".join(lines)


def rows_of(*files: Path) -> Rows:
    """Return the rows of result files."""
    return [row for file in files for row in json.loads(file.read_text())["rows"]]


def tables() -> dict[str, str]:
    """Return the READMEs' tables by the names of their marks."""
    results = ROOT / "benchmarks/results"
    names = ("demo_light*", "demo_full*", "smolvlm_light*")
    light, full, large = (rows_of(*(f for f in sorted(results.glob(name)) if not f.stem.endswith("_8_channels"))) for name in names)
    further = (
        ("`demo`, `--effort full`", rounded(full, False)),
        ("`smolvlm`, light", rounded(large, False)),
    )
    gptq = [(s.upper(), rounded(light, True), s) for s in SCHEMES]
    more = [(f"{s.upper()}, 480 steps", rounded(full, True), s) for s in SCHEMES]
    more += [(f"{s.upper()}, 30 blocks", rounded(large, True), s) for s in SCHEMES]
    alone = NAMES | {"rtn": "GPTQ alone"}
    return {
        "gptq": compared(gptq, names=alone),
        "more": compared(more, names=alone),
        "nearest": compared([(s.upper(), rounded(light, False), s) for s in SCHEMES], bits_of="w4a4"),
        "further": compared([(f"{title}, {s.upper()}", rows, s) for title, rows in further for s in SCHEMES]),
        "weights": compared([(s.upper(), light, s) for s in ("w4a16", "w3a16", "w2a16")], bits_of="w3a16", names=WEIGHTS),
    }


def refreshed(text: str) -> str:
    """Return a README with its tables as the results have them."""
    for mark, table in tables().items():
        start, end = f"<!-- table:{mark} -->\n", f"\n<!-- /table:{mark} -->"
        text = re.sub(re.escape(start) + ".*?" + re.escape(end), lambda _, t=start + table + end: t, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?")
    file = parser.parse_args().file
    if file is not None:
        print(markdown(rows_of(file)))
    else:
        for readme in (ROOT / "README.md", ROOT / "benchmarks/README.md"):
            readme.write_text(refreshed(readme.read_text()))

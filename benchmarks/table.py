"""Prints a result file as Markdown, seeds averaged: ``python benchmarks/table.py benchmarks/results/demo_light.json``.

Without a file it writes the README's two tables from ``benchmarks/results`` anew.
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
    "random": "FlatQuant + random channels",
    "mocd": "MOCD",
    "mocd+cws": "MOCD + CWS",
    "splitq": "**SplitQ** (MOCD + CWS + MAC)",
    "splitq,mac_tokens=vision": "SplitQ, MAC on vision tokens",
    "splitq-fixed": "SplitQ, fixed factors",
}
Rows = list[dict[str, Any]]


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
        group = [r for r in rows if r["scheme"] == scheme]
        for method in dict.fromkeys(r["method"] for r in group):
            seeds = [r for r in group if r["method"] == method]
            right, kl, bits = (np.array([r[key] for r in seeds]) for key in ("accuracy", "kl", "effective_bits"))
            share = 100 * right.mean() / exact["accuracy"]
            spread = f"{kl.min():.3f}–{kl.max():.3f}"
            lines.append(
                f"| {method} | {100 * right.mean():.1f} % | {share:.1f} % | {kl.mean():.3f} | {spread} | {bits.mean():.2f} | {len(seeds)} |"
            )
    return "\n".join(lines)


def cells(rows: Rows, method: str, scheme: str) -> tuple[str, str, str]:
    """Return accuracy, KL with its range and number of seeds, and bits of one method and scheme; dashes where nothing was run."""
    seeds = [r for r in rows if (r["method"], r["scheme"]) == (method, scheme)]
    if not seeds:
        return "–", "–", "–"
    right, kl, bits = (np.array([r[key] for r in seeds]) for key in ("accuracy", "kl", "effective_bits"))
    digits = 1 if kl.mean() >= 10 else 2 if kl.mean() >= 0.995 else 3
    mean = f"{kl.mean():.{digits}f}"
    spread = "" if len(seeds) == 1 or kl.min() == kl.max() else f" ({kl.min():.{digits}f}–{kl.max():.{digits}f})"
    return f"{100 * right.mean():.1f} %", mean + spread, f"{bits.mean():.2f}"


def readme_tables() -> dict[str, str]:
    """Return the README's tables by the names of their marks."""
    light, full, large = (
        json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["rows"]
        for name in ("demo_light", "demo_full", "smolvlm_light")
    )
    schemes = ("w4a8", "w4a4", "w3a3", "w3a2")
    first = [
        "| | " + " | | ".join(s.upper() for s in schemes) + " | | bits (W4A4) |",
        "|---" * 10 + "|",
        "| " + "| right | KL " * 4 + "| |",
    ]
    for method, name in NAMES.items():
        found = [cells(light, method, scheme) for scheme in schemes]
        first.append(f"| {name} | " + " | ".join(f"{right} | {kl}" for right, kl, _ in found) + f" | {found[1][2]} |")
    columns = [  # those with any row
        (title, rows, scheme)
        for title, rows in (("`demo`, `--effort full`", full), ("`smolvlm`, light", large))
        for scheme in schemes
        if any(r["scheme"] == scheme for r in rows)
    ]
    second = [
        "| | " + " | | ".join(f"{title}, {scheme.upper()}" for title, _, scheme in columns) + " | |",
        "|---" * (1 + 2 * len(columns)) + "|",
        "| " + "| right | KL " * len(columns) + "|",
    ]
    for method, name in NAMES.items():
        found = [cells(rows, method, scheme) for _, rows, scheme in columns]
        if any(right != "–" for right, _, _ in found):
            second.append(f"| {name} | " + " | ".join(f"{right} | {kl}" for right, kl, _ in found) + " |")
    return {"light": "\n".join(first), "further": "\n".join(second)}


def refreshed(text: str) -> str:
    """Return the README with its tables as the results have them."""
    for mark, table in readme_tables().items():
        start, end = f"<!-- table:{mark} -->\n", f"\n<!-- /table:{mark} -->"
        text = re.sub(re.escape(start) + ".*?" + re.escape(end), lambda _, t=start + table + end: t, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?")
    file = parser.parse_args().file
    if file is not None:
        print(markdown(json.loads(file.read_text())["rows"]))
    else:
        readme = ROOT / "README.md"
        readme.write_text(refreshed(readme.read_text()))

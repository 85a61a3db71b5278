"""Prints a result file as Markdown, seeds averaged: ``python benchmarks/table.py benchmarks/results/demo_light.json``."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np


def markdown(rows: list[dict[str, Any]]) -> str:
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    print(markdown(json.loads(parser.parse_args().file.read_text())["rows"]))

"""How far the split channels depend on the samples: ``python benchmarks/channels.py --out benchmarks/results/channels.json``.

Jaccard overlap (size of the intersection over size of the union, mean over all sites) of the channels that MOCD chooses from other draws of
images with those from 128, as the paper reports it (arXiv 2605.19929); and of the two modalities' largest channels with each other.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from splitq_jax import calib, demo_model, mocd
from splitq_jax.calib.easy_vqa import EasyVqa
from splitq_jax.mocd import SiteStats, SplitSize
from splitq_jax.output import make_console, progress_bar
from splitq_jax.pipeline import Setup

BASE = (128, 0)
DRAWS = ((32, 0), (64, 0), (256, 0), (128, 1))  # images, seed


def main() -> None:
    """Choose the channels from each draw and print the overlaps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--size", default="demo", choices=list(demo_model.SIZES))
    args = parser.parse_args()
    console = make_console()
    with tempfile.TemporaryDirectory() as folder, progress_bar(console) as bar:
        demo_model.build(args.size, Path(folder) / "model")
        setup = Setup.open(Path(folder) / "model", EasyVqa(Path(folder) / "data"))
        stats = {
            draw: calib.collect(setup.model, setup.params, setup.calibration(*draw), SplitSize(), progress=bar)
            for draw in (BASE, *DRAWS)
        }
    chosen = {draw: {path: sets(s) for path, s in of.items()} for draw, of in stats.items()}
    rows = {f"{images} images, seed {seed}": overlaps(chosen[BASE], chosen[images, seed]) for images, seed in DRAWS}
    common = [
        jaccard(set(s.vision_channels.tolist()), set(mocd.top(s.absmax[mocd.TEXT], len(s.vision_channels)).tolist()))
        for s in stats[BASE].values()
    ]
    rows["largest of vision and of text"] = {"both": float(np.mean(common))}
    for name, row in rows.items():
        console.print(f"{name}: " + ", ".join(f"{part} {100 * value:.1f} %" for part, value in row.items()))
    facts = {"jax": jax.__version__, "python": platform.python_version(), "device": jax.devices()[0].device_kind}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"size": args.size, "against": "128 images, seed 0", "facts": facts, "rows": rows}, indent=1) + "\n"
    )


def sets(stats: SiteStats) -> dict[str, set[int]]:
    """Return the vision channels, the text channels and both, as MOCD chooses them."""
    perm, k_text, k_vision = mocd.select(stats, "mocd")
    side = np.asarray(perm)[-(k_text + k_vision) :].tolist()
    return {"both": set(side), "vision": set(side[k_text:]), "text": set(side[:k_text])}


def overlaps(first: Mapping[str, dict[str, set[int]]], second: Mapping[str, dict[str, set[int]]]) -> dict[str, float]:
    """Return the mean Jaccard overlap over the sites, for both sets together and for each."""
    return {
        part: float(np.mean([jaccard(first[path][part], second[path][part]) for path in first]))
        for part in ("both", "vision", "text")
    }


def jaccard(a: set[int], b: set[int]) -> float:
    """Return ``|A & B| / |A | B|``."""
    return len(a & b) / len(a | b)


if __name__ == "__main__":
    main()

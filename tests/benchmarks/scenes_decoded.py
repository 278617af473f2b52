"""How many scenes still show what they did once an autoencoder has decoded them, by the checker of `compose`.

The share that is accepted as they are stands first; no U-Net in that latent space comes above the other.

    python tests/benchmarks/scenes_decoded.py assets/emoji128/vae --data data/emoji128
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from latentdiff.checkpoints import load_autoencoder
from latentdiff.evaluate.compose.checker import Checker
from latentdiff.evaluate.compose.validation import error_rates, truth_of
from latentdiff.evaluate.judge import load_judge
from latentdiff.images import from_tensor, to_tensor

WANTED = {"position": 80, "pair": 80, "background": 50, "color": 50, "count": 50}  # scenes, counted under the first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("autoencoders", nargs="+", metavar="FOLDER")
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    folder = options.data / "train"
    rows = chosen(folder)
    scenes = [Image.open(folder / row["file_name"]).convert("RGB") for row in rows]
    checker, figures = Checker(load_judge()), {}
    for name in ("as they are", *options.autoencoders):
        seen = scenes if name == "as they are" else decoded(name, scenes)
        rates = error_rates(zip(seen, rows), checker)
        figures[name] = {category: rate.accepted.value for category, rate in rates.items()}
        print(
            f"{name}: "
            + ", ".join(f"{key} {rate.accepted.value:.3f} of {rate.accepted.n}" for key, rate in rates.items())
        )
    print(json.dumps(figures))


def chosen(folder: Path) -> list[dict[str, Any]]:
    """Return the first rows of metadata of scenes that the benchmark asks for, as many as wanted of each category."""
    rows, counts = [], Counter[str]()
    for line in (folder / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "truth" not in row:
            continue
        of = next((name for name in WANTED if counts[name] < WANTED[name] and truth_of(row, name) is not None), None)
        if of is not None:
            counts[of] += 1
            rows.append(row)
    return rows


@torch.no_grad()
def decoded(folder: str, pictures: list[Image.Image]) -> list[Image.Image]:
    """Return pictures once encoded and decoded."""
    autoencoder, found = load_autoencoder(folder).eval(), list[Image.Image]()
    for first in range(0, len(pictures), 8):
        found += from_tensor(autoencoder.decode(autoencoder.encode(to_tensor(pictures[first : first + 8])).mode()))
    return found


if __name__ == "__main__":
    main()

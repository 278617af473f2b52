"""Draw the gallery: every prompt of assets/gallery.txt once, seed 0, no picking.

python tests/benchmarks/gallery.py                    writes assets/gallery.png
python tests/benchmarks/gallery.py --out other.png --model runs/emoji-diffusion/model
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from PIL import Image

from latentdiff import Pipeline
from latentdiff.images import write_png
from latentdiff.marks import GENERATED

ASSETS = Path(__file__).parents[2] / "assets"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS / "gallery.png")
    parser.add_argument("--model", default=None)
    parser.add_argument("--columns", type=int, default=12)
    arguments = parser.parse_args()
    prompts = (ASSETS / "gallery.txt").read_text().splitlines()
    pipe = Pipeline.from_pretrained(arguments.model)
    # One call a prompt: each picture is the one that `latentdiff generate PROMPT --seed 0` draws.
    images = [pipe(prompt, seed=0).images[0] for prompt in prompts]
    gap, (width, height) = 4, images[0].size
    rows = math.ceil(len(images) / arguments.columns)
    sheet = Image.new("RGB", (arguments.columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % arguments.columns * (width + gap), index // arguments.columns * (height + gap)))
    write_png(arguments.out, sheet, {}, GENERATED)
    print(f"{len(images)} pictures in {arguments.out}")


if __name__ == "__main__":
    main()

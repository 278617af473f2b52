"""How often a model draws the right thing for words that no caption of its data has, but that are near ones it knows.

    python tests/benchmarks/unknown_words.py --model assets/emoji128 --data data/emoji128 --guidance 4

One picture of each of 30 words, seed 0. The image-text model says which of all names of the data fit the picture best;
the word counts where a name of what it means is among the first five. Prints what was found for each, and the share
with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from latentdiff.training.datasets.held_out_words import WORDS

from latentdiff import Pipeline
from latentdiff.evaluate.intervals import share
from latentdiff.evaluate.judge import load_judge
from latentdiff.images import to_tensor

BEST = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path, required=True, help="of `latentdiff data emoji`")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--engine", default="eager")
    options = parser.parse_args()
    names, known = names_of(options.data / "train")
    if seen := [word for word in WORDS if word in known]:
        raise SystemExit(f"captions have these words: {', '.join(seen)}")
    missing = {one for wanted in WORDS.values() for one in wanted} - set(names.values())
    print(f"{len(names)} names; of what words may be drawn as these are none: {', '.join(sorted(missing)) or 'none'}")
    given = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}
    drawn = Pipeline.from_pretrained(options.model, device="cpu", engine=options.engine)(
        [*WORDS], **{name: value for name, value in given.items() if value is not None}
    )
    judge, labels = load_judge(), [*names]
    best = (judge.images(to_tensor(drawn.images)) @ judge.texts(labels).T).topk(BEST).indices
    hits = list[bool]()
    for (word, wanted), found in zip(WORDS.items(), best):
        five = [labels[place] for place in found]
        hits.append(any(names[one] in wanted for one in five))
        print(f"{'yes' if hits[-1] else 'no ':3} {word}: {', '.join(five)}")
    figure = share(torch.tensor(hits).numpy())
    print(json.dumps({"share": figure.value, "low": figure.low, "high": figure.high, "n": figure.n}))


def names_of(folder: Path) -> tuple[dict[str, str], set[str]]:
    """Return the concept of each name of a single thing, and all words of captions."""
    names, words = dict[str, str](), set[str]()
    for line in (folder / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        for caption in row["captions"]:
            words.update(re.findall(r"[a-z]+", caption.lower()))
        if "truth" not in row and not row.get("variant") and row["group"] != "flags":
            names[row["thing"]] = row["concept"]
    return names, words


if __name__ == "__main__":
    main()

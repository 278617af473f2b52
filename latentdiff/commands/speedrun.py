"""`latentdiff speedrun`: from pictures to a model and a page about it, in the time given."""

from __future__ import annotations

import argparse
import json

from latentdiff.commands.shared import load_torch
from latentdiff.commands.train import space_needed

HELP = "Train a model of pictures, or of emoji, in the time given, and write a page about it."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "pictures",
        metavar="FOLDER|emoji",
        help="folder of pictures (metadata.jsonl or .csv, .txt files beside them, or no captions), table or tar files; "
        "or emoji, which are drawn first",
    )
    parser.add_argument("--minutes", type=float, default=30.0, metavar="M", help="for everything (default 30)")
    parser.add_argument("--out", help="folder, to go on with what is in it; runs/speedrun-NAME by default")
    parser.add_argument("--caption", metavar="TEXT", help="one caption for all pictures, in place of their own")
    parser.add_argument(
        "--from-nothing", action="store_true", help="train a new model even where the embedded one would learn faster"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def run(options: argparse.Namespace) -> None:
    """Train a model of pictures in the time given."""
    load_torch()
    from latentdiff.training.speedrun.run import Wish, speedrun

    wish = Wish(options.pictures, options.minutes, options.caption, options.from_nothing)
    with space_needed(options.out or "runs", "give the same command again"):
        page = speedrun(wish, options.out)
    if options.json:
        print(json.dumps({"report": str(page), "model": str(page.parent / "model")}))
    else:
        print(f"report: {page}")

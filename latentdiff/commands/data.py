"""`latentdiff data`: captioned data sets that recipes of this package train on."""

from __future__ import annotations

import argparse
import json

from latentdiff.errors import InputError

HELP = "Build a captioned data set."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "name",
        choices=["emoji", "fxemoji", "digits"],
        metavar="NAME",
        help="emoji: six openly licensed styles, fetched by npm; fxemoji: one more; digits: those of scikit-learn",
    )
    parser.add_argument("out", help="folder; a build that was broken off goes on where it stopped")
    parser.add_argument("--size", type=int, help="side of the pictures in pixels (default 64; digits have 8)")
    parser.add_argument(
        "--scenes",
        type=int,
        metavar="N",
        help="of emoji: add N scenes of one to four things, with the truth about each",
    )
    parser.add_argument(
        "--near-words",
        action="store_true",
        help="of emoji: add captions of words that the embedded text encoder finds near the names",
    )


def run(options: argparse.Namespace) -> None:
    """Build a captioned data set."""
    if options.scenes is not None and options.name != "emoji":
        raise InputError(f"--scenes are composed of the drawings of emoji, got {options.name}; leave it out")
    if options.near_words and options.name != "emoji":
        raise InputError(f"--near-words are of the names of emoji, got {options.name}; leave it out")
    if options.name == "digits":
        if options.size not in (None, 8):
            raise InputError(f"--size of the digits is 8, got {options.size}; leave it out")
        from latentdiff.training.datasets.digits import build as build_digits

        print(json.dumps(build_digits(options.out)))
        return
    from latentdiff.training.datasets.emoji import FXEMOJI, build
    from latentdiff.training.datasets.near_words import add_near_words
    from latentdiff.training.datasets.scenes.build import add_scenes, check_count

    if options.scenes is not None:
        check_count(options.scenes)  # before all the drawing
    report = build(options.out, options.size or 64, sources=FXEMOJI if options.name == "fxemoji" else None)
    if options.near_words:
        report["near_words"] = add_near_words(options.out)
    if options.scenes is not None:
        report["scenes"] = add_scenes(options.out, options.scenes)
    print(json.dumps(report, indent=2))

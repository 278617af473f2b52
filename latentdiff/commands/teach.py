"""`latentdiff teach`: a model whose text encoder tells apart what captions say of each thing."""

from __future__ import annotations

import argparse

from latentdiff.commands.shared import load_torch
from latentdiff.generation.options import check_integer

HELP = "Teach a model's text encoder what captions of scenes say of each thing: where it is, colour, size and number."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("model", help="folder, safetensors file, owner/name on a hub, or embedded")
    parser.add_argument("--data", required=True, help="folder of `latentdiff data emoji --scenes`")
    parser.add_argument("--out", required=True, help="model folder; train the U-Net on from there")
    parser.add_argument(
        "--iterations", type=int, default=260, metavar="N", help="one batch of captions each (default 260)"
    )


def run(options: argparse.Namespace) -> None:
    """Teach the text encoder of a model."""
    check_integer("--iterations", options.iterations, 1, 1_000_000, "try 260")
    load_torch()
    from latentdiff.training.taught_text import teach_model

    teach_model(options.model, options.data, options.out, options.iterations)

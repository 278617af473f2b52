"""`latentdiff distill`: a model drawn in few steps, or with cheap previews."""

from __future__ import annotations

import argparse

from latentdiff.commands.shared import load_torch
from latentdiff.errors import InputError, shown
from latentdiff.generation.options import check_integer

HELP = "Make a model draw in few steps: tune a sampler for it, or train a LoRA or its weights; or train its previews."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("model", help="folder, safetensors file, owner/name on a hub, or embedded")
    parser.add_argument("--data", help="captioned pictures, as of finetune; a sampler is tuned by the captions alone")
    parser.add_argument(
        "--recipe", metavar="FILE", help="config whose keep and drop choose among the pictures; all by default"
    )
    parser.add_argument(
        "--steps", default="4", metavar="N[,N...]", help="calls of the network (default 4); several for --sampler tuned"
    )
    parser.add_argument(
        "--out", required=True, help="folder of the model itself or a new one; run folder with --lora or --whole"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--lora", type=int, metavar="RANK", help="train a LoRA of this rank instead of tuning a sampler")
    what.add_argument("--whole", action="store_true", help="train the whole U-Net instead of tuning a sampler")
    what.add_argument(
        "--preview",
        action="store_true",
        help="train a tiny decoder for the previews of the server and the page instead",
    )
    parser.add_argument(
        "--guidance", type=float, metavar="X", help="guidance of the many steps; the model's own by default"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the training that is in the folder")


def run(options: argparse.Namespace) -> None:
    """Tune a sampler for a model, or train it to draw in few calls."""
    steps = _steps(options.steps)
    trains = options.whole or options.lora is not None
    if options.lora is not None:
        check_integer("--lora", options.lora, 1, 1024, "try 64")
    if trains and len(steps) > 1:
        raise InputError(f"--steps of a training is one number, got {shown(options.steps)}; try 4")
    if options.resume and not trains:
        raise InputError("--resume goes on with a training, got neither --lora nor --whole; add the one it was of")
    if options.data is None and not options.resume:
        raise InputError("--data is missing; name captioned pictures such as those the model was trained on")
    load_torch()
    from latentdiff.training.distill import Asked, add_tiny_decoder, distil, go_on, tune_sampler

    if options.resume:
        go_on(options.out)
        return
    asked = Asked(options.model, options.data, options.out, options.guidance, options.recipe)
    if options.preview:
        add_tiny_decoder(asked)
    elif trains:
        distil(asked, steps[0], options.lora)
    else:
        tune_sampler(asked, steps)


def _steps(text: str) -> list[int]:
    """Return the numbers of "4" or "4,8"."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 9 for part in parts):
        raise InputError(f"--steps must be whole numbers, got {shown(text)}; try 4 or 4,8")
    numbers = [check_integer("--steps", int(part), 1, 32, "try 4") for part in parts]
    return sorted({*numbers})

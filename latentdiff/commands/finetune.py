"""`latentdiff finetune`: a model trained further on captioned pictures."""

from __future__ import annotations

import argparse

from latentdiff.commands.shared import load_torch

HELP = "Fine-tune a model on captioned pictures, with settings chosen for both."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "dataset",
        help="folder of pictures (metadata.jsonl or .csv, .txt files beside them, or no captions), table or tar files",
    )
    parser.add_argument("--model", help="folder, safetensors file, or owner/name on a hub; the embedded one by default")
    parser.add_argument(
        "--task",
        choices=["text_to_image", "inpaint", "upscale"],
        metavar="TASK",
        help="text_to_image, inpaint (any text-to-image model learns it) or upscale; what --model does by default",
    )
    parser.add_argument("--out", required=True, help="run folder")
    parser.add_argument("--resume", action="store_true", help="go on with the run that is in the folder")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train a LoRA of this rank, not the whole U-Net")


def run(options: argparse.Namespace) -> None:
    """Fine-tune a model on captioned pictures with settings chosen for both."""
    load_torch()
    from latentdiff.training.finetune import finetune

    finetune(options.dataset, options.out, options.model, options.lora, options.task, options.resume)

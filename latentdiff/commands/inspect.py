"""`latentdiff inspect`: what a model folder, weight file or generated picture is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from latentdiff.commands.shared import load_torch
from latentdiff.errors import printable
from latentdiff.files import is_file

HELP = "Say what a model folder, safetensors file or generated PNG is."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("path", nargs="?", help="folder or file; the embedded model by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> None:
    """Say what a model folder, weight file or generated picture is."""
    path = Path(options.path) if options.path else None
    if path and path.suffix.lower() == ".png":
        from latentdiff.generation.result import read_record

        described = {"kind": "picture", **read_record(path)}
    else:
        load_torch()
        from latentdiff.checkpoints import find_model
        from latentdiff.checkpoints.inspect import describe_file, describe_folder

        described = describe_file(path) if path and is_file(path) else describe_folder(find_model(options.path)[0])
    if options.json:
        print(json.dumps(described))
        return
    for key, value in described.items():
        print(printable(f"{key}: {json.dumps(value) if isinstance(value, dict) else value}"))

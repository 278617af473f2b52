"""`latentdiff inspect`: what a model folder, weight file or generated picture is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from latentdiff.commands.shared import load_torch
from latentdiff.encoding import FORMATS
from latentdiff.errors import InputError, MissingDependencyError, printable
from latentdiff.files import is_file, read_file

HELP = "Say what a model folder, safetensors file or generated picture is."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("path", nargs="?", help="folder or file; the embedded model by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> None:
    """Say what a model folder, weight file or generated picture is."""
    path = Path(options.path) if options.path else None
    if path and path.suffix.lower() in FORMATS:
        described = _describe_picture(path)
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


def _describe_picture(path: Path) -> dict[str, Any]:
    """Return mark and signature of a picture file, which any may have, and the settings of one of ours.

    Raises:
        InputError: the file cannot be read, or has nothing of all that.
    """
    from latentdiff.generation.result import read_record
    from latentdiff.images import MAX_FILE_BYTES, open_stored
    from latentdiff.marks import source_type_of
    from latentdiff.signing import signature_of

    described: dict[str, Any] = {"kind": "picture", "digital_source_type": source_type_of(open_stored(path))}
    try:
        described["signature"] = signature_of(read_file(path, MAX_FILE_BYTES, "image"))
    except MissingDependencyError as error:
        described["signature"] = {"state": "not checked", "reason": str(error)}
    try:
        return {**described, **read_record(path), **described}  # a record may say anything
    except InputError:
        if described["digital_source_type"] is None and described["signature"] is None:
            raise
    return described

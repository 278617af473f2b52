"""`latentdiff export`: the networks of a model as graphs for OpenVINO or ONNX runtimes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff import __version__
from latentdiff.commands.shared import (
    add_lora,
    add_prediction_type,
    add_vae,
    load_torch,
    parse_loras,
    say,
    warnings_as_lines,
)
from latentdiff.errors import InputError, shown, suggest
from latentdiff.files import is_file, parse_json, read_file, require_path

if TYPE_CHECKING:
    from latentdiff.checkpoints import Components
    from latentdiff.engine.exporting import Graph

HELP = "Write the networks of a model as graphs for OpenVINO or ONNX runtimes."
DESCRIPTION = "graphs.json"  # names, types and axes of what the graphs take
LONGEST = 2**20  # bytes of it


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("source", metavar="MODEL", help="model folder or safetensors file, or the name of one")
    parser.add_argument("target", metavar="OUT", help="folder, new or of an earlier export, which is replaced")
    parser.add_argument("--format", metavar="F", default="openvino", help="openvino (default) or onnx")
    add_prediction_type(parser)
    add_vae(parser)
    add_lora(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def run(options: argparse.Namespace) -> None:
    """Write the networks of a model as graphs."""
    target, loras = require_path(options.target, "OUT"), parse_loras(options.lora)
    load_torch()
    import torch

    from latentdiff.checkpoints import load_pipeline
    from latentdiff.checkpoints.lora import apply_loras
    from latentdiff.checkpoints.storage import replace_folder
    from latentdiff.engine.exporting import FORMATS, write_graph

    if options.format not in FORMATS:
        raise InputError(f"--format {shown(options.format)} is unknown{suggest(options.format, FORMATS)}")
    _check_format(target, options.format)
    with warnings_as_lines():
        components = load_pipeline(options.source, torch.float32, "cpu", options.prediction_type, options.vae)
        components = apply_loras(components, loras)
    described: dict[str, Any] = {"model": components.name, "model_hash": components.model_hash}
    described |= {"format": options.format, "latentdiff": __version__, "graphs": {}}

    def write(folder: Path) -> None:
        for name, graph in _graphs(components).items():
            say(f"writing {name}; this takes a while")
            difference = write_graph(graph, folder / name, options.format)
            described["graphs"][name] = {**graph.describe(), "difference": difference}
            if not options.json:
                print(f"{target / name}: differs by {difference:.1e} of its largest value")
        (folder / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n")

    replace_folder(target, DESCRIPTION, write)
    if options.json:
        print(json.dumps(described))


def _check_format(target: Path, kind: str) -> None:
    """Refuse a folder with graphs in another format, which would stay beside those that replace it."""
    if not is_file(target / DESCRIPTION):
        return
    found = parse_json(read_file(target / DESCRIPTION, LONGEST), str(target / DESCRIPTION))
    before = found.get("format") if isinstance(found, dict) else None
    if before != kind:
        raise InputError(f"OUT must be new or an export to {kind}, got one to {shown(before)}; name another folder")


def _graphs(components: Components) -> dict[str, Graph]:
    """Return what there is to write, by the folders that other tools have for it."""
    from latentdiff.engine.exporting import decoder_graph, text_graph, unet_graph
    from latentdiff.models.autoencoder import AutoencoderKL
    from latentdiff.models.clip import CLIPTextModel
    from latentdiff.models.pixels import LabelEncoder

    found = dict[str, Any]()
    pairs = {
        "text_encoder": (components.text_encoder, components.tokenizer),
        "text_encoder_2": (components.text_encoder_2, components.tokenizer_2),
    }
    for name, (encoder, tokenizer) in pairs.items():
        if encoder is None or isinstance(encoder, LabelEncoder) or tokenizer is None:
            continue
        end = tokenizer.end_token_id if isinstance(encoder, CLIPTextModel) else None
        window, penultimate = tokenizer.model_max_length, components.expects_pooled_text
        found[name] = text_graph(encoder, window, end, penultimate=penultimate)
    if isinstance(components.autoencoder, AutoencoderKL):
        found["vae_decoder"] = decoder_graph(components.autoencoder)
    return {**found, "unet": unet_graph(components.unet)}

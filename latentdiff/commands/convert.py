"""`latentdiff convert`: a model in another layout or precision, or as a variant of another."""

from __future__ import annotations

import argparse

from latentdiff.commands.shared import (
    add_lora,
    add_prediction_type,
    add_vae,
    load_torch,
    parse_loras,
    warnings_as_lines,
)
from latentdiff.errors import InputError, shown

HELP = "Write a model in another layout."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("source", help="model folder or safetensors file of a whole model")
    parser.add_argument("target", help="NAME.safetensors for one file of the original layout, else a folder")
    add_prediction_type(parser)
    add_vae(parser)
    add_lora(parser)
    parser.add_argument(
        "--dtype", help="of the weights: float16 (default), bfloat16, float32, float8_e4m3fn or float8_e5m2"
    )
    parser.add_argument(
        "--variant-of",
        metavar="FOLDER",
        help="model beside TARGET, which TARGET then needs: only what differs from it is written",
    )
    parser.add_argument(
        "--rank", type=int, help="of the U-Net's difference from that of --variant-of; written whole by default"
    )


def run(options: argparse.Namespace) -> None:
    """Write a model in another layout."""
    load_torch()
    from latentdiff.checkpoints import load_pipeline, save_pipeline
    from latentdiff.checkpoints.lora import apply_loras
    from latentdiff.checkpoints.single_file import save_single_file
    from latentdiff.checkpoints.variant import save_variant
    from latentdiff.checkpoints.weights import storage_dtype
    from latentdiff.devices import DTYPES
    from latentdiff.generation.options import check_integer

    if options.rank is not None:
        check_integer("--rank", options.rank, 1, 4096, "try 32")
        if options.variant_of is None:
            raise InputError("--rank is of a difference from another model, got no --variant-of; add it")
    single = options.target.endswith(".safetensors")
    if single and options.variant_of is not None:
        raise InputError(f"a variant is a folder beside its base, got {shown(options.target)}; leave .safetensors out")
    dtype, loras = storage_dtype(options.dtype or "float16"), parse_loras(options.lora)
    # What is added to weights, or is to be stored as float8, is rounded once.
    computed = DTYPES["float32"] if loras or dtype not in DTYPES.values() else dtype
    with warnings_as_lines():
        components = load_pipeline(options.source, computed, "cpu", options.prediction_type, options.vae)
        components = apply_loras(components, loras)
        if options.variant_of is not None:
            save_variant(components, options.target, options.variant_of, dtype, options.rank)
        else:
            (save_single_file if single else save_pipeline)(components, options.target, dtype)
    print(options.target)

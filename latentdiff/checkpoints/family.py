"""The families of models that single files are of: their configurations, their marks and the vocabulary of CLIP.

A single file has weights alone, so its configuration and vocabulary come with the package (`families/`).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from latentdiff.checkpoints.components import Components
from latentdiff.errors import InputError
from latentdiff.models.clip import CLIPTextModel
from latentdiff.models.tokenizer import Tokenizer

__all__ = [
    "ENLARGING",
    "ENLARGING_CHANNELS",
    "FAMILIES",
    "MARKS",
    "UNET",
    "VAE",
    "clip_tokenizer",
    "families",
    "family_of",
    "text_layouts",
]

FOLDER = Path(__file__).parent / "families"
UNET, VAE = "model.diffusion_model.", "first_stage_model."
FAMILIES = {  # by width of the context
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    1280: "Stable Diffusion XL refiner",
    2048: "Stable Diffusion XL",
}

# A tensor that only this family has, in the order in which they are looked for.
MARKS = {
    "Stable Diffusion XL": "conditioner.embedders.1.model.token_embedding.weight",
    "Stable Diffusion XL refiner": "conditioner.embedders.0.model.token_embedding.weight",
    "Stable Diffusion 2.x": "cond_stage_model.model.token_embedding.weight",
    "Stable Diffusion 1.x": "cond_stage_model.transformer.",
}
ENLARGING = "Stable Diffusion x4 upscaler"  # which has the text encoder of 2.x, and this many input channels:
ENLARGING_CHANNELS = 7


@cache
def families() -> dict[str, Any]:
    """Return the configurations of all families, by name."""
    shapes: dict[str, Any] = json.loads((FOLDER / "families.json").read_text(encoding="utf-8"))
    return shapes


def clip_tokenizer(pad: str | Mapping[str, Any], window: int = 77) -> Tokenizer:
    """Return CLIP's tokenizer, whose windows of so many tokens are filled with the token `pad`."""
    return _clip_tokenizer(json.dumps(pad), window)


@cache
def _clip_tokenizer(pad: str, window: int) -> Tokenizer:
    """Return the same, `pad` as JSON. The vocabulary is that of its merges, after all bytes alone and at word ends."""
    merges = gzip.decompress((FOLDER / "clip-merges.txt.gz").read_bytes())
    pairs = merges.decode("utf-8").splitlines()[1:]
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(pair.replace(" ", "") for pair in pairs)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": window,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": json.loads(pad),
    }
    vocabulary = {token: number for number, token in enumerate(tokens)}
    files = {
        "vocab.json": json.dumps(vocabulary).encode(),
        "merges.txt": merges,
        "tokenizer_config.json": json.dumps(settings).encode(),
    }
    return Tokenizer(files, "the tokenizer that comes with the package")


def _byte_letters() -> list[str]:
    """Return the letter that stands for each byte, in the order of CLIP's vocabulary: printable ones for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]


def text_layouts(components: Components) -> list[tuple[str, str]]:
    """Return layout and prefix, in a single file, of each text encoder of a model.

    Raises:
        InputError: it has other text encoders than such files hold.
    """
    return [(text["layout"], text["prefix"]) for text in families()[family_of(components)]["text"]]


def family_of(components: Components) -> str:
    """Return the family of a model.

    Raises:
        InputError: it has other text encoders than such files hold.
    """
    if not isinstance(components.text_encoder, CLIPTextModel):
        kind = type(components.text_encoder).__name__
        raise InputError(f"a single file has a place for CLIP text encoders alone, got {kind}; save it as a folder")
    if components.upscales:
        return ENLARGING
    if components.unet.config.expects_sizes:
        return "Stable Diffusion XL" if components.text_encoder_2 is not None else "Stable Diffusion XL refiner"
    return (
        "Stable Diffusion 1.x" if components.text_encoder.config.hidden_act == "quick_gelu" else "Stable Diffusion 2.x"
    )

"""Text encoders from OpenCLIP's own checkpoints: a folder of its layout, or a file and the name of an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from latentdiff.checkpoints.family import clip_tokenizer
from latentdiff.checkpoints.folder import child, read_json
from latentdiff.checkpoints.header import read_header
from latentdiff.checkpoints.single_file import Section, load_section
from latentdiff.errors import InputError, MissingDependencyError, ModelConfigError, suggest
from latentdiff.models.clip import WITH_PROJECTION, CLIPTextModel
from latentdiff.models.tokenizer import PLAIN_WORD, Tokenizer

__all__ = ["CONFIG", "load_open_clip"]

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
PLAIN = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")
# Token 0, which in a prompt is an exclamation mark inside a word, and so never there.
PAD = {"__type": "AddedToken", "content": "!", **PLAIN_WORD}
POSITIONS = "positional_embedding"


def load_open_clip(
    path: str | Path,
    architecture: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[CLIPTextModel, Tokenizer]:
    """Load the text tower of an OpenCLIP model, with its projection, and CLIP's tokenizer.

    Args:
        path: folder with open_clip_config.json and open_clip_model.safetensors, as on the hub, or a safetensors file.
        architecture: what OpenCLIP calls the model in a file, such as "ViT-H-14"; None for a folder.
        dtype, device: of the weights in memory.

    Raises:
        InputError: no architecture was given for a file, or OpenCLIP knows none of that name.
        MissingDependencyError: an architecture was named, and OpenCLIP is not installed.
        ModelLoadError: the files were refused; the subclass says why.
    """
    file = Path(path)
    if file.is_dir():
        config, file = read_json(child(file, CONFIG)).get("model_cfg"), child(file, WEIGHTS)
    else:
        config = _known(architecture)
    shape = _text_config(file, config)
    tensors = read_header(file).tensors
    prefix = "" if POSITIONS in tensors else "text."
    section = Section("text_encoder", WITH_PROJECTION, "open_clip", prefix, shape)
    encoder: CLIPTextModel = load_section(file, tensors, section, dtype, device)
    return encoder, clip_tokenizer(PAD, shape["max_position_embeddings"])


def _known(architecture: str | None) -> object:
    """Return the configuration that OpenCLIP has for a name."""
    if architecture is None:
        raise InputError('a file does not say which model it is; pass its OpenCLIP name, as in architecture="ViT-H-14"')
    try:
        import open_clip
    except ImportError as error:
        raise MissingDependencyError(
            "names of OpenCLIP models need OpenCLIP, which is not installed; `pip install latentdiff[openclip]`"
        ) from error
    config = open_clip.get_model_config(architecture)
    if config is None:
        raise InputError(f"OpenCLIP has no model {architecture!r}{suggest(architecture, open_clip.list_models())}")
    return config


def _text_config(file: Path, given: object) -> dict[str, Any]:
    """Return the content of a config.json of transformers for the text tower.

    Raises:
        ModelConfigError: it is none, or one that is not CLIP's own.
    """
    config = given if isinstance(given, dict) else {}
    text = config.get("text_cfg")
    if not isinstance(text, Mapping):
        raise ModelConfigError(f"{file}: expected a configuration of OpenCLIP with text_cfg, got none")
    odd = [key for key in text if key not in PLAIN]
    if odd:
        raise ModelConfigError(f"{file}: its text tower is not CLIP's own (it has {', '.join(odd)}); use another model")
    width = text.get("width", 512)
    return {
        "architectures": [WITH_PROJECTION],
        "vocab_size": text.get("vocab_size", 49408),
        "hidden_size": width,
        "intermediate_size": int(width * text.get("mlp_ratio", 4.0)),
        "num_hidden_layers": text.get("layers", 12),
        "num_attention_heads": text.get("heads", 8),
        "max_position_embeddings": text.get("context_length", 77),
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "projection_dim": config.get("embed_dim"),
    }

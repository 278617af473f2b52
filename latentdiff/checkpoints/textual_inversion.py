"""Textual inversion: learned vectors that stand for new words of a prompt, from the files in use.

    diffusers     one tensor, named by its word: {"<fox-toy>": (D,) or (n, D)}
    webui         {"emb_params": (n, D)}, the word is the name of the file
    SD XL         {"clip_l": (n, 768), "clip_g": (n, 1280)}, likewise
    in a LoRA     {"bundle_emb.fox-toy.emb_params": (n, D)}, or clip_l and clip_g; one file may hold several words

A word of several vectors becomes as many tokens, `<fox-toy>`, `<fox-toy>_1`, ..., as diffusers has it.

Source: Gal et al. 2022, arXiv 2208.01618.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.checkpoints.components import Components
from latentdiff.checkpoints.hashes import model_hash
from latentdiff.checkpoints.header import TensorInfo, read_header
from latentdiff.checkpoints.lora_kinds import BUNDLE, bundled_words
from latentdiff.checkpoints.storage import save_tensors
from latentdiff.checkpoints.weights import FLOATS, read_weights
from latentdiff.errors import InputError, ModelMismatchError
from latentdiff.files import require_path
from latentdiff.models.lora import NetworkT, share_weights
from latentdiff.models.tokenizer import Tokenizer

__all__ = ["TABLES", "add_embedding", "grown", "save_embedding"]

WEBUI = "emb_params"
XL = ("clip_l", "clip_g")  # of the first and of the second text encoder
MAX_VECTORS = 1000
# Where each text encoder has the vectors of its tokens.
TABLES = {
    "BertModel": "embeddings.word_embeddings",
    "CLIPTextModel": "text_model.embeddings.token_embedding",
    "T5EncoderModel": "shared",
}


def add_embedding(components: Components, path: str | os.PathLike[str], word: str | None = None) -> Components:
    """Return components that know one word more and share all weights with the ones given, which stay as they are.

    Args:
        components: with text encoders, not classes.
        path: of a safetensors file.
        word: what stands for the vectors in prompts; None for what the file calls it, or for the file's own name. Of
            several in a LoRA file, the one to take.

    Raises:
        InputError: the word is one of the vocabulary already, or holds blanks; or there is no vocabulary.
        ModelLoadError: the file was refused, or is for another model.
    """
    file = require_path(path, "an embedding")
    if word is not None and not isinstance(word, str):
        raise InputError(f"the word for an embedding must be text, got {type(word).__name__}; pass another")
    header = read_header(file)
    encoders = {"text_encoder": (components.text_encoder, components.tokenizer)}
    if components.text_encoder_2 is not None:
        encoders["text_encoder_2"] = (components.text_encoder_2, components.tokenizer_2)
    for encoder, _ in encoders.values():
        if type(encoder).__name__ not in TABLES:
            raise InputError(f"embeddings are for text encoders, got {type(encoder).__name__}; use another model")
    widths = {component: encoder.config.hidden_size for component, (encoder, _) in encoders.items()}
    bundled = bundled_words(header.tensors)
    if bundled:
        word = _one_of(file, bundled, word)
        inside = bundled[word] if word in bundled else next(iter(bundled.values()))
        named = _names(file, {kind: header.tensors[name] for kind, name in inside.items()}, widths)
        names = {component: inside[kind] for component, kind in named.items()}
    else:
        names = _names(file, header.tensors, widths)
    vectors = read_weights(file, {name: header.tensors[name] for name in names.values()})
    held = next(iter(names.values()))
    word = word or (file.stem if held in (WEBUI, *XL) else held)
    if not word.isprintable() or word.split() != [word]:
        raise InputError(f"the word for an embedding must be text without blanks, got {word!r:.80}; pass another")
    record = {"path": os.fspath(path), "hash": model_hash(file), "word": word}
    changes: dict[str, Any] = {"embeddings": (*components.embeddings, record)}
    for component, (encoder, tokenizer) in encoders.items():
        assert tokenizer is not None
        rows = vectors[names[component]].reshape(-1, widths[component])  # (n, D)
        changes[component], words = grown(encoder, tokenizer, word, rows)
        changes[component.replace("text_encoder", "tokenizer")] = words
    base = None if components.base is None else add_embedding(components.base, path, word)
    return replace(components, **changes, base=base)


def _one_of(file: Path, bundled: Mapping[str, Any], word: str | None) -> str:
    """Return the word to add of those in a LoRA file; one alone may be called otherwise.

    Raises:
        InputError: there are several, and none or another was asked for.
    """
    if len(bundled) == 1:
        return word or next(iter(bundled))
    if word is None or word not in bundled:
        shown = ", ".join(name[:40] for name in list(bundled)[:10])
        raise InputError(f"{file.name} holds {len(bundled)} words, {shown}; say which, got {str(word)[:40]}")
    return word


def grown(encoder: NetworkT, tokenizer: Tokenizer, word: str, rows: Tensor) -> tuple[NetworkT, Tokenizer]:
    """Return a text encoder and a tokenizer that know one word more, as `add_embedding` does.

    Args:
        rows: its vectors (n, D).

    Raises:
        InputError: the tokenizer has the word already.
    """
    words = tokenizer.with_words([word, *(f"{word}_{number}" for number in range(1, len(rows)))])
    network: Any = share_weights(encoder)  # each class has its table in another place
    table = network.get_submodule(TABLES[type(encoder).__name__])
    old = table.weight  # (V, D)
    first = len(tokenizer)
    weight = torch.zeros(max(len(old), len(words)), old.shape[1]).to(old)
    weight[: len(old)] = old
    weight[first : first + len(rows)] = rows.to(old)
    table.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    table.num_embeddings = len(weight)
    network.config = replace(network.config, vocab_size=len(weight))
    return network, words


def save_embedding(word: str, vectors: Tensor, file: Path) -> None:
    """Write the vectors (n, D) of a word as diffusers has them.

    Raises:
        InputError: the word is what some files call the vectors of any word.
        StorageError: the file cannot be written.
    """
    if word in (WEBUI, *XL) or BUNDLE.fullmatch(word):
        raise InputError(
            f"{word!r} is what other files call the vectors of any word, and would not be read; take another"
        )
    save_tensors({word: vectors.contiguous()}, file)


def _names(file: Path, tensors: Mapping[str, TensorInfo], widths: Mapping[str, int]) -> dict[str, str]:
    """Return which tensor is for which text encoder.

    Raises:
        ModelMismatchError: it is no embedding, or of another width.
    """
    if len(widths) > 1:
        found = {component: name for component, name in zip(widths, XL) if name in tensors}
    elif XL[1] in tensors:  # the refiner has the second text encoder alone
        found = dict.fromkeys(widths, XL[1])
    elif WEBUI in tensors:
        found = dict.fromkeys(widths, WEBUI)
    else:
        found = dict.fromkeys(widths, next(iter(tensors))) if len(tensors) == 1 else {}
    wanted = " and ".join(f"{width} wide" for width in widths.values())
    if len(found) < len(widths):
        raise ModelMismatchError(
            f"{file}: expected an embedding for this model, {wanted}, got {', '.join(list(tensors)[:5])[:200]}; "
            "use one that was trained for it"
        )
    for component, name in found.items():
        shape, dtype = tensors[name].shape, tensors[name].dtype
        fits = len(shape) in (1, 2) and shape[-1] == widths[component] and dtype in FLOATS
        if not fits or not 1 <= (shape[0] if len(shape) == 2 else 1) <= MAX_VECTORS:
            raise ModelMismatchError(
                f"{file}: expected vectors {widths[component]} wide for {component}, got {name} of {dtype} "
                f"{list(shape)}; use one that was trained for this model"
            )
    return found

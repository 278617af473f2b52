"""Resolve a model name to a folder: a path, an embedded model, or `owner/name` on a hub.

A path opens no socket. Of a model on a hub only JSON, vocabularies and safetensors are fetched. A download that broke
off goes on where it stopped, and HF_HUB_OFFLINE=1 takes what the cache has; both are the library's.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from latentdiff.checkpoints.folder import FAST_LORA, NETWORKS, TINY_DECODER, VARIANTS, read_layout, weight_files
from latentdiff.checkpoints.generation_config import FILE as DEFAULTS
from latentdiff.checkpoints.tuned_sampler import FILE as TUNED
from latentdiff.embedded import ASSETS, EMBEDDED, embedded_model
from latentdiff.errors import InputError, ModelPathError, suggest
from latentdiff.files import require_path
from latentdiff.models.tokenizer import FILES

__all__ = ["EMBEDDED", "embedded_model", "find_fast_lora", "find_model"]

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
OWN = (DEFAULTS, TUNED, FAST_LORA, f"{TINY_DECODER}/*.safetensors")  # what a model may have beside its components
SMALL = ("model_index.json", "*/config.json", "*/scheduler_config.json", *(f"tokenizer*/{name}" for name in FILES))


def find_model(model: str | os.PathLike[str] | None, *, local: bool = False) -> tuple[Path, str]:
    """Return the folder of a model, and the name under which settings refer to it.

    Args:
        model: a folder; `owner/name` or `owner/name@revision` on a hub, where there is no such folder; one of `ASSETS`,
            None for "embedded".
        local: of models on a hub, take only what is in the cache already.

    Raises:
        InputError: there is no such model.
        ModelPathError: it is one of `ASSETS`, which this copy of the package came without.
    """
    if model is None or (isinstance(model, str) and model in ASSETS):
        name = EMBEDDED if model is None else os.fspath(model)
        return embedded_model(name), name
    folder, name = require_path(model, "a model"), os.fspath(model)
    try:
        if folder.is_dir():
            return folder, name
        if folder.exists():
            raise InputError(f"model must be a folder in diffusers' layout, got the file {name}; convert it first")
        if NAME.fullmatch(name) and not folder.parent.is_dir():
            return _fetch(name, local), name
        siblings = [
            entry.name
            for entry in folder.parent.iterdir()
            if (entry / "model_index.json").is_file() or entry.suffix == ".safetensors"
        ]
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        siblings = []
    remedy = suggest(folder.name, [*siblings, *ASSETS])
    raise InputError(f"model {name[:200]!r} is no folder or file here{remedy}")


def find_fast_lora(model: str | os.PathLike[str] | None) -> Path:
    """Return the LoRA in a model's folder that makes it draw in few calls.

    Args:
        model: as of `find_model`.

    Raises:
        InputError: there is no such model, or none in its folder.
    """
    folder, name = find_model(model)
    file = folder / FAST_LORA
    if not file.is_file():
        raise InputError(
            f"model {name[:200]!r} has no {FAST_LORA}, which draws in few calls; make one with latentdiff distill "
            "--lora 64 and put it into its folder, or leave --fast out"
        )
    return file


def _fetch(model: str, local: bool) -> Path:
    """Return the folder of a model in the cache, once all that is loaded of it is there.

    Weights of a variant (such as `.fp16.`) are fetched only where there are no others.

    Raises:
        InputError: no such model, or it is not in the cache and cannot be fetched.
        ModelLoadError: it is there, but no model that can be loaded.
    """
    name, _, revision = model.partition("@")
    folder = _snapshot(name, revision, (*SMALL, *OWN), (), local)
    components = [component for component in NETWORKS if component in read_layout(folder).classes]
    left_out = tuple(f"*{part}{end}*" for part in VARIANTS for end in ".-")
    folder = _snapshot(name, revision, _weights(components), left_out, local)
    lacking = [component for component in components if not _has_weights(folder, component)]
    return _snapshot(name, revision, _weights(lacking), (), local) if lacking else folder


def _weights(components: list[str]) -> tuple[str, ...]:
    kinds = ("*.safetensors", "*.safetensors.index*.json")
    return tuple(f"{component}/{kind}" for component in components for kind in kinds)


def _has_weights(folder: Path, component: str) -> bool:
    try:
        return bool(weight_files(folder, component))
    except ModelPathError:
        return False


def _snapshot(name: str, revision: str, allowed: tuple[str, ...], ignored: tuple[str, ...], local: bool) -> Path:
    import huggingface_hub

    patterns: dict[str, Any] = {"allow_patterns": list(allowed), "ignore_patterns": list(ignored)}
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision or None, local_files_only=local, **patterns)
        )
    except (OSError, ValueError) as error:  # what all of the library's errors are
        why = str(error).strip().partition("\n")[0][:160]
        raise InputError(f"model {name!r} is no folder here, and huggingface_hub says: {why}; pass a folder") from error

"""The settings in a picture's file, as values of a page's controls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from latentdiff.errors import InputError
from latentdiff.generation.infotext import parse_infotext
from latentdiff.generation.options import SIDES, options_of
from latentdiff.generation.request import Settings
from latentdiff.generation.result import METADATA_KEY, read_record
from latentdiff.images import read_texts
from latentdiff.serve.http.errors import ApiError
from latentdiff.serve.http.models import Models
from latentdiff.serve.http.webui.names import own_sampler
from latentdiff.serve.page.asked import AUTOMATIC
from latentdiff.serve.page.controls import ELSEWHERE, shown_value

__all__ = ["values_of_file", "values_of_infotext", "values_of_record"]

# What web UIs call settings, and what they are called on the page.
SHOWN = {
    "Prompt": "prompt",
    "Negative prompt": "negative_prompt",
    "Steps": "num_inference_steps",
    "CFG scale": "guidance_scale",
    "Seed": "seed",
    "Size": "size",
    "CFG Rescale phi": "guidance_rescale",
    "Variation seed": "variation_seed",
    "Variation seed strength": "variation_strength",
}


def values_of_file(path: str, models: Models) -> tuple[dict[str, Any], str]:
    """Return the values of the controls that a picture was drawn with, and what is missing to draw it again.

    Args:
        path: of its file.
        models: that are served.

    Raises:
        InputError: it is no picture, or holds no settings.
    """
    texts = read_texts(path)
    if METADATA_KEY not in texts and "parameters" in texts:
        return values_of_infotext(texts["parameters"], models)
    return values_of_record(read_record(path), models)


def values_of_record(record: Mapping[str, Any], models: Models) -> tuple[dict[str, Any], str]:
    """Return the same of a record.

    Raises:
        InputError: a value that cannot be used.
    """
    settings, notes = Settings.from_record(record), list[str]()
    values = {
        name: shown_value(name, getattr(settings, name)) for name in options_of(Settings) if name not in ELSEWHERE
    }
    values |= {"prompt": settings.prompt(0) + _tags(record, models, notes), "negative_prompt": settings.negative_prompt}
    values |= {"num_images": 1, "size": "auto", "mode": _mode(record, settings)}
    if settings.width is not None and settings.height is not None:
        values["size"] = f"{settings.width}x{settings.height}"
    if values["mode"] in ("image", "inpaint"):
        values[f"{values['mode']}_strength"] = settings.strength
    values |= dict(zip(SIDES, settings.outpaint or (0, 0, 0, 0)))
    if values["mode"] != "text":
        notes.append("choose the picture that it was made of")
    values["model"] = _model(record, models, notes)
    return values, "; ".join(notes)


def values_of_infotext(text: str, models: Models) -> tuple[dict[str, Any], str]:
    """Return the same of the text in which web UIs note settings, as far as there is the same here.

    Raises:
        InputError: it is no such text.
    """
    found, notes = parse_infotext(text), list[str]()
    if "Steps" not in found:
        raise InputError("the picture must hold settings, got another text; use a file as a web UI wrote it")
    values: dict[str, Any] = {name: found.get(key, "") for key, name in SHOWN.items()}
    values |= {"mode": "text", "num_images": 1, "size": values["size"] or "auto"}
    try:
        values["sampler"] = own_sampler(found.get("Sampler"), found.get("Schedule type")) or ""
    except ApiError:
        notes.append(f"its sampler {found['Sampler'][:40]} is not known here")
    if found.get("Clip skip", "").isdecimal():
        values["clip_skip"] = str(max(0, int(found["Clip skip"]) - 1))  # there, 1 leaves out nothing
    if not any(found.get("Model hash", "-") == pipe.components.model_hash[:10] for pipe in models.pipes.values()):
        notes.append(f"its model {found.get('Model', '')[:40]} is not served here, so that another picture comes out")
    return values, "; ".join(notes)


def _mode(record: Mapping[str, Any], settings: Settings) -> str:
    if record.get("mask"):
        return "inpaint"
    if settings.outpaint is not None:
        return "outpaint"
    if not record.get("image"):
        return "text"
    return "upscale" if "upscale" in str(record.get("model")) else "image"


def _model(record: Mapping[str, Any], models: Models, notes: list[str]) -> str:
    """Return the name of the model here that has the hash of the recorded one."""
    for name, pipe in models.pipes.items():
        if pipe.components.model_hash == record.get("model_hash"):
            return name
    notes.append("its model is not served here, so that another picture comes out")
    return AUTOMATIC


def _tags(record: Mapping[str, Any], models: Models, notes: list[str]) -> str:
    """Return the LoRAs of a record as a prompt names them."""
    tags, files = "", models.loras.files()
    for lora in record.get("loras") or []:
        name, weight = PurePath(str(lora.get("path"))).stem, lora.get("weight")
        if name in files and isinstance(weight, (int, float)):
            tags += f" <lora:{name}:{weight:g}>"
        else:
            notes.append(f"its LoRA {name} is not here")
    return tags

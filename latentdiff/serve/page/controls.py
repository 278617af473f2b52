"""Controls of a page, made of the declarations of the generation options: an option that is new there is new here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import gradio as gr

from latentdiff.diffusion import SAMPLERS
from latentdiff.diffusion.guidance import GUIDANCE_SCHEDULES
from latentdiff.generation.options import SIDES, options_of
from latentdiff.generation.request import Settings
from latentdiff.serve.page.modes import MODES, modes_of

__all__ = ["ELSEWHERE", "FIRST", "classes_of", "make_control", "shown_value", "texts_of"]

# Options that have a place of their own on the page, in this order; all others are among the further settings.
FIRST = ("num_images", "seed", "num_inference_steps", "guidance_scale", "sampler")
# Options that are made of other controls.
ELSEWHERE = ("negative_prompt", "strength", "outpaint", "width", "height")
LABELS = {"num_images": "Pictures", "num_inference_steps": "Steps", "guidance_scale": "Guidance"}
CHOICES: dict[str, tuple[str, ...]] = {
    "sampler": tuple(SAMPLERS),
    "guidance_schedule": tuple(GUIDANCE_SCHEDULES),
    "correction": ("none", "colour", "full"),
}


def make_control(name: str, most: int | None = None) -> Any:
    """Return the control of an option, empty where the model's default is meant.

    Args:
        name: of the option.
        most: what the server takes at most.
    """
    declared = options_of(Settings)[name]
    default, kind = _defaults()[name]
    modes = modes_of(name, declared)
    label = LABELS.get(name, name.replace("_", " ").capitalize())
    info = None if name in FIRST else declared.help[0].upper() + declared.help[1:] + "."
    look = {
        "label": label,
        "info": info,
        "elem_id": f"option-{name}",
        "elem_classes": classes_of(modes),
        "min_width": 120,
    }
    usual = "" if default is None else f"{default:g}" if kind in ("int", "float") else f"{default}"
    usual = "random" if name == "seed" else "the model's" if declared.from_model else usual
    if name in CHOICES:
        choices = [(usual if usual == "the model's" else f"{usual} (usual)", ""), *CHOICES[name]]
        return gr.Dropdown(choices, value="", allow_custom_value=name == "sampler", **look)
    if kind == "bool":
        return gr.Checkbox(value=bool(default), **look)
    if name == "num_images":
        return gr.Slider(1, most or 4, value=1, step=1, **look)
    return gr.Textbox(value="", placeholder=usual, max_lines=1, **look)  # numbers too: an empty one is shown as 0


def classes_of(modes: tuple[str, ...]) -> list[str]:
    """Return the classes by which the style sheet shows something in some modes alone."""
    return ["in-some", *(f"in-{mode}" for mode in modes)] if len(modes) < len(MODES) else []


def texts_of(values: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """Return the options that were chosen for a mode, as fields of a request; what is empty is left out."""
    chosen = {name: values.get(name) for name, declared in options_of(Settings).items() if _asked(name, mode)}
    chosen["strength"] = values.get(f"{mode}_strength") if mode in ("image", "inpaint") else None
    if mode == "outpaint":
        chosen["outpaint"] = {side: values[side] for side in SIDES if values.get(side)} or None
    defaults = _defaults()
    return {
        name: value
        for name, value in chosen.items()
        if value is not None and value != "" and not (isinstance(value, bool) and value == defaults[name][0])
    }


def shown_value(name: str, value: Any) -> Any:
    """Return the value of an option as its control shows it: empty where it is the default of every model."""
    default, kind = _defaults()[name]
    declared = options_of(Settings)[name]
    if kind == "bool":
        return bool(value)
    if value is None or (value == default and not declared.from_model and name not in ("seed", "num_images")):
        return ""
    if isinstance(value, (tuple, list)):
        return ",".join(f"{one:g}" for one in value)
    return value if name in CHOICES or name == "num_images" else f"{value}"


def _asked(name: str, mode: str) -> bool:
    return name not in ("strength", "outpaint", "num_images", "width", "height") and mode in modes_of(
        name, options_of(Settings)[name]
    )


def _defaults() -> dict[str, tuple[Any, str]]:
    """Return default and type of every option."""
    return {item.name: (item.default, str(item.type).partition(" ")[0]) for item in fields(Settings)}

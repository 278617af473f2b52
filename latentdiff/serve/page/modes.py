"""Ways to draw: what each is made of, and which options say something in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from latentdiff.generation.options import Option
from latentdiff.pipeline import Pipeline

__all__ = ["MODES", "Mode", "fitting_model", "modes_of"]


@dataclass(frozen=True)
class Mode:
    """A way to draw.

    Attributes:
        label: on the page.
        tasks: of the models for it, the best one first; see `checkpoints.Components.task`.
        picture: the control that holds the picture it changes; None where there is none.
    """

    label: str
    tasks: tuple[str, ...]
    picture: str | None = None


MODES = {
    "text": Mode("Text", ("text_to_image", "inpaint")),
    "image": Mode("Image", ("text_to_image", "inpaint"), "image"),
    "inpaint": Mode("Inpaint", ("inpaint", "text_to_image"), "painted"),
    "outpaint": Mode("Outpaint", ("inpaint", "text_to_image"), "extended"),
    "upscale": Mode("Upscale", ("upscale",), "enlarged"),
}


# Options that say nothing in some of the modes of their models.
ONLY = {
    "num_images": ("text", "image", "inpaint", "outpaint"),
    "width": ("text", "image"),
    "height": ("text", "image"),
    "strength": ("image", "inpaint"),
    "outpaint": ("outpaint",),
    "feather": ("inpaint", "outpaint"),
    "hires": ("text",),
    "hires_strength": ("text",),
}


def modes_of(name: str, declared: Option) -> tuple[str, ...]:
    """Return the modes in which an option says something."""
    found = [mode for mode, way in MODES.items() if not set(way.tasks).isdisjoint(declared.tasks)]
    return tuple(mode for mode in found if mode in ONLY.get(name, tuple(MODES)))


def fitting_model(mode: str, pipes: Mapping[str, Pipeline]) -> str | None:
    """Return the name of the model that is best for a mode; None where none can draw it."""
    for task in MODES[mode].tasks:
        for name, pipe in pipes.items():
            if pipe.components.task == task:
                return name
    return None

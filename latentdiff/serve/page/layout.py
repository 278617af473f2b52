"""The page: where its parts are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from latentdiff.generation.options import SIDES, SIZE_MULTIPLE, options_of
from latentdiff.generation.request import Settings
from latentdiff.pipeline import DEFAULT_STRENGTH
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.models import Models
from latentdiff.serve.page.asked import AUTOMATIC
from latentdiff.serve.page.controls import ELSEWHERE, FIRST, classes_of, make_control
from latentdiff.serve.page.modes import MODES
from latentdiff.serve.page.stage import empty_html

__all__ = ["Parts", "lay_out"]

HEADER = """<header><h1>latentdiff</h1>
<button type="button" data-theme aria-label="Dark or light" title="Dark or light">◐</button></header>"""
# What is pressed inside a view is told to Python as an event of its own.
PRESSED = """element.addEventListener('click', (event) => {
  const pressed = event.target.closest('[data-do]');
  if (!pressed) return;
  const told = {what: pressed.dataset.do, index: Number(pressed.dataset.index || 0), text: pressed.textContent};
  trigger({again: 'submit', idea: 'input'}[told.what] || 'select', told);
});"""


@dataclass
class Parts:
    """The parts of a page that something happens to.

    Attributes:
        values: the controls by the names of their values; see `asked.page_order`.
        draw, cancel, status, stage, history, lora, dropped: as they are called.
    """

    values: dict[str, Any] = field(default_factory=dict)
    draw: Any = None
    cancel: Any = None
    status: Any = None
    stage: Any = None
    history: Any = None
    lora: Any = None
    dropped: Any = None


def lay_out(models: Models, limits: Limits) -> Parts:
    """Lay the parts out, inside `gr.Blocks`.

    Args:
        models: that are served.
        limits: of requests.
    """
    parts = Parts()
    gr.HTML(HEADER, elem_id="head")
    with gr.Row(elem_id="work"):
        with gr.Column(elem_id="ask"):
            _add_prompt(parts)
            _add_pictures(parts)
            with gr.Row(elem_id="go"):
                parts.draw = gr.Button("Draw", variant="primary", elem_id="draw")
                parts.cancel = gr.Button("Cancel", visible="hidden", elem_id="cancel")
        with gr.Column(elem_id="show"):
            parts.status = gr.HTML("", elem_id="status")
            ideas = models.pipes[models.first].components.name == "embedded"
            parts.stage = gr.HTML(empty_html(ideas), js_on_load=PRESSED, elem_id="stage")
            parts.history = gr.HTML("", js_on_load=PRESSED, elem_id="history")
        with gr.Column(elem_id="settings"):
            _add_settings(parts, models, limits)
    return parts


def _add_prompt(parts: Parts) -> None:
    values = parts.values
    values["prompt"] = gr.Textbox(
        label="Prompt", placeholder="a red fox", lines=2, max_lines=8, autofocus=True, elem_id="prompt"
    )
    choices = [(mode.label, name) for name, mode in MODES.items()]
    values["mode"] = gr.Radio(choices, value="text", label="From", elem_id="mode")


def _add_pictures(parts: Parts) -> None:
    values = parts.values
    common = {"sources": ["upload", "clipboard"], "height": 260, "buttons": []}
    with gr.Group(elem_classes=classes_of(("image",))):
        values["image"] = gr.Image(label="Picture to change", **common)
        values["image_strength"] = _strength(DEFAULT_STRENGTH)
    with gr.Group(elem_classes=classes_of(("inpaint",))):
        values["painted"] = gr.ImageEditor(
            label="Paint over what is to change",
            sources=["upload", "clipboard"],
            height=420,
            buttons=[],
            transforms=[],
            layers=False,
            format="png",
            brush=gr.Brush(colors=["#f97316"], color_mode="fixed", default_size=40),
            visible=False,
            elem_id="editor",
        )
        values["inpaint_strength"] = _strength(1.0)
    with gr.Group(elem_classes=classes_of(("outpaint",))):
        values["extended"] = gr.Image(label="Picture to draw around", **common)
        with gr.Row(elem_classes=["sides"]):
            for side in SIDES:
                values[side] = gr.Number(
                    16, label=side.capitalize(), minimum=0, step=SIZE_MULTIPLE, precision=0, min_width=60
                )
    with gr.Group(elem_classes=classes_of(("upscale",))):
        values["enlarged"] = gr.Image(label="Picture to enlarge", **common)


def _strength(default: float) -> Any:
    return gr.Slider(0.05, 1, value=default, step=0.05, label="Strength", info="How much of it is drawn anew.")


def _add_settings(parts: Parts, models: Models, limits: Limits) -> None:
    values = parts.values
    for pair in (FIRST[:2], FIRST[2:4]):
        with gr.Row(elem_classes=["pair"]):
            for name in pair:
                values[name] = make_control(name, limits.n)
    with gr.Row(elem_classes=["pair"]):
        values[FIRST[4]] = make_control(FIRST[4])
        values["size"] = gr.Dropdown(
            _sizes(models),
            value="auto",
            label="Size",
            allow_custom_value=True,
            min_width=120,
            elem_classes=classes_of(("text", "image")),
        )
    values["model"] = gr.Dropdown(
        [AUTOMATIC, *models.pipes], value=AUTOMATIC, label="Model", visible=len(models.pipes) > 1
    )
    loras = list(models.loras.files())
    parts.lora = gr.Dropdown(loras, value=None, label="Add a LoRA", visible=bool(loras), elem_id="lora")
    values["negative_prompt"] = gr.Textbox(label="Negative prompt", placeholder="what to steer away from", max_lines=4)
    with gr.Accordion("More settings", open=False, elem_id="more"):
        for name in options_of(Settings):
            if name not in (*FIRST, *ELSEWHERE):
                values[name] = make_control(name)
    with gr.Accordion("Settings from a picture", open=False, elem_id="read"):
        parts.dropped = gr.File(
            label="Picture with settings",
            file_types=[".png", ".jpg", ".jpeg", ".webp"],
            height=170,
        )


def _sizes(models: Models) -> list[tuple[str, str]]:
    """Return sizes to choose from: those of a model's own area, square, upright and lying."""
    height, width = models.pipes[models.first].native_size
    long, short = round(width * 1.25 / 16) * 16, round(height * 0.8 / 16) * 16
    shapes: Mapping[str, tuple[int, int]] = {
        "own": (width, height),
        "upright": (short, long),
        "wide": (long, short),
        "large": (2 * width, 2 * height),
    }
    named = [(f"{name}, {wide}x{high}", f"{wide}x{high}") for name, (wide, high) in shapes.items()]
    return [("automatic", "auto"), *named]

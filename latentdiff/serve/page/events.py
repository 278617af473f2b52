"""The page: what happens when something on it is pressed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from html import escape
from typing import Any

import gradio as gr

from latentdiff.errors import LatentDiffError
from latentdiff.serve.http.errors import ApiError, api_error
from latentdiff.serve.http.orders import decoded
from latentdiff.serve.page.drawing import News, Studio
from latentdiff.serve.page.files import enlarged, path_of, paths_of, read, reduced, store
from latentdiff.serve.page.layout import Parts
from latentdiff.serve.page.modes import MODES
from latentdiff.serve.page.records import values_of_file
from latentdiff.serve.page.stage import Drawn, drawing_html, drawn_html, history_html

__all__ = ["Desktop", "connect"]

MOST_REMEMBERED = 40  # of what was drawn on a page

Updates = dict[Any, Any]


@dataclass
class Desktop:
    """What one page remembers.

    Attributes:
        history: what was drawn, the oldest first.
        shown: number of what is seen; None for nothing.
        chosen: number of the picture there that is meant.
        times: how many times larger the picture is that is painted on; see `files.enlarged`.
    """

    history: list[Drawn] = field(default_factory=list)
    shown: int | None = None
    chosen: int = 0
    times: int = 1

    @property
    def current(self) -> Drawn | None:
        """What is seen."""
        return None if self.shown is None else self.history[self.shown]

    def add(self, drawn: Drawn) -> None:
        """Take down what was drawn, and look at it."""
        self.history = [*self.history, drawn][-MOST_REMEMBERED:]
        self.shown, self.chosen = len(self.history) - 1, 0


class Events:
    """The functions that events call.

    Args:
        parts: of the page.
        studio: draws.
    """

    def __init__(self, parts: Parts, studio: Studio, desktop: Any) -> None:
        self.parts, self.studio, self.desktop = parts, studio, desktop

    async def draw(self, given: Updates, request: gr.Request) -> AsyncIterator[Updates]:
        """Draw what the controls say."""
        parts, desktop = self.parts, given[self.desktop]
        values = self._values(given, desktop.times)
        client = request.client.host if request.client is not None else ""
        busy = {parts.draw: gr.update(interactive=False, value="Drawing…"), parts.cancel: gr.update(visible=True)}
        yield {**busy, parts.status: said("Preparing…")}
        async for news in self.studio.draw(values, request.session_hash or "", client):
            yield self._told(news, desktop)
        yield {
            parts.draw: gr.update(interactive=True, value="Draw"),
            parts.cancel: gr.update(visible="hidden"),
            self.desktop: desktop,
        }

    def _values(self, given: Updates, times: int) -> dict[str, Any]:
        """Return the values of the controls by name, those of files as paths."""
        values = {name: given[component] for name, component in self.parts.values.items()}
        for mode in MODES.values():
            if mode.picture is not None and mode.picture != "painted":
                values[mode.picture] = path_of(values[mode.picture])
        return values | {"painted": paths_of(values["painted"], times)}

    def _told(self, news: News, desktop: Desktop) -> Updates:
        parts = self.parts
        told: Updates = {parts.status: said(news.says, news.failed)}
        if news.drawn is not None:
            desktop.add(news.drawn)
        if news.drawn is not None or (news.failed and desktop.current is not None):
            return told | self._views(desktop)
        if news.tiles:
            told[parts.stage] = drawing_html(news.tiles)
        return told

    def _views(self, desktop: Desktop) -> Updates:
        if desktop.current is None:
            return {}
        return {
            self.parts.stage: drawn_html(desktop.current, desktop.chosen),
            self.parts.history: history_html(desktop.history, desktop.shown),
        }

    def cancel(self, request: gr.Request) -> None:
        """Cancel what is being drawn for a page."""
        self.studio.leave(request.session_hash or "")

    def show(self, desktop: Desktop, event: gr.EventData) -> Updates:
        """Look at something of the history, with its settings in the controls."""
        index = int(event.index)
        if not 0 <= index < len(desktop.history):
            return {self.desktop: desktop}
        desktop.shown, desktop.chosen = index, 0
        return {self.desktop: desktop, **self._views(desktop), **self._filled(desktop)}

    def again(self, desktop: Desktop, event: gr.EventData) -> Updates:
        """Put the settings of the picture that is seen into the controls, its seed among them."""
        desktop.chosen = int(event.index)
        return {self.desktop: desktop, **self._filled(desktop, alone=True)}

    def _filled(self, desktop: Desktop, alone: bool = False) -> Updates:
        drawn = desktop.current
        if drawn is None:
            return {}
        values = dict(drawn.values)
        desktop.times = (values["painted"] or {}).get("times", 1)
        if alone and desktop.chosen < len(drawn.seeds):
            values["seed"] = str(drawn.seeds[desktop.chosen])
            values["num_images"] = 1
        return {self.parts.values[name]: value for name, value in values.items()}

    def idea(self, event: gr.EventData) -> Updates:
        """Put a prompt that was offered into its place."""
        return {self.parts.values["prompt"]: str(event.text), self.parts.values["mode"]: "text"}

    def use(self, desktop: Desktop, event: gr.EventData) -> Updates:
        """Choose a picture, or take it as the one to change."""
        parts, what, drawn = self.parts, str(event.what), desktop.current
        if drawn is None or not 0 <= int(event.index) < len(drawn.links):
            return {self.desktop: desktop}
        desktop.chosen = int(event.index)
        told: Updates = {self.desktop: desktop, **self._views(desktop)}
        name = MODES[what].picture if what in MODES else None
        if name is None:
            return told
        try:
            data = self.studio.picture(drawn.links[desktop.chosen])
            if what == "inpaint":
                data, desktop.times = enlarged(data, self.studio.desk.limits)
        except (ApiError, LatentDiffError) as error:
            return told | {parts.status: said(str(api_error(error)), True)}
        target = parts.values[name]
        path = store(data, target)
        value = _unpainted(path) if what == "inpaint" else path
        return told | {parts.values["mode"]: what, target: value, parts.status: said(HINTS[what])}

    def paint(self, given: Any, desktop: Desktop) -> Updates:
        """Enlarge a small picture that was chosen to paint on."""
        editor = self.parts.values["painted"]
        chosen, limits = paths_of(given, 1), self.studio.desk.limits
        if chosen is None or chosen["background"] is None:
            return {self.desktop: desktop}
        try:
            data = read(chosen["background"], "the picture")
            image = decoded(data, "image", limits)
            if reduced(image, desktop.times) is not image:  # it was enlarged before
                return {self.desktop: desktop}
            data, desktop.times = enlarged(data, limits)
        except (ApiError, LatentDiffError) as error:
            return {self.desktop: desktop, self.parts.status: said(str(api_error(error)), True)}
        told: Updates = {self.desktop: desktop}
        return told | {editor: _unpainted(store(data, editor))} if desktop.times > 1 else told

    def read(self, file: Any) -> Updates:
        """Put the settings of a dropped picture into the controls."""
        parts, path = self.parts, path_of(file)
        if path is None:
            return {parts.status: ""}
        try:
            values, note = values_of_file(path, self.studio.models)
        except (ApiError, LatentDiffError) as error:
            name = path.rpartition("/")[2]
            return {parts.status: said(str(api_error(error)).replace(path, name), True)}
        told = f"These are the settings of the picture{f'; {note}' if note else ''}."
        return {**{parts.values[name]: value for name, value in values.items()}, parts.status: said(told)}

    def add_lora(self, prompt: str | None, name: str | None) -> Updates:
        """Add a LoRA to the prompt, where its weight can be changed."""
        if not name:
            return {self.parts.lora: None}
        return {self.parts.values["prompt"]: f"{prompt or ''} <lora:{name}:0.8>".strip(), self.parts.lora: None}


# The brush draws all the time, which costs much without a GPU, so it is there from when it is first needed.
SHOWN_WHEN_NEEDED = "(mode) => ({ __type__: 'update', ...(mode === 'inpaint' && { visible: true }) })"

HINTS = {
    "image": "Say in the prompt what the picture is to become, then draw.",
    "inpaint": "Paint over what is to be drawn anew, then draw.",
    "outpaint": "Say how many pixels are drawn at which side, then draw.",
    "upscale": "Draw to enlarge the picture.",
}


def _unpainted(path: str) -> dict[str, Any]:
    return {"background": path, "layers": [], "composite": path}


def said(text: str, failed: bool = False) -> str:
    """Return words to the user."""
    role = "alert" if failed and text != "Cancelled." else "status"
    return f'<p role="{role}">{escape(text)}</p>' if text else ""


def connect(page: gr.Blocks, parts: Parts, studio: Studio) -> None:
    """Let things happen on a page."""
    desktop = gr.State(Desktop())
    events = Events(parts, studio, desktop)
    controls = list(parts.values.values())
    views = [parts.status, parts.stage, parts.history, desktop]
    how: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    how |= {"preprocess": False}  # which would open files
    drawing = {"fn": events.draw, "inputs": {*controls, desktop}, "outputs": [*views, parts.draw, parts.cancel]}
    parts.draw.click(**drawing, **how)
    parts.cancel.click(events.cancel, None, None, **how)
    parts.stage.submit(events.again, desktop, [desktop, *controls], **how).then(**drawing, **how)
    parts.stage.input(events.idea, None, controls, **how).then(**drawing, **how)
    parts.stage.select(events.use, desktop, [*views, *controls], **how)
    parts.history.select(events.show, desktop, [*views, *controls], **how)
    editor, mode = parts.values["painted"], parts.values["mode"]
    mode.change(None, mode, editor, js=SHOWN_WHEN_NEEDED, api_visibility="private")
    editor.upload(events.paint, [editor, desktop], [editor, desktop, parts.status], **how)
    parts.dropped.upload(events.read, parts.dropped, [parts.status, *controls], **how)
    parts.lora.input(events.add_lora, [parts.values["prompt"], parts.lora], [*controls, parts.lora], **how)
    page.unload(events.cancel)

"""Draw for programs: gradio's client asks the page's server, and gets files."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import gradio as gr

from latentdiff.errors import InputError, suggest
from latentdiff.generation.options import options_of
from latentdiff.generation.request import Settings
from latentdiff.serve.page.drawing import Studio
from latentdiff.serve.page.files import store
from latentdiff.serve.page.modes import modes_of

__all__ = ["offer"]

MODE = "text"
BESIDES = ("model", "size")  # what may be given that is no option


def offer(studio: Studio, component: Any) -> None:
    """Let gradio's client draw by a page, inside `gr.Blocks`.

        client = gradio_client.Client("http://127.0.0.1:8000/ui/")
        files = client.predict("a red fox", {"seed": 7, "num_images": 2}, api_name="/draw")

    Args:
        studio: draws.
        component: whose files the pictures are put to, from where the client fetches them.
    """

    async def draw(prompt: str, settings: dict[str, Any], request: gr.Request) -> list[dict[str, Any]]:
        """Draw pictures of a prompt; settings are those of Pipeline, and model and size."""
        try:
            values = _values(prompt, settings)
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error
        client, found = request.client.host if request.client is not None else "", list[str]()
        async for news in studio.draw(values, uuid.uuid4().hex, client):
            if news.failed:
                raise gr.Error(news.says, print_exception=False)
            if news.drawn is not None:
                found = [store(studio.picture(link), component) for link in news.drawn.links]
        return [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in found]

    gr.api(draw, api_name="draw", concurrency_limit=None)


def _values(prompt: str, settings: object) -> dict[str, Any]:
    """Return the values of a page's controls that mean the same.

    Raises:
        InputError: a setting that there is not.
    """
    given: Mapping[str, Any] = settings if isinstance(settings, dict) else {}
    known = [name for name, declared in options_of(Settings).items() if MODE in modes_of(name, declared)]
    known = [*BESIDES, *(name for name in known if name not in ("width", "height"))]
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        raise InputError(f"settings have no {unknown[:80]!r}{suggest(unknown, known)}")
    return {**given, "prompt": prompt if isinstance(prompt, str) else "", "mode": MODE}

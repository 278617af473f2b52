"""The page on the application of a server."""

from __future__ import annotations

import asyncio
import atexit
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
from fastapi import FastAPI
from starlette.types import ASGIApp

from latentdiff.serve.http.desk import Desk
from latentdiff.serve.http.guard import PAGE
from latentdiff.serve.http.links import Links
from latentdiff.serve.http.models import Models
from latentdiff.serve.page.door import Door
from latentdiff.serve.page.drawing import Studio
from latentdiff.serve.page.events import connect
from latentdiff.serve.page.files import Page
from latentdiff.serve.page.layout import lay_out
from latentdiff.serve.page.program import offer

__all__ = ["mount_page"]

HERE = Path(__file__).parent
TEMPORARY = "GRADIO_TEMP_DIR"  # where gradio keeps uploaded files; it looks there whenever it makes a component anew
KEPT_SECONDS, LOOKED_SECONDS = 2 * 3600, 600  # how long that is, and how often it looks
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]


def mount_page(app: FastAPI, models: Models, desk: Desk, links: Links, token: str | None) -> ASGIApp:
    """Add the page to an application and return the door before both.

    Args:
        app: the application.
        models: that are served.
        desk: takes what is asked for.
        links: keep the pictures.
        token: see `Door`.
    """
    with ThreadPoolExecutor(1) as pool:  # gradio makes event loops, and leaves them, where none runs
        pool.submit(lambda: asyncio.run(_mount(app, models, desk, links))).result()
    return Door(app, token)


async def _mount(app: FastAPI, models: Models, desk: Desk, links: Links) -> None:
    _settle()
    page = Page(
        title="latentdiff", analytics_enabled=False, fill_width=True, delete_cache=(LOOKED_SECONDS, KEPT_SECONDS)
    )
    with page:
        parts, studio = lay_out(models, desk.limits), Studio(models, desk, links)
        offer(studio, parts.dropped)  # first, since it has the name that it asks for then
        connect(page, parts, studio)
    page.queue(api_open=False)
    gr.mount_gradio_app(
        app,
        page,
        PAGE,
        theme=_theme(),
        css=(HERE / "style.css").read_text(encoding="utf-8"),
        head=f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
        max_file_size=desk.limits.image_bytes,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        show_error=True,
    )


def _settle() -> None:
    """Let gradio keep files in a folder that no other user of the machine can read, and no statistics, from now on."""
    if TEMPORARY not in os.environ:
        os.environ[TEMPORARY] = tempfile.mkdtemp(prefix="latentdiff-page-")
        atexit.register(shutil.rmtree, os.environ[TEMPORARY], ignore_errors=True)
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(sys.maxsize)


def _theme() -> gr.themes.Base:
    """Return colours that contrast as they should, and fonts that every machine has."""
    return gr.themes.Base(
        primary_hue="orange", neutral_hue="stone", font=FONT, font_mono=["ui-monospace", "monospace"]
    ).set(
        body_background_fill="#faf9f7",
        body_background_fill_dark="#171412",
        body_text_color_subdued="#57534e",
        body_text_color_subdued_dark="#c4bdb6",
        block_info_text_color="#57534e",
        block_info_text_color_dark="#c4bdb6",
        block_label_text_color="#44403c",
        block_label_text_color_dark="#d6d3d1",
        block_title_text_color="#292524",
        block_title_text_color_dark="#e7e5e4",
        block_background_fill="#ffffff",
        block_background_fill_dark="#211d1a",
        block_border_color="#e2ddd8",
        block_border_color_dark="#3b352f",
        input_background_fill="#ffffff",
        input_background_fill_dark="#171412",
        input_border_color="#a8a29e",
        input_border_color_dark="#57534e",
        input_border_color_focus="#c2410c",
        input_border_color_focus_dark="#fb923c",
        input_border_width="1px",
        input_placeholder_color="#6f6963",
        input_placeholder_color_dark="#a8a29e",
        button_primary_background_fill="#c2410c",
        button_primary_background_fill_dark="#c2410c",
        button_primary_background_fill_hover="#9a3412",
        button_primary_background_fill_hover_dark="#9a3412",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        slider_color="#c2410c",
        slider_color_dark="#fb923c",
        checkbox_background_color_selected="#c2410c",
        checkbox_background_color_selected_dark="#c2410c",
        block_radius="12px",
        input_radius="8px",
    )

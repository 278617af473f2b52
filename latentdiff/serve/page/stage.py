"""The HTML of what is drawn: tiles with previews, then pictures, what can be done with them, and the history."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from PIL import Image

__all__ = ["Drawn", "Tile", "drawing_html", "drawn_html", "empty_html", "history_html", "small_picture"]

IDEAS = ("a red fox", "a rocket in the night sky", "a slice of watermelon", "a happy penguin")
THUMB = 96  # pixels of the longer side
ACTIONS = (
    ("again", "Draw again"),
    ("image", "Change"),
    ("inpaint", "Inpaint"),
    ("outpaint", "Outpaint"),
    ("upscale", "Upscale"),
)


@dataclass
class Tile:
    """A picture in the making.

    Attributes:
        step, steps: done, and how many there are; 0 of 0 before it is let in.
        source: of what is shown, an address or data.
        done: whether that is the picture itself.
    """

    step: int = 0
    steps: int = 0
    source: str = ""
    done: bool = False


@dataclass(frozen=True)
class Drawn:
    """What was drawn at once.

    Attributes:
        prompt: it was drawn of.
        links: to the pictures.
        seeds: that make them again.
        thumb: a small one of the first, as data.
        values: of the controls it was drawn with.
        size: width and height of the pictures.
        notes: on them.
    """

    prompt: str
    links: list[str]
    seeds: list[int]
    thumb: str
    size: tuple[int, int]
    values: dict[str, Any] = field(repr=False)
    notes: tuple[str, ...] = ()


def empty_html(ideas: bool) -> str:
    """Return what is seen before anything is drawn.

    Args:
        ideas: offer prompts, which fit the embedded model.
    """
    buttons = "".join(f'<button type="button" class="idea" data-do="idea">{escape(text)}</button>' for text in IDEAS)
    offered = f'<p>Write a prompt, or try one:</p><div class="ideas">{buttons}</div>' if ideas else ""
    return (
        f'<div class="empty"><h2>Your pictures appear here</h2>{offered or "<p>Write a prompt, then draw.</p>"}</div>'
    )


def drawing_html(tiles: Sequence[Tile]) -> str:
    """Return the tiles of pictures in the making."""
    figures = "".join(_tile(number, tile) for number, tile in enumerate(tiles, 1))
    return f'<div class="tiles {_count(tiles)}">{figures}</div>'


def _tile(number: int, tile: Tile) -> str:
    name = f"picture {number}"
    image = f'<img src="{escape(tile.source)}" alt="Preview of {name}">' if tile.source else '<div class="blank"></div>'
    if tile.done:
        return f"<figure>{image}</figure>"
    of = f' max="{tile.steps}" value="{tile.step}"' if tile.steps else ""
    return f'<figure class="unfinished">{image}<progress aria-label="Steps of {name}"{of}></progress></figure>'


def drawn_html(drawn: Drawn, chosen: int) -> str:
    """Return pictures, the chosen one of them marked, and what can be done with that."""
    prompt = escape(drawn.prompt or "without a prompt")
    figures = list[str]()
    for index, link in enumerate(drawn.links):
        picture = f'<img src="{escape(link)}" alt="{prompt}" width="{drawn.size[0]}" height="{drawn.size[1]}">'
        pressed = f'aria-pressed="{str(index == chosen).lower()}" aria-label="Picture {index + 1}"'
        several = f'<button type="button" data-do="choose" data-index="{index}" {pressed}>{picture}</button>'
        figures.append(f"<figure>{several if len(drawn.links) > 1 else picture}</figure>")
    link, seed = escape(drawn.links[chosen]), drawn.seeds[chosen]
    buttons = "".join(
        f'<button type="button" data-do="{action}" data-index="{chosen}">{label}</button>' for action, label in ACTIONS
    )
    saved = f'<a class="save" href="{link}" download="latentdiff-{seed}.png">Save PNG</a>'
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in drawn.notes)
    size = f"{drawn.size[0]}x{drawn.size[1]}"
    return (
        f'<div class="tiles {_count(drawn.links)}">{"".join(figures)}</div>'
        f'<div class="actions" role="group" aria-label="The picture">{saved}{buttons}</div>'
        f'<p class="caption">{prompt}<span>seed {seed}</span><span>{size}</span></p>{notes}'
    )


def history_html(history: Sequence[Drawn], shown: int | None) -> str:
    """Return the small pictures of what was drawn before, the newest first."""
    if not history:
        return ""
    items = list[str]()
    for index in reversed(range(len(history))):
        drawn = history[index]
        current = ' aria-current="true"' if index == shown else ""
        name = escape(drawn.prompt or "without a prompt")
        count = f"<span>{len(drawn.links)}</span>" if len(drawn.links) > 1 else ""
        items.append(
            f'<li><button type="button" data-do="show" data-index="{index}" title="{name}"{current}>'
            f'<img src="{drawn.thumb}" alt="{name}">{count}</button></li>'
        )
    return f'<h2>History</h2><ul class="history">{"".join(items)}</ul>'


def small_picture(image: Image.Image, side: int | None = None) -> str:
    """Return a picture as data for an address, reduced to a side."""
    shown = image.convert("RGBA" if image.mode == "RGBA" else "RGB")
    if side is not None:
        shown.thumbnail((side, side))
    buffer = io.BytesIO()
    shown.save(buffer, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _count(tiles: Sequence[object]) -> str:
    """Return the class for a number of tiles."""
    return "one" if len(tiles) == 1 else "few" if len(tiles) <= 4 else "many"

"""Files that a browser uploads: paths of them, as they came; nothing but `latentdiff.decoding` ever opens one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from PIL import Image, ImageChops

from latentdiff.errors import InputError
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.orders import decoded

__all__ = ["Page", "enlarged", "path_of", "paths_of", "read", "reduced", "store"]

MOST_BLOBS = 16
COMFORTABLE = 512  # pixels of the longer side of a picture that is painted on


class Page(gr.Blocks):
    """A page whose requests name uploaded files, and no addresses, which gradio would fetch."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], state: Any, *more: Any, **options: Any) -> Any:
        """Prepare what a function of the page is called with: all files as paths."""
        if _names_address(inputs):
            raise gr.Error("a picture must be an uploaded file; no address is ever fetched")
        own = state if state is not None else {}  # in which gradio keeps components that it made anew for one page
        given = [
            _collected(value, own.get(block._id, block)) if isinstance(block, gr.ImageEditor) else value
            for block, value in zip(block_fn.inputs, inputs)
        ]
        return await super().preprocess_data(block_fn, given, state, *more, **options)


def _collected(given: Any, editor: gr.ImageEditor) -> Any:
    """Return a picture with a brush that was sent in parts as files; anything else as it is."""
    if not isinstance(given, dict) or given.get("id") is None:
        return given
    sent = editor.blob_storage.pop(str(given["id"]), None)
    while len(editor.blob_storage) > MOST_BLOBS:  # of those that were never drawn with the oldest goes
        editor.blob_storage.pop(next(iter(editor.blob_storage)))
    if sent is None:
        return None

    def file(data: Any) -> dict[str, Any] | None:
        return None if data is None else {"path": store(bytes(data), editor), "meta": {"_type": "gradio.FileData"}}

    layers = [file(layer) for layer in sent.layers if layer is not None]
    return {"background": file(sent.background), "layers": layers, "composite": None}


def path_of(given: Any) -> str | None:
    """Return the path of an upload box, from what it holds."""
    path = given.get("path") if isinstance(given, dict) else None
    return path if isinstance(path, str) else None


def paths_of(given: Any, times: int) -> dict[str, Any] | None:
    """Return the paths "background" and "layers" of a picture with a brush, from what it holds.

    Args:
        given: what it holds.
        times: see `enlarged`.
    """
    if not isinstance(given, dict):
        return None
    background, layers = path_of(given.get("background")), map(path_of, given.get("layers") or [])
    strokes = [one for one in layers if one is not None]
    return {"background": background, "layers": strokes, "composite": background, "times": times}


def enlarged(data: bytes, limits: Limits) -> tuple[bytes, int]:
    """Return a picture so large that a brush can paint on it, and how many times larger; reduced, it is the same again.

    Raises:
        ApiError, InputError: it is too large, or no picture.
    """
    image = decoded(data, "image", limits)
    times = max(1, COMFORTABLE // max(image.size))
    if times == 1:
        return data, 1
    buffer = io.BytesIO()
    image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue(), times


def reduced(image: Image.Image, times: int) -> Image.Image:
    """Return a picture as it was before `enlarged`; as it is where it was not."""
    if times < 2 or image.width % times or image.height % times:
        return image
    small = image.reduce(times)
    same = (
        ImageChops.difference(small.resize(image.size, Image.Resampling.NEAREST), image).getbbox(alpha_only=False)
        is None
    )
    return small if same else image


def read(path: str, what: str) -> bytes:
    """Return the bytes of an uploaded file.

    Raises:
        InputError: it has been deleted, as all are after some time.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{what} is no longer here; choose it again") from error


def store(data: bytes, component: Any) -> str:
    """Write a picture to where the files of a component are, and return its path."""
    return save_bytes_to_cache(data, "picture.png", component.GRADIO_CACHE)


def _names_address(value: Any) -> bool:
    """Return whether a value from a browser holds a file with an address for a path."""
    if isinstance(value, dict):
        path = value.get("path")
        named = isinstance(path, str) and "://" in path
        return named or any(map(_names_address, value.values()))
    return isinstance(value, list) and any(map(_names_address, value))

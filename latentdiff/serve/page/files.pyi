"""Components of gradio that hand over uploaded files as they are, which nothing but `latentdiff.decoding` ever opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache

from latentdiff.errors import InputError

__all__ = ["Dropped", "Editor", "Few", "Page", "Picture", "read", "store"]

MOST_BLOBS = 16


class Page(gr.Blocks):
    """A page whose requests name uploaded files, and no addresses, which gradio would fetch."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *more: Any, **options: Any) -> Any:
        """Prepare what a function of the page is called with."""
        if _names_address(inputs):
            raise gr.Error("a picture must be an uploaded file; no address is ever fetched")
        return await super().preprocess_data(block_fn, inputs, *more, **options)

from gradio.events import Dependency

class Picture(gr.Image):
    """An upload box for a picture, whose value is the path of the file."""

    def get_block_name(self) -> str:
        """Return what gradio calls it in the browser."""
        return "image"

    def preprocess(self, payload: Any) -> str | None:
        """Return the path of the file."""
        return None if payload is None else payload.path
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component


class Dropped(gr.File):
    """A place to drop a file, whose value is its path."""

    def get_block_name(self) -> str:
        """Return what gradio calls it in the browser."""
        return "file"

    def preprocess(self, payload: Any) -> str | None:
        """Return the path of the file."""
        return None if payload is None else payload.path
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component


class Editor(gr.ImageEditor):
    """A picture with a brush, whose value is the paths of the picture and of what was painted."""

    def get_block_name(self) -> str:
        """Return what gradio calls it in the browser."""
        return "imageeditor"

    def preprocess(self, payload: Any) -> dict[str, Any] | None:
        """Return the path "background" and the paths "layers", each a file as the browser sent it."""
        if payload is None:
            return None
        given = payload if payload.id is None else self.blob_storage.pop(payload.id, None)
        if given is None:
            return None
        paths = {"background": self._path(given.background), "layers": [self._path(one) for one in given.layers or []]}
        paths["composite"] = paths["background"]
        return {**paths, "layers": [path for path in paths["layers"] if path is not None]}

    def _path(self, file: Any) -> str | None:
        if file is None:
            return None
        return store(bytes(file), self) if isinstance(file, (bytes, bytearray, memoryview)) else str(file.path)
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component


class Few(dict[str, Any]):
    """What browsers sent of a brush and have not drawn with yet; the oldest goes where there is much of it."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        while len(self) > MOST_BLOBS:
            del self[next(iter(self))]


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
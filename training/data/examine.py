"""Examine every picture of a source once: its hash and size, or why it cannot be used; kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from latentdiff.errors import StorageError
from latentdiff.images import write_file

from .image_info import ImageInfo, decode_image, info_of, make_folder, try_info
from .prefetch import prefetched
from .sources import Source


def read_image(source: Source, place: int) -> tuple[str, Image.Image]:
    """Read a picture of a source; see `decode_image`.

    Raises:
        ValueError: it cannot be read or decoded; the message names it.
    """
    name = source.names[place]
    try:
        data = source.read(place)
    except StorageError:  # of the network, not of this picture
        raise
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror or error})") from error
    return decode_image(data, name)


def examine(source: Source, look: Callable[[int], ImageInfo]) -> list[ImageInfo | str]:
    """Return what is found of every picture of a source.

    Args:
        look: returns it for one, by its number.
    """

    def attempt(place: int) -> ImageInfo | str:
        return try_info(lambda: look(place), source.names[place])

    numbers = range(len(source))
    quiet = len(source) < 1000
    return list(tqdm(prefetched(attempt, numbers), "pictures", len(source), unit="picture", disable=quiet))


def examined(source: Source, cache: Path) -> Sequence[ImageInfo | str]:
    """Return what is found of every picture of a source, from the cache or the source where it was found before.

    Raises:
        StorageError: the cache cannot be written.
    """
    if source.findings is not None:
        return source.findings
    make_folder(cache)
    with FileLock(cache / "pictures.lock"):  # one process looks, the others read what it found
        if not _file(source, cache).exists():
            save_examined(examine(source, lambda place: info_of(*read_image(source, place))), source, cache)
    return json.loads(_file(source, cache).read_text())


def save_examined(findings: Sequence[ImageInfo | str], source: Source, cache: Path) -> None:
    """Write down what was found of a source, for `examined`.

    Raises:
        StorageError: the cache cannot be written.
    """
    make_folder(cache)
    write_file(_file(source, cache), json.dumps(findings).encode())


def _file(source: Source, cache: Path) -> Path:
    """Return a name that changes when pictures may have: a hash of their names, and of sizes and times of files."""
    digest = hashlib.sha256(json.dumps(list(source.names)).encode())
    for file in source.files:
        status = file.stat() if file.exists() else None
        digest.update(f"{file}\0{status and (status.st_size, status.st_mtime_ns)}\n".encode())
    return cache / f"pictures-{digest.hexdigest()[:16]}.json"

"""What is found of a picture when it is first decoded, its hash and size or why it cannot be used; kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from latentdiff.errors import StorageError
from latentdiff.images import decode_rgba, write_file
from training.loading import prefetched

if TYPE_CHECKING:
    from training.sources import Source

Finding = tuple[str, int, int]  # of a picture: SHA-256 of its file, width and height


def look_at(data: bytes, name: str) -> tuple[str, Image.Image]:
    """Return the SHA-256 of an encoded picture, and the picture as RGBA.

    Args:
        name: of the picture, for messages.

    Raises:
        ValueError: it is empty, or cannot be decoded.
    """
    if not data:
        raise ValueError(f"{name} is empty (0 bytes)")
    return hashlib.sha256(data).hexdigest(), decode_rgba(data, name)


def finding_of(digest: str, image: Image.Image) -> Finding:
    """Return what is kept of a picture that was decoded."""
    return digest, *image.size


def found(look: Callable[[], Finding], name: str) -> Finding | str:
    """Return what is found of a picture, or why there is nothing to be found."""
    try:
        return look()
    except ValueError as error:
        return str(error).removeprefix(f"{name} ")


def decode(source: Source, place: int) -> tuple[str, Image.Image]:
    """Read a picture of a source; see `look_at`.

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
    return look_at(data, name)


def examine(source: Source, look: Callable[[int], Finding]) -> list[Finding | str]:
    """Return what is found of every picture of a source.

    Args:
        look: returns it for one, by its number.
    """

    def attempt(place: int) -> Finding | str:
        return found(lambda: look(place), source.names[place])

    numbers = range(len(source))
    quiet = len(source) < 1000
    return list(tqdm(prefetched(attempt, numbers), "pictures", len(source), unit="picture", disable=quiet))


def known(source: Source, cache: Path) -> Sequence[Finding | str]:
    """Return what is found of every picture of a source, from the cache or the source where it was found before.

    Raises:
        StorageError: the cache cannot be written.
    """
    if source.findings is not None:
        return source.findings
    make_folder(cache)
    with FileLock(cache / "pictures.lock"):  # one process looks, the others read what it found
        if not _file(source, cache).exists():
            keep(examine(source, lambda place: finding_of(*decode(source, place))), source, cache)
    return json.loads(_file(source, cache).read_text())


def keep(findings: Sequence[Finding | str], source: Source, cache: Path) -> None:
    """Write down what was found of a source, for `known`.

    Raises:
        StorageError: the cache cannot be written.
    """
    make_folder(cache)
    write_file(_file(source, cache), json.dumps(findings).encode())


def make_folder(folder: Path) -> None:
    """Make a folder, with those above it.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror}; choose another place") from error


def _file(source: Source, cache: Path) -> Path:
    """Return a name that changes when pictures may have: a hash of their names, and of sizes and times of files."""
    digest = hashlib.sha256(json.dumps(list(source.names)).encode())
    for file in source.files:
        status = file.stat() if file.exists() else None
        digest.update(f"{file}\0{status and (status.st_size, status.st_mtime_ns)}\n".encode())
    return cache / f"pictures-{digest.hexdigest()[:16]}.json"

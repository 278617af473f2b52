"""Examine every picture of a source once: its hash and size, or why it cannot be used; kept on disk."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from latentdiff.errors import InputError, StorageError
from latentdiff.files import is_file, make_folder, parse_json, read_file, stamp, write_file

from .image_info import ImageInfo, decoded, info_of, is_finding, locked, try_info
from .prefetch import prefetched
from .source import Source

MAX_FINDINGS_BYTES = 2**30


@contextmanager
def read_image(source: Source, place: int) -> Iterator[tuple[str, Image.Image]]:
    """Open a picture of a source; see `decoded`.

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
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error
    with decoded(data, name) as found:
        yield found


def examine(source: Source, read_info: Callable[[int], ImageInfo]) -> list[ImageInfo | str]:
    """Return what is found of every picture of a source.

    Args:
        read_info: returns it for one, by its number.
    """

    def attempt(place: int) -> ImageInfo | str:
        return try_info(lambda: read_info(place), source.names[place])

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
    with locked(cache / "pictures.lock"):  # one process looks, the others read what it found
        if (kept := _kept(source, cache)) is not None:
            return kept
        findings = examine(source, lambda place: _read_info(source, place))
        save_examined(findings, source, cache)
    return findings


def _read_info(source: Source, place: int) -> ImageInfo:
    with read_image(source, place) as found:
        return info_of(*found)


def _kept(source: Source, cache: Path) -> Sequence[ImageInfo | str] | None:
    """Return what was written down of a source; None where that is not there, or damaged."""
    file = _file(source, cache)
    if not is_file(file):
        return None
    try:
        findings = parse_json(read_file(file, MAX_FINDINGS_BYTES), str(file))
    except InputError:
        findings = None
    if isinstance(findings, list) and len(findings) == len(source) and all(map(is_finding, findings)):
        return findings
    print(f"{file} is damaged; the pictures are examined again", file=sys.stderr)
    return None


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
        digest.update(f"{file}\0{stamp(file)}\n".encode("utf-8", "backslashreplace"))
    return cache / f"pictures-{digest.hexdigest()[:16]}.json"

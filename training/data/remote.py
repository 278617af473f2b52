"""Files behind a URL, read by ranges of bytes: http and https with the standard library, all else with fsspec.

Nothing stays open between two reads, so any thread may read, and any process forked from this one. A read that fails
is tried again a few times. As any range can be read at any time, no place in a stream has to be saved: the cursor of a
run is the step in its checkpoint, from which all that it reads follows.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException, InvalidURL
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from latentdiff.errors import InputError, LatentDiffError, MissingDependencyError, StorageError

from .prefetch import prefetched

BLOCK = 4 * 2**20  # bytes that are asked for at once when a file is read from end to end
AT_ONCE = 4  # such requests under way
ATTEMPTS = 5
WAIT = 1.0  # seconds before the second attempt, twice as long before each further one
TIMEOUT = 60.0  # seconds without a byte
# Answers of a server that may be others a moment later.
PASSING = {408, 425, 429, 500, 502, 503, 504}
# What file systems call that which changes with the content of a file, the surest first.
TAGS = ("ETag", "etag", "sha256", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")

Result = TypeVar("Result")


@dataclass(frozen=True)
class RemoteFile:
    """What is known of a file behind a URL: its size in bytes, and a tag that changes with it where there is one."""

    url: str
    size: int
    tag: str

    @property
    def name(self) -> str:
        """What it is called without its folder."""
        return urlsplit(self.url).path.rpartition("/")[2]


def is_remote(place: str) -> bool:
    """Say whether a place is a URL."""
    return "://" in place


def without_secrets(url: str) -> str:
    """Return a URL for messages and names in a cache, without what may be a password or signature."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def look_up(url: str) -> RemoteFile:
    """Find a file and see that parts of it can be read.

    Raises:
        InputError: there is no such file, or its server gives only whole files.
        StorageError: the server cannot be reached.
    """
    try:
        return _attempted(url, lambda: _look_up_http(url) if _is_http(url) else _look_up_elsewhere(url))
    except _GoneError as error:
        raise InputError(f"{without_secrets(url)} cannot be read ({error}); check the address") from error


def read_range(url: str, start: int, size: int) -> bytes:
    """Return `size` bytes of a file from byte `start` on.

    Raises:
        StorageError: they cannot be read, even when asked for several times.
    """
    try:
        return _attempted(url, lambda: _read(url, start, size))
    except _GoneError as error:
        raise StorageError(
            f"{without_secrets(url)} cannot be read any more ({error}); --resume goes on later"
        ) from error


class Forward:
    """A file read once from its first byte to its last, in large parts that are asked for ahead.

    What `tarfile` needs to read an archive: it may go back within the part that was read last.
    """

    def __init__(self, file: RemoteFile) -> None:
        self.file, self.position = file, 0
        self.start, self.block = 0, b""
        count = -(-file.size // BLOCK)
        self.blocks: Iterator[bytes] = prefetched(self._fetch, range(count), threads=AT_ONCE)

    def _fetch(self, number: int) -> bytes:
        start = number * BLOCK
        return read_range(self.file.url, start, min(BLOCK, self.file.size - start))

    def tell(self) -> int:
        """Return the place of the next byte."""
        return self.position

    def seek(self, position: int) -> int:
        """Go to another place."""
        self.position = position
        return position

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, or what there is before the end."""
        if self.position < self.start:
            raise ValueError(f"byte {self.position} has gone by")
        parts = []
        while size > 0 and self.position < self.file.size:
            while self.position >= self.start + len(self.block):
                self.start += len(self.block)
                self.block = next(self.blocks)
            first = self.position - self.start
            parts.append(self.block[first : first + size])
            self.position += len(parts[-1])
            size -= len(parts[-1])
        return b"".join(parts)

    def close(self) -> None:
        """Ask for nothing more."""
        self.blocks.close()  # type: ignore[attr-defined]


class _GoneError(Exception):
    """The file is not there, or not for us: asking again does not help."""


def _attempted(url: str, act: Callable[[], Result]) -> Result:
    reason: Exception | None = None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(WAIT * 2 ** (attempt - 1))
        try:
            return act()
        except (LatentDiffError, _GoneError):
            raise
        except HTTPError as error:
            error.close()
            if error.code not in PASSING:
                raise _GoneError(f"HTTP {error.code} {error.reason}") from error
            reason = error
        except (FileNotFoundError, PermissionError, IsADirectoryError, InvalidURL) as error:
            raise _GoneError(str(error) or type(error).__name__) from error
        except Exception as error:  # each kind of file system fails in ways of its own
            reason = error
    text = " ".join(str(reason).split())[:200] or type(reason).__name__
    raise StorageError(
        f"{without_secrets(url)} could not be read in {ATTEMPTS} attempts ({text}); check the network, then go on with "
        "--resume"
    ) from reason


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _get(url: str, start: int, size: int) -> tuple[Any, bytes]:
    """Return the headers and the body of an answer to a request for a range."""
    wanted = {"Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"}
    with urlopen(Request(url, headers=wanted), timeout=TIMEOUT) as answer:
        if answer.status != 206:
            raise InputError(
                f"{without_secrets(url)}: the server gives only whole files (it must answer requests for a range of "
                "bytes); download the shards and name the files"
            )
        return answer.headers, answer.read(size + 1)


def _read(url: str, start: int, size: int) -> bytes:
    if _is_http(url):
        _, data = _get(url, start, size)
    else:
        system, path = _file_system(url)
        data = system.cat_file(path, start=start, end=start + size)
    if len(data) != size:
        raise HTTPException(f"{len(data)} bytes came of {size}")
    return data


def _look_up_http(url: str) -> RemoteFile:
    headers, _ = _get(url, 0, 1)
    total = re.fullmatch(r"bytes 0-0/(\d+)", headers.get("Content-Range", ""))
    if total is None:
        raise _GoneError(f"the server does not say how large it is: {headers.get('Content-Range')}")
    return RemoteFile(url, int(total[1]), headers.get("ETag") or headers.get("Last-Modified") or "")


def _look_up_elsewhere(url: str) -> RemoteFile:
    system, path = _file_system(url)
    known = system.info(path)
    if known.get("type") == "directory" or known.get("size") is None:
        raise _GoneError("it is no file of a known size")
    tag = next((str(known[name]) for name in TAGS if known.get(name) is not None), "")
    return RemoteFile(url, int(known["size"]), tag)


def _file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, made anew in a process that was forked, and the path in it."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise MissingDependencyError(f"{without_secrets(url)} needs another package: {error}") from error
    except ValueError as error:
        raise InputError(f"{without_secrets(url)} is of no kind that is known: {error}") from error

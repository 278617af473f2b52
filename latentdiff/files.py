"""Read files that others have named, and write files whole or not at all; each failure is one line.

Regular files alone are read, no larger than expected: a pipe or device is refused before it is opened, as some hang and
some never end.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from latentdiff.errors import InputError, StorageError, shown

__all__ = [
    "check_writable",
    "fingerprint",
    "is_file",
    "is_folder",
    "make_folder",
    "open_file",
    "parse_json",
    "read_file",
    "require_path",
    "stamp",
    "write_file",
]

KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def open_file(path: str | os.PathLike[str], what: str = "file") -> BinaryIO:
    """Open a regular file to read its bytes.

    Args:
        path: of the file; links are followed.
        what: it is, for messages.

    Raises:
        InputError: there is none, it is no regular file, or it cannot be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        _check_regular(os.stat(path).st_mode, path, what)
        file = os.fdopen(os.open(path, flags), "rb")
        _check_regular(os.fstat(file.fileno()).st_mode, path, what)  # it may be another by now
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise _refusal(path, what, error) from error
    return file


def read_file(path: str | os.PathLike[str], most: int, what: str = "file") -> bytes:
    """Return the content of a regular file.

    Args:
        path: of the file; links are followed.
        most: bytes that it may have.
        what: it is, for messages.

    Raises:
        InputError: as `open_file`, or it is larger.
    """
    with open_file(path, what) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            data = b"" if size > most else file.read(most + 1)
        except OSError as error:
            raise _refusal(path, what, error) from error
    if max(size, len(data)) > most:
        got = f"{max(size, len(data)) / 2**20:,.0f}"
        raise InputError(f"{os.fspath(path)} must be at most {most / 2**20:,.0f} MiB, got {got} MiB; make it smaller")
    return data


def require_path(path: object, what: str) -> Path:
    """Return a path that was given for something.

    Raises:
        InputError: it is none that a file system could have.
    """
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise InputError(f"{what} must be given by its path, got {type(path).__name__}; pass a string")
    try:
        given = os.fsencode(path)
    except UnicodeEncodeError as error:
        raise InputError(f"{what} must be given by a path of this system's letters, got {shown(path)}") from error
    if b"\0" in given:
        raise InputError(f"{what} must be given by a path without NUL, got {shown(path)}; check it")
    return Path(path)


def fingerprint(file: BinaryIO) -> tuple[int, str]:
    """Return size and SHA-256 of what is left of an open file."""
    digest, size = hashlib.sha256(), 0
    while block := file.read(2**20):
        digest.update(block)
        size += len(block)
    return size, digest.hexdigest()


def is_file(path: str | os.PathLike[str]) -> bool:
    """Say whether a path can be looked at and is a regular file."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Say whether a path can be looked at and is a folder."""
    return stat.S_ISDIR(_mode(path))


def stamp(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Return the size of a file and when it was written, in nanoseconds; None where it cannot be looked at."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def parse_json(text: str | bytes, name: str) -> Any:
    """Return what a JSON text says.

    Args:
        text: bytes are UTF-8, with its mark or without.
        name: of its file, for messages.

    Raises:
        InputError: it is no JSON, nested too deep, or holds a number of too many digits.
    """
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise InputError(f"{name} is not JSON that can be read ({reason}); write it again") from error


def write_file(path: str | os.PathLike[str], data: bytes, *, overwrite: bool = True) -> None:
    """Write a file atomically: beside its place, flushed to disk, then renamed; removed on failure or Ctrl-C.

    Args:
        overwrite: replace an existing file.

    Raises:
        FileExistsError: there is such a file, and it is not to be replaced.
        StorageError: the file cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, target)
        else:
            _link(temporary, target)
    except BaseException as error:
        with suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, ValueError)) and not isinstance(error, FileExistsError):
            raise _storage_error(target, error) from error
        raise


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out, before any work is done, that `path` could be written.

    Raises:
        StorageError: its folder is missing or closed, or the path names a folder.
    """
    target = Path(path)
    probe = target.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        if is_folder(target):
            remedy = f"name a file in it, as in {target / 'fox.png'}"
            raise StorageError(f"cannot write {target}: it is a folder; {remedy}")
        with open(probe, "xb"):
            probe.unlink()
        with suppress(FileNotFoundError):
            os.stat(target)  # fails where the name is too long
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        raise _storage_error(target, error) from error


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder for what is written, with those above it, unless it is there, and return it.

    Raises:
        StorageError: it cannot be made.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a name with NUL, or not in the file system's encoding
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"cannot write to {shown(folder)}: {reason}; choose another place, as with --out") from error
    return folder


def _mode(path: str | os.PathLike[str]) -> int:
    try:
        return os.stat(path).st_mode
    except (OSError, ValueError):  # too long, closed, with a NUL
        return 0


def _check_regular(mode: int, path: str | os.PathLike[str], what: str) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in KINDS.items() if test(mode)), "something else")
        raise InputError(f"{os.fspath(path)} must be a regular file, got {kind}; pass the {what} itself")


def _refusal(path: str | os.PathLike[str], what: str, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"cannot read {what} {shown(os.fspath(path), 200)}: {reason}; check the path")


def _link(temporary: Path, target: Path) -> None:
    """Rename a file unless there is one of that name, which `os.replace` would lose."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with open(target, "xb"):
            os.replace(temporary, target)
        return
    temporary.unlink()


def _storage_error(target: Path, error: Exception) -> StorageError:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return StorageError(f"cannot write {target}: there is no folder {str(target.parent)!r}; create it first")
    reason = getattr(error, "strerror", None) or error
    return StorageError(f"cannot write {target}: {reason}; free space or choose another place")

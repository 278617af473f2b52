"""Where a job writes: a local folder, or any place that fsspec knows.

A local file is written under a temporary name, flushed to the disk and renamed, and its folder flushed: it is there
whole, or not at all. Object stores have no rename, so there the order counts: whatever a manifest tells of is written
before it. Errors of a remote store are tried again with longer and longer waits, then told.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from latentdiff.errors import InputError, LatentDiffError, MissingDependencyError, StorageError, shown

__all__ = ["LocalStore", "RemoteStore", "Store", "open_store"]

TEMPORARY = ".tmp"  # folder of what is being written
ATTEMPTS = 6
WAIT = 0.5  # seconds before the second attempt, twice as long before each further one
COPIED_AT_ONCE = 2**20

Result = TypeVar("Result")


class Store(Protocol):
    """Files by their path below one place; folders are made as they are needed.

    All raise StorageError where the place fails.
    """

    place: str

    def list(self, folder: str) -> set[str]:
        """Return the names of the files and folders in a folder; none where it is not there."""

    def read(self, path: str) -> bytes | None:
        """Return the content of a file; None where there is none."""

    def open(self, path: str) -> BinaryIO:
        """Open a file to read any part of it."""

    def writing(self, path: str) -> Any:
        """Return a context that gives a new file to write, which has its name when the context ends without error."""

    def move(self, path: str, to: str) -> None:
        """Rename a file or folder, if it is there, in place of what has that name."""

    def remove(self, path: str) -> None:
        """Remove a file or folder, if it is there."""


def open_store(place: str) -> Store:
    """Return the store at a path or URL.

    Raises:
        InputError: the URL is of no kind that is known.
        StorageError: the folder cannot be made.
    """
    if "://" not in place or place.startswith("file://"):
        return LocalStore(place.removeprefix("file://"))
    return RemoteStore(place)


def write_bytes(store: Store, path: str, data: bytes) -> None:
    """Write a file whole."""
    with store.writing(path) as file:
        file.write(data)


class LocalStore:
    """A folder of this machine, or one that it shares with others.

    Args:
        place: its path; made if it is not there.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self.place = os.fspath(place)
        self.root = Path(place)
        with self._told(""):
            (self.root / TEMPORARY).mkdir(parents=True, exist_ok=True)

    def list(self, folder: str) -> set[str]:
        with self._told(folder):
            try:
                return {entry.name for entry in os.scandir(self.root / folder)}
            except FileNotFoundError:
                return set()

    def read(self, path: str) -> bytes | None:
        with self._told(path):
            try:
                return (self.root / path).read_bytes()
            except FileNotFoundError:
                return None

    def open(self, path: str) -> BinaryIO:
        with self._told(path):
            return open(self.root / path, "rb")

    @contextmanager
    def writing(self, path: str) -> Iterator[BinaryIO]:
        target, temporary = self.root / path, self.root / TEMPORARY / secrets.token_hex(8)
        with self._told(path):
            try:
                with open(temporary, "xb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary, target)
                _flush(target.parent)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise

    def move(self, path: str, to: str) -> None:
        source, target = self.root / path, self.root / to
        with self._told(path):
            if not source.exists():
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(source, target)
            _flush(target.parent)
            _flush(source.parent)

    def remove(self, path: str) -> None:
        target = self.root / path
        with self._told(path):
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def clear_temporary(self) -> None:
        """Remove what killed processes left half written; for the one that holds the lock."""
        for name in self.list(TEMPORARY):
            self.remove(f"{TEMPORARY}/{name}")

    @contextmanager
    def _told(self, path: str) -> Iterator[None]:
        """Name the file where the system refuses."""
        try:
            yield
        except OSError as error:
            if isinstance(error, LatentDiffError):
                raise
            reason = error.strerror or error
            raise StorageError(
                f"cannot write or read {shown(str(self.root / path), 200)}: {reason}; free space or choose another "
                "place, then give the same command again"
            ) from error


def _flush(folder: Path) -> None:
    """Wait until the names in a folder are on the disk; Windows does that by itself.

    As `checkpoints.storage.flush_to_disk`, which comes with torch; planning needs none.
    """
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RemoteStore:
    """A place behind a URL.

    Args:
        place: the URL of a folder.

    Raises:
        InputError: it is of no kind that is known.
        MissingDependencyError: its kind needs another package.
    """

    def __init__(self, place: str) -> None:
        import fsspec

        self.place = place.rstrip("/")
        try:
            self.system, self.root = fsspec.core.url_to_fs(self.place)
        except ImportError as error:
            raise MissingDependencyError(f"{place.partition('://')[0]}:// needs another package: {error}") from error
        except ValueError as error:
            raise InputError(f"OUT {shown(place)} is of no kind that is known: {error}") from error

    def __reduce__(self) -> tuple[type[RemoteStore], tuple[str]]:
        return RemoteStore, (self.place,)  # its connections are of this process

    def list(self, folder: str) -> set[str]:
        def names() -> set[str]:
            self.system.invalidate_cache()
            try:
                found = self.system.ls(self._path(folder), detail=False)
            except FileNotFoundError:
                return set()
            return {one.rstrip("/").rpartition("/")[2] for one in found}

        return self._attempted(folder, names)

    def read(self, path: str) -> bytes | None:
        def content() -> bytes | None:
            try:
                return self.system.cat_file(self._path(path))
            except FileNotFoundError:
                return None

        return self._attempted(path, content)

    def open(self, path: str) -> BinaryIO:
        spool = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._attempted(path, lambda: self._fetch(path, spool))
        except BaseException:
            spool.close()
            raise
        spool.seek(0)
        return spool  # type: ignore[return-value]  # of the same methods

    def _fetch(self, path: str, spool: Any) -> None:
        spool.seek(0)
        with self.system.open(self._path(path), "rb") as file:
            shutil.copyfileobj(file, spool)

    @contextmanager
    def writing(self, path: str) -> Iterator[BinaryIO]:
        folder = tempfile.mkdtemp(prefix="latentdiff-")
        spool = os.path.join(folder, "data")  # so that sending it can be tried again
        try:
            with open(spool, "xb") as file:
                yield file
            self._attempted(path, lambda: self._send(spool, path))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _send(self, spool: str, path: str) -> None:
        target = self._path(path)
        self.system.makedirs(target.rpartition("/")[0], exist_ok=True)
        self.system.put_file(spool, target)
        self.system.invalidate_cache()
        sent, size = self.system.info(target)["size"], os.path.getsize(spool)
        if sent != size:
            raise OSError(f"{sent} of {size} bytes arrived")

    def move(self, path: str, to: str) -> None:
        def moved() -> None:
            source, target = self._path(path), self._path(to)
            if not self.system.exists(source):
                return
            files = self.system.find(source) if self.system.isdir(source) else [source]
            for file in files:  # the copy is whole before the original goes
                goal = target + file[len(source) :]
                self.system.makedirs(goal.rpartition("/")[0], exist_ok=True)
                self.system.cp_file(file, goal)
            self.system.rm(source, recursive=True)
            self.system.invalidate_cache()

        self._attempted(path, moved)

    def remove(self, path: str) -> None:
        def removed() -> None:
            with suppress(FileNotFoundError):
                self.system.rm(self._path(path), recursive=True)
            self.system.invalidate_cache()

        self._attempted(path, removed)

    def _path(self, path: str) -> str:
        return f"{self.root.rstrip('/')}/{path}".rstrip("/")

    def _attempted(self, path: str, act: Callable[[], Result]) -> Result:
        """Act, and where that fails try again some times."""
        reason: Exception | None = None
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(WAIT * 2 ** (attempt - 1))
            try:
                return act()
            except (LatentDiffError, FileNotFoundError, PermissionError) as error:  # another attempt ends as this one
                reason = error
                break
            except Exception as error:  # each kind of file system fails in ways of its own
                reason = error
        text = " ".join(str(reason).split())[:200] or type(reason).__name__
        raise StorageError(
            f"{shown(self.place, 120)}: {path or 'the place'} could not be written or read in {attempt + 1} attempts "
            f"({text}); mend that, then give the same command again"
        ) from reason

"""Write files and folders that appear under their names only when they are whole, and leave all else where it is.

What is written lies in a folder `.tmp-NAME-...` until then, which is locked. One that a killed process left behind is
not, and the next write of that name removes it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.checkpoints.folder import COMPONENTS, INDEX, LOW_RES, PICKLES, SECOND
from latentdiff.errors import InputError, StorageError
from latentdiff.models.tokenizer import FILES

if sys.platform != "win32":
    import fcntl

__all__ = ["flush_to_disk", "replace_folder", "save_tensors", "write_json"]

LONGEST_PART = 40  # characters of a name in that of its temporary folder, for the latter to fit


def save_tensors(tensors: Mapping[str, Tensor], target: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, which appears under its name only when it is whole.

    Equal tensors and metadata give equal files.

    Raises:
        StorageError: the file cannot be written.
    """
    with _storage_errors(target):
        target = target.resolve()  # a link stays one, and what it leads to is replaced
        with _temporary(target.parent, target.name) as place:
            save_file(dict(tensors), place / target.name, metadata=dict(metadata or {"format": "pt"}))
            if metadata is not None and len(metadata) > 1:
                _sort_metadata(place / target.name)
            (place / target.name).chmod(0o644)  # safetensors makes it readable by its owner alone
            flush_to_disk(place / target.name)
            os.replace(place / target.name, target)


def _sort_metadata(file: Path) -> None:
    """Bring the metadata of a safetensors file, which the library writes in any order, into that of their names."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "the library writes JSON without blanks"
        stream.seek(8)
        stream.write(text.ljust(length))


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def replace_folder(folder: Path, mark: str, write: Callable[[Path], None]) -> None:
    """Write a model into a folder, in place of one that is there; whatever else is in the folder stays.

    Args:
        folder: new, empty, or with the file `mark`; a link is followed.
        mark: the file that makes a model of a folder: the old one goes first and the new one comes last, so that a
            process killed in between leaves no mixture of two models that loads.
        write: writes the files and folders of the model into another folder.

    Raises:
        InputError: the folder holds something that is no saved model.
        StorageError: it cannot be written; what was there is as before.
    """
    with _storage_errors(folder):
        folder = folder.resolve()
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _temporary(folder.parent, folder.name) as place:
                _write_to(place / "new", write)
                os.replace(place / "new", folder)
                flush_to_disk(folder.parent)
            return
        if not _may_replace(folder, mark):
            raise InputError(f"{folder} holds something that is no saved model; choose another folder")
        with _temporary(folder, folder.name) as place:
            _write_to(place / "new", write, folder)
            (place / "old").mkdir()
            _exchange(folder, place / "new", place / "old", mark)
            flush_to_disk(folder)


def _may_replace(folder: Path, mark: str) -> bool:
    """Say whether a folder is empty or holds a model, maybe one whose replacement was killed half-way."""
    if not folder.is_dir():
        return False
    leftovers = list(_leftovers(folder, folder.name))
    if (folder / mark).is_file() or any((place / "old" / mark).is_file() for place in leftovers):
        return True
    return all(entry in leftovers for entry in folder.iterdir())


def _write_to(new: Path, write: Callable[[Path], None], folder: Path | None = None) -> None:
    """Write a model into a new folder, with what else is in the folders of `folder` that it will replace."""
    new.mkdir()
    write(new)
    for component in [entry for entry in new.iterdir() if entry.is_dir() and folder is not None]:
        before = component if folder is None else folder / component.name
        for entry in before.iterdir() if before.is_dir() else ():
            if not (component / entry.name).exists() and not _of_a_model(entry):
                _link(entry, component / entry.name)
    for path in [*new.rglob("*"), new]:
        if not path.is_symlink():
            flush_to_disk(path)


def _of_a_model(path: Path) -> bool:
    """Say whether something in the folder of a component is a file of that component."""
    if path.is_dir():
        return False
    known = path.name in FILES or path.name.endswith("config.json") or ".safetensors.index" in path.name
    return known or path.suffix in (".safetensors", *PICKLES)


def _link(source: Path, target: Path) -> None:
    """Make a file or folder appear in a second place; its content is copied only where links are not possible."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link_file)
    else:
        _link_file(source, target)


def _link_file(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(folder: Path, new: Path, old: Path, mark: str) -> None:
    """Move what is in `new` into a folder, and what stands in its place into `old`; undo that on failure."""
    arriving = sorted((entry.name for entry in new.iterdir()), key=lambda name: name == mark)
    leaving = dict.fromkeys([mark, *arriving, *_components_of(folder)])
    if mark != INDEX:
        leaving |= dict.fromkeys(entry.name for entry in folder.iterdir() if _of_a_model(entry))
    moved: list[tuple[Path, Path]] = []
    try:
        for name in leaving:
            if os.path.lexists(folder / name):
                moved.append((folder / name, old / name))
                os.replace(*moved[-1])
        for name in arriving:
            moved.append((new / name, folder / name))
            os.replace(*moved[-1])
    except BaseException:
        for before, after in reversed(moved):
            if os.path.lexists(after) and not os.path.lexists(before):
                os.replace(after, before)
        raise


def _components_of(folder: Path) -> list[str]:
    """Return the components that the index of an older model names."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return [name for name in (*COMPONENTS, *SECOND, LOW_RES) if isinstance(index, dict) and name in index]


@contextmanager
def _storage_errors(target: Path) -> Iterator[None]:
    """Raise StorageError for whatever keeps a file or folder from being written."""
    try:
        yield
    except (InputError, StorageError):
        raise
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        if isinstance(error, (RuntimeError, ValueError)) and not _is_of_a_path(error):
            raise
        reason = (getattr(error, "strerror", None) or str(error)).partition("\n")[0][:160]
        raise StorageError(
            f"cannot write {str(target)[:200]!r}: {reason}; free space or choose another place"
        ) from error


def _is_of_a_path(error: Exception) -> bool:
    """Say whether an error that is no OSError is one of pathlib's: a NUL byte in a path, or a loop of links."""
    return "null byte" in str(error) or "null character" in str(error) or "Symlink loop" in str(error)


@contextmanager
def _temporary(parent: Path, name: str) -> Iterator[Path]:
    """Make a folder for what will be moved to `name`; it is removed whatever happens, and leftovers with it."""
    for leftover in _leftovers(parent, name):
        shutil.rmtree(leftover, ignore_errors=True)
    place = parent / f"{_prefix(name)}{secrets.token_hex(4)}"
    place.mkdir()
    try:
        with _locked(place):
            yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _prefix(name: str) -> str:
    return f".tmp-{name[:LONGEST_PART]}-"


def _leftovers(parent: Path, name: str) -> Iterator[Path]:
    """Yield the temporary folders for a name that no process is writing into."""
    start = _prefix(name)
    for entry in parent.iterdir():
        if not entry.name.startswith(start) or len(entry.name) != len(start) + 8 or not entry.is_dir():
            continue
        with _locked(entry) as free:
            if free:
                yield entry


@contextmanager
def _locked(place: Path) -> Iterator[bool]:
    """Hold the lock of a folder, which ends with the process; yield whether nobody else has it."""
    if sys.platform == "win32":  # where leftovers stay
        yield False
        return
    descriptor = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError:  # held, or a file system without locks
        free = False
    try:
        yield free
    finally:
        os.close(descriptor)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Stores: whole files or none, failures tried again and then told, one driver at a time."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from latentdiff.errors import InputError, StorageError
from latentdiff.scale import lock, store
from latentdiff.scale.lock import locked
from latentdiff.scale.store import LocalStore, RemoteStore, Store, open_store, write_bytes


@pytest.fixture(params=["local", "remote"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store of each kind."""
    return open_store(str(tmp_path / "out") if request.param == "local" else f"memory://{tmp_path.name}/out")


def test_files_are_written_read_moved_and_removed(place: Store) -> None:
    assert place.list("a") == set() and place.read("a/b") is None
    write_bytes(place, "a/b", b"one")
    write_bytes(place, "a/c/d", b"two")
    write_bytes(place, "a/b", b"three")
    assert place.list("a") == {"b", "c"} and place.read("a/b") == b"three"
    with place.open("a/b") as file:
        file.seek(2)
        assert file.read() == b"ree"
    place.move("a", "e/a")
    place.move("a", "e/a")  # nothing is there any more
    assert place.list("a") == set() and place.read("e/a/c/d") == b"two"
    write_bytes(place, "a/b", b"four")
    place.move("a/b", "e/a/b")
    assert place.read("e/a/b") == b"four"
    place.remove("e")
    place.remove("e")
    assert place.list("e") == set()


def test_a_file_that_is_not_finished_is_not_there(place: Store) -> None:
    with pytest.raises(RuntimeError), place.writing("a") as file:
        file.write(b"half")
        raise RuntimeError
    assert place.read("a") is None
    assert not place.list(store.TEMPORARY)


def test_a_full_disk_is_told_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = LocalStore(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device; free space"):
        write_bytes(place, "a", b"one")
    assert place.read("a") is None and not place.list(store.TEMPORARY)


class Failing:
    """A file system of which the first calls fail."""

    def __init__(self, real: Any, failures: int, error: Exception) -> None:
        self.real, self.failures, self.error = real, failures, error

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.real, name)
        if name not in ("put_file", "cat_file"):
            return found

        def act(*given: Any, **named: Any) -> Any:
            self.failures -= 1
            if self.failures >= 0:
                raise self.error
            return found(*given, **named)

        return act


def test_errors_of_an_object_store_are_tried_again_and_then_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = list[float]()
    monkeypatch.setattr(store.time, "sleep", waits.append)
    place = RemoteStore(f"memory://{tmp_path.name}")
    place.system = Failing(place.system, 3, ConnectionError("reset\nby peer"))
    write_bytes(place, "a", b"one")
    assert waits == [0.5, 1.0, 2.0]
    place.system.failures = 100
    with pytest.raises(StorageError, match=r"a could not be written or read in 6 attempts \(reset by peer\)"):
        place.read("a")
    place.system.error = PermissionError("not yours")
    with pytest.raises(StorageError, match=r"in 1 attempts \(not yours\)"):
        place.read("a")


def test_a_kind_of_store_that_is_not_known_is_refused() -> None:
    with pytest.raises(InputError, match="is of no kind that is known"):
        open_store("nothing-like-it://bucket")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the other driver is forked")
def test_a_folder_has_one_driver_at_a_time(tmp_path: Path) -> None:
    place = LocalStore(tmp_path)
    heard, told = os.pipe()
    other = os.fork()
    if other == 0:
        with locked(LocalStore(tmp_path), print):
            os.write(told, b"held")
            time.sleep(60)
        os._exit(1)
    assert os.read(heard, 4) == b"held"
    with pytest.raises(InputError, match="is being written by another process"), locked(place, print):
        pass
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    os.close(heard), os.close(told)
    (tmp_path / store.TEMPORARY / "left").write_bytes(b"half")
    with locked(place, print):  # the crash has left no lock
        assert not place.list(store.TEMPORARY)


def test_an_object_store_has_one_driver_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "SETTLING", 0.0)
    place, said = RemoteStore(f"memory://{tmp_path.name}"), list[str]()
    with locked(place, said.append):
        assert not said
        with (
            pytest.raises(InputError, match=f"is being written by process {os.getpid()} on"),
            locked(place, said.append),
        ):
            pass
        assert len(said) == 1
    assert place.read(lock.LOCK) is None
    write_bytes(place, lock.LOCK, b'{"owner": "one that crashed", "beat": 7, "host": "a", "process": 1}')
    with locked(place, said.append):
        assert len(said) == 2


def test_a_lock_that_is_empty_for_a_moment_is_not_taken_for_another_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, moments = RemoteStore(f"memory://{tmp_path.name}"), [b"{}", b"", b'{"process": 5, "host": "a"}']
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: write_bytes(place, lock.LOCK, moments.pop(0)))
    write_bytes(place, lock.LOCK, b"{}")
    with pytest.raises(InputError, match="is being written by process 5 on a;"), locked(place, print):
        pass


def test_of_two_drivers_that_begin_together_the_last_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = RemoteStore(f"memory://{tmp_path.name}")

    def other_signs(seconds: float) -> None:
        write_bytes(place, lock.LOCK, b'{"owner": "other"}')

    monkeypatch.setattr(lock.time, "sleep", other_signs)
    with pytest.raises(InputError, match="began at the same moment"), locked(place, print):
        pass
    assert place.read(lock.LOCK) == b'{"owner": "other"}'

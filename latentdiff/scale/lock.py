"""One driver at a time on one output, by a lock that no crash leaves behind.

In a folder it is a lock of the system's, which ends with the process that holds it. An object store has none: there it
is an object that its owner writes anew every few seconds, and one that has stopped changing belongs to nobody. Clocks
are not compared, the object is watched. Two drivers that get past this do no harm to pictures: equal names have equal
bytes.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from latentdiff.errors import InputError, StorageError, shown
from latentdiff.scale.store import LocalStore, RemoteStore, Store, write_bytes

__all__ = ["locked"]

LOCK = "lock.json"
BEAT = 10.0  # seconds between two signs of life
PATIENCE = 3.5  # beats without one after which an owner is taken for dead
SETTLING = 1.0  # seconds in which another driver that begins at the same moment would show


@contextmanager
def locked(store: Store, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the output of a job; its temporary files are removed first.

    Args:
        store: of the output.
        say: what the user is told.

    Raises:
        InputError: another driver holds it.
        StorageError: the place fails.
    """
    if isinstance(store, LocalStore):
        with _locked_folder(store):
            store.clear_temporary()
            yield
    else:
        assert isinstance(store, RemoteStore)
        with _locked_objects(store, say):
            yield


@contextmanager
def _locked_folder(store: LocalStore) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(store.root / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise _refusal(store.place, "by another process") from error
    except OSError as error:
        raise StorageError(f"cannot lock {shown(store.place)}: {error.strerror}; choose another place") from error
    try:
        yield
        store.clear_temporary()  # of workers that were killed
    finally:
        lock.release()


@contextmanager
def _locked_objects(store: RemoteStore, say: Callable[[str], None]) -> Iterator[None]:
    owner, beat = secrets.token_hex(8), 0

    def sign() -> None:
        nonlocal beat
        beat += 1
        tree = {"owner": owner, "beat": beat, "host": socket.gethostname(), "process": os.getpid()}
        write_bytes(store, LOCK, json.dumps(tree).encode())

    before = store.read(LOCK)
    if before is not None:
        say(f"another driver had {store.place}; waiting {BEAT * PATIENCE:.0f} s to see whether it still runs")
        _watch(store, before)
    sign()
    time.sleep(SETTLING)
    if _owner(store.read(LOCK)) != owner:
        raise _refusal(store.place, "by a driver that began at the same moment")
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(BEAT):
            with suppress(StorageError):  # the next one may be written
                if _owner(store.read(LOCK)) == owner:
                    sign()

    thread = threading.Thread(target=keep, name="latentdiff-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(StorageError):
            if _owner(store.read(LOCK)) == owner:
                store.remove(LOCK)


def _watch(store: RemoteStore, before: bytes) -> None:
    """Return when a lock has not changed for long, or is gone; raise InputError when it changes."""
    until = time.monotonic() + BEAT * PATIENCE
    while time.monotonic() < until:
        time.sleep(BEAT / 4)
        now = store.read(LOCK)
        if now is None:
            return
        if now and now != before:  # empty: it is being written at this moment
            raise _refusal(store.place, f"by {_described(now)}")


def _described(lock: bytes) -> str:
    try:
        tree = json.loads(lock)
        return f"process {tree['process']} on {tree['host']}"
    except (ValueError, KeyError, TypeError):
        return "another driver"


def _owner(lock: bytes | None) -> object:
    try:
        return json.loads(lock or b"null")["owner"]
    except (ValueError, KeyError, TypeError):
        return None


def _refusal(place: str, whom: str) -> InputError:
    return InputError(f"{shown(place, 120)} is being written {whom}; wait until that ends, or choose another OUT")

"""A process that draws: it takes shards from the driver one by one and writes each itself."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from typing import Any

import torch

from latentdiff.errors import LatentDiffError
from latentdiff.scale.commit import Report, write_shard
from latentdiff.scale.drawing import Artist, Style
from latentdiff.scale.model import Model
from latentdiff.scale.plan import Task
from latentdiff.scale.rows import Row
from latentdiff.scale.store import Store

__all__ = ["Crew", "Deaths", "Rows", "numbers_of", "work"]

MOST_DEATHS = 5  # of processes at one batch, after which its rows are given up

Rows = tuple[tuple[int, int], ...]
"""Number and copy of some rows."""


@dataclass(frozen=True)
class Crew:
    """What all workers of a job share.

    Attributes:
        model: what draws.
        style: how.
        store: where shards go.
        format: of shards, a key of `formats.FORMATS`.
        kept: columns that are written beside pictures.
    """

    model: Model
    style: Style
    store: Store
    format: str
    kept: tuple[str, ...]

    def artist(self, begins: Any = None) -> Artist:
        """Load the model in this process.

        Raises:
            InputError, ModelLoadError: see `Model.load`.
        """
        torch.set_num_threads(self.style.threads)
        return Artist(self.model.load(), self.style, begins)

    def write(self, task: Task, artist: Artist) -> Report:
        """Draw and write a shard; see `write_shard`."""
        return write_shard(self.store, self.format, self.kept, task, artist.draw)


class Deaths:
    """Of processes, by the batch that they died of."""

    def __init__(self) -> None:
        self._count = Counter[tuple[int, Rows]]()

    def note(self, task: Task, rows: Rows, how: str) -> Task:
        """Return a task to be drawn again: as it is, or with rows given up that too many processes died of.

        Args:
            task: that a process had in hand when it died.
            rows: of the batch that it had begun last; may be empty.
            how: it died.
        """
        self._count[task.shard.number, rows] += 1
        if not rows or self._count[task.shard.number, rows] < MOST_DEATHS:
            return task
        why, given_up = f"{MOST_DEATHS} processes died while they drew it ({how})", set(rows)
        pairs = zip(task.shard.rows, task.shard.names)
        names = {name: why for row, name in pairs if (row.number, row.copy) in given_up}
        return replace(task, given_up={**task.given_up, **names})


def work(connection: Connection, crew: Crew) -> None:
    """Draw what the driver sends, until it sends None.

    What goes back are pairs: ("ready", None) when the model is loaded, ("began", rows) before each batch, ("done",
    report) after each shard, and ("error", error) where nothing can go on.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to all; the driver ends its workers
    threading.Thread(target=_end_with_driver, name="latentdiff-driver", daemon=True).start()

    def began(rows: Sequence[Row]) -> None:
        connection.send(("began", numbers_of(rows)))

    try:
        artist = crew.artist(began)
        connection.send(("ready", None))
        while (task := connection.recv()) is not None:
            connection.send(("done", crew.write(task, artist)))
    except LatentDiffError as error:
        error.__traceback__ = None  # whose frames hold tensors
        connection.send(("error", error))
    except (EOFError, BrokenPipeError):  # the driver is gone
        return


def numbers_of(rows: Sequence[Row]) -> Rows:
    """Return what tells rows of a table apart."""
    return tuple((row.number, row.copy) for row in rows)


def _end_with_driver() -> None:
    """End this process with the one that started it, in the midst of a picture too: nothing half-written counts."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

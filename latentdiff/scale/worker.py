"""A process that draws: it takes shards from the driver one by one and writes each itself."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
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

__all__ = ["Crew", "work"]


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


def work(connection: Connection, crew: Crew) -> None:
    """Draw what the driver sends, until it sends None.

    What goes back are pairs: ("ready", None) when the model is loaded, ("began", rows) before each batch, ("done",
    report) after each shard, and ("error", error) where nothing can go on.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to all; the driver ends its workers
    threading.Thread(target=_end_with_driver, name="latentdiff-driver", daemon=True).start()

    def began(rows: Sequence[Row]) -> None:
        connection.send(("began", [(row.number, row.copy) for row in rows]))

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


def _end_with_driver() -> None:
    """End this process with the one that started it, in the midst of a picture too: nothing half-written counts."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

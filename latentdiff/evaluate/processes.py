"""Several processes that draw pictures together: the main one measures, the others draw their share when asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from latentdiff.devices import gpu_of_process
from latentdiff.errors import InputError, LatentDiffError
from latentdiff.evaluate.pictures import Drawing, generate
from latentdiff.pipeline import Pipeline

__all__ = ["Processes", "Way", "joined", "own_device"]

PATIENCE = timedelta(days=7)  # for which a process waits while the main one measures


class Way(NamedTuple):
    """How a model is run.

    Attributes:
        dtype: of the weights.
        engine: what runs the networks, as `Pipeline.from_pretrained` takes it.
    """

    dtype: torch.dtype
    engine: str


@dataclass(frozen=True)
class Processes:
    """Processes that `accelerate launch` or `torchrun` started, this one among them.

    Attributes:
        number: of this process; 0 is the main one.
        count: of all.
    """

    number: int
    count: int

    @property
    def share(self) -> tuple[int, int]:
        """What of a drawing is this process's."""
        return self.number, self.count

    def draw(self, pipe: Pipeline, drawing: Drawing, progress: bool = False) -> list[Path]:
        """Have all processes draw their shares and return the paths of all pictures; for the main process.

        Raises:
            InputError, StorageError: one of them could not.
        """
        dist.broadcast_object_list([(drawing, Way(pipe.dtype, pipe.engine.name))])
        self._draw_share(lambda: pipe, drawing, progress)
        return drawing.paths

    def serve(self, load: Callable[[Way], Pipeline]) -> None:
        """Draw this process's share of whatever the main one asks for, until it asks no more.

        Args:
            load: the model, run in some way; it may keep the one that it loaded last.
        """
        while True:
            asked: list[tuple[Drawing, Way] | None] = [None]
            dist.broadcast_object_list(asked)
            if asked[0] is None:
                return
            drawing, way = asked[0]
            try:
                self._draw_share(partial(load, way), drawing, progress=False)
            except LatentDiffError:  # which the main process reports
                continue

    @contextmanager
    def led(self) -> Iterator[None]:
        """Lead the others, and tell them at the end that nothing more is asked; for the main process.

        What it did not expect may have left them in the midst of a drawing: the connection breaks instead.
        """
        try:
            yield
        except LatentDiffError:
            dist.broadcast_object_list([None])
            raise
        dist.broadcast_object_list([None])

    def _draw_share(self, load: Callable[[], Pipeline], drawing: Drawing, progress: bool) -> None:
        error: LatentDiffError | None = None
        try:
            generate(load(), drawing, self.share, progress)
        except LatentDiffError as caught:
            error = caught
        messages: list[str | None] = [None] * self.count
        dist.all_gather_object(messages, None if error is None else str(error))
        if error is not None:
            raise error
        for message in messages:
            if message is not None:
                raise InputError(message)


def own_device(device: str | None) -> str | None:
    """Return which device is this process's: on a machine with GPUs, one after another, unless one is named."""
    place = os.environ.get("LOCAL_RANK", "")
    if device not in (None, "auto", "cuda") or not place.isdecimal():
        return device
    return gpu_of_process(int(place)) or device


@contextmanager
def joined() -> Iterator[Processes | None]:
    """Join the other processes while pictures are drawn; None where this one was started alone.

    They talk over CPU memory and see one file system.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield None
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()

"""All that answers for some models, but the socket: one scheduler, and the application with its doors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI

from latentdiff.pipeline import Pipeline
from latentdiff.serve.filter import Filter
from latentdiff.serve.http.app import make_app
from latentdiff.serve.http.desk import Desk
from latentdiff.serve.http.jobs.shelf import Shelf
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.links import Links
from latentdiff.serve.http.loras import Loras
from latentdiff.serve.http.models import Models
from latentdiff.serve.scheduler import Scheduler

__all__ = ["Service"]


@dataclass(frozen=True)
class Service:
    """Models that are served; `open` makes it.

    Attributes:
        models: by the names that clients use.
        desk, shelf, links: see there.
        api: the application; `guard.Guard` stands before it.
    """

    models: Models
    desk: Desk
    shelf: Shelf
    links: Links
    api: FastAPI

    @classmethod
    def open(
        cls,
        pipes: Mapping[str, Pipeline],
        *,
        batch: int = 8,
        limits: Limits | None = None,
        lora_dir: Path | None = None,
        content_filter: Filter | None = None,
        place: str = "",
    ) -> Service:
        """Begin to serve models.

        Args:
            pipes: by the names that clients use.
            batch: see `Scheduler`.
            limits: of requests and jobs.
            lora_dir: folder of the LoRAs that prompts may name; see `lora_tags`.
            content_filter: see `Scheduler`.
            place: begins the names of jobs and links, where there are several of these behind one address.

        Raises:
            InputError: a name or a number that cannot be used.
        """
        limits = limits or Limits()
        models = Models(pipes, Loras(lora_dir, limits))
        scheduler = Scheduler(
            models.pipes[models.first], batch=batch, queue=limits.queue, content_filter=content_filter
        )
        desk = Desk(scheduler, limits)
        shelf, links = Shelf(desk), Links(limits, place)
        return cls(models, desk, shelf, links, make_app(models, desk, shelf, links, place))

    @property
    def busy(self) -> bool:
        """Whether a job has not ended, or has and its client has yet to come for it."""
        return self.desk.busy or self.shelf.untold

"""Draw on a Ray cluster: a dataset of shards, mapped by actors that hold the model and write each shard themselves.

What goes through Ray are the numbers of shards and what became of them; the rows of a shard come from one actor beside
the driver, which reads the table as they are asked for, and pictures go from the worker to the store. So memory is
bounded, and a shard that Ray gives out twice is written twice with the same bytes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import latentdiff.errors
from latentdiff import ray_driver
from latentdiff.errors import LatentDiffError, StorageError, printable
from latentdiff.scale.commit import Report, find_damage
from latentdiff.scale.manifest import file_of, shards_in
from latentdiff.scale.plan import Task
from latentdiff.scale.progress import State
from latentdiff.scale.rows import Row
from latentdiff.scale.source import END, WAIT, Failed, Source
from latentdiff.scale.store import Store
from latentdiff.scale.worker import Crew, numbers_of

__all__ = ["Cluster", "require_ray"]

OLDEST = (2, 40)  # version of Ray
PAUSE = 1.0  # seconds after which a worker that has nothing to do asks again
SPARE, SPARE_SHARE = 16, 0.05  # places of a job for what is left at its end: some, and a share of its shards
MOST_BLOCKS = 10_000  # of a dataset: what Ray gives out at once, and again where a worker was lost
FIGURES = {
    "rows": "Rows of the table.",
    "done": "Rows that are done.",
    "drawn": "Rows that were drawn in this run.",
    "taken": "Rows of this run whose picture was there in another shard.",
    "failed": "Rows that could not be drawn.",
    "pictures_per_second": "Pictures drawn in a second, from the start of the run on.",
    "seconds_left": "Seconds until all rows are done, if it goes on like this.",
}


def require_ray() -> None:
    """Raise MissingDependencyError unless Ray is installed, with what a job needs of it."""
    ray_driver.require_ray("--engine ray", "ray.data", OLDEST)


@dataclass(frozen=True)
class Cluster:
    """An engine of `batch.How`.

    Attributes:
        address: of the cluster; None for the one that RAY_ADDRESS names, or else one that is started here.
        workers: actors that draw; None for as many as the cluster has room for, growing with it.
        gpus_per_worker: share of a GPU that each has; None for a whole one where the cluster has any.
    """

    address: str | None = None
    workers: int | None = None
    gpus_per_worker: float | None = None
    _gauges: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, tasks: Callable[[], Iterator[Task]], crew: Crew, count: int) -> Iterator[Report]:
        """Draw tasks and yield the report of each.

        Args:
            tasks: all of them, from the first on, each time it is called.
            crew: what the workers share.
            count: how many tasks there are.

        Raises:
            InputError: there is no such cluster, or the model cannot be loaded.
            StorageError: the store or the cluster fails.
        """
        require_ray()
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        with _joined(self.address), _told():
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Source)
            written = partial(shards_in, crew.store)
            source = remote.options(scheduling_strategy=here).remote(tasks, os.getcwd(), count, written)
            told = set[int]()
            for report in self._reports(source, crew, count):
                if report.number not in told:
                    told.add(report.number)
                    yield report
            _check_doubled(crew.store, ray.get(source.doubled.remote()))

    def tell(self, state: State) -> None:
        """Publish how far the job is as metrics of Ray, which its dashboard and Prometheus read.

        Args:
            state: of `Progress`.
        """
        from ray.util.metrics import Gauge

        for name, value in state.items():
            if name in FIGURES and value is not None:
                if name not in self._gauges:
                    self._gauges[name] = Gauge(f"latentdiff_batch_{name}", FIGURES[name])
                self._gauges[name].set(value)

    def _reports(self, source: Any, crew: Crew, count: int) -> Iterator[Report]:
        """Yield reports, some of them perhaps twice."""
        import ray

        with closing(self._rows(source, crew, count)) as rows:
            for row in rows:
                if row["error"]:
                    raise getattr(latentdiff.errors, row["error"])(row["message"])
                if row["number"] >= 0:
                    yield Report(*(int(row[name]) for name in ("number", "drawn", "taken", "failed")))
                if row["end"]:  # all shards are written, though a worker may still hang at one
                    break
        yield from ray.get(source.reports.remote())

    def _rows(self, source: Any, crew: Crew, count: int) -> Generator[dict[str, Any], None, None]:
        import ray.data

        gpus = self.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU") and crew.model.device != "cpu" else 0.0
        most = count if self.workers is None else min(self.workers, count)
        pool = ray.data.ActorPoolStrategy(min_size=most if self.workers else 1, max_size=most)
        places = places_of(count) if most > 1 else count
        # Items, as a task that reads them might find no core.
        shards = ray.data.from_items(
            [{"id": place} for place in range(places)], override_num_blocks=min(places, MOST_BLOCKS)
        )
        drawn = shards.map_batches(
            Drawer,
            fn_constructor_kwargs={"crew": crew, "source": source, "folder": os.getcwd()},
            batch_size=1,
            compute=pool,
            num_cpus=1 if gpus else crew.style.threads,
            num_gpus=gpus or None,
        )
        yield from drawn.iter_rows()


class Drawer:
    """Draws the shards of a dataset; an actor that holds the model.

    Args:
        crew: what all workers share.
        source: the actor of a `Source`.
        folder: of the driver, which paths are relative to, where this node has it.
    """

    def __init__(self, crew: Crew, source: Any, folder: str) -> None:
        with suppress(OSError):
            os.chdir(folder)
        self._crew, self._source, self._place = crew, source, 0
        self._error: LatentDiffError | None = None
        try:
            self._artist = crew.artist(self._begins)
        except LatentDiffError as error:
            self._error = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Draw one shard and return what became of it, or the error that ends the job."""
        import ray

        self._place = place = int(batch["id"][0])
        try:
            if self._error is not None:
                raise self._error
            while (answer := ray.get(self._source.get.remote(place))) == WAIT:
                time.sleep(PAUSE)
            if isinstance(answer, Failed):
                return _row(error=answer.error, message=answer.message)
            if not isinstance(answer, Task):
                return _row(end=answer == END)
            report = self._crew.write(answer, self._artist)
        except LatentDiffError as error:
            return _row(error=type(error).__name__, message=str(error))
        ray.get(self._source.done.remote(place, report))
        return _row(number=report.number, drawn=report.drawn, taken=report.taken, failed=report.failed)

    def _begins(self, rows: Sequence[Row]) -> None:
        self._source.began.remote(self._place, numbers_of(rows))


def places_of(count: int) -> int:
    """Return how many places a job of so many shards has: one for each, and those for what is left at its end."""
    return count + SPARE + int(count * SPARE_SHARE)


def _row(**given: Any) -> dict[str, list[Any]]:
    values = {"number": -1, "drawn": 0, "taken": 0, "failed": 0, "end": False, "error": "", "message": ""} | given
    return {name: [value] for name, value in values.items()}


def _check_doubled(store: Store, shards: Sequence[str]) -> None:
    """Raise StorageError where two machines that round differently have written one shard over each other.

    Its manifest goes, so that the next run draws it again.
    """
    if bad := [shard for shard in shards if find_damage(store, shard) is not None]:
        for shard in bad:
            store.remove(file_of(shard))
        raise StorageError(
            f"{len(bad)} shards were drawn by two machines at once that give other bits; give the same command again, "
            "which draws them alone"
        )


@contextmanager
def _joined(address: str | None) -> Iterator[None]:
    """Be a driver of a cluster; see `ray_driver.joined`. Its data sets say nothing."""
    import ray.data

    with ray_driver.joined(address):
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield


@contextmanager
def _told() -> Iterator[None]:
    """Say in one line what a cluster fails of."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        raise StorageError(
            printable(
                f"the Ray cluster failed ({str(error).strip().splitlines()[-1][:300]}); give the same command again"
            )
        ) from error

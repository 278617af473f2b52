"""Draw a table: compare it with what is there, draw what is missing, put aside what it no longer asks for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from latentdiff.devices import count_gpus
from latentdiff.errors import InputError, shown
from latentdiff.generation.request import Settings
from latentdiff.scale.commit import Report, find_damage
from latentdiff.scale.job import Job, settle
from latentdiff.scale.local import Began, draw_here, draw_locally
from latentdiff.scale.lock import locked
from latentdiff.scale.manifest import shards_in
from latentdiff.scale.plan import Layout, Plan, Task, make_plan, origins, read_shards, retire
from latentdiff.scale.progress import Progress, State
from latentdiff.scale.store import Store, open_store
from latentdiff.scale.table import Table, open_table
from latentdiff.scale.worker import Crew

__all__ = ["Engine", "How", "Summary", "run_batch"]

SHARE, LEAST = 0.01, 10  # of rows that may fail unless told otherwise: one in a hundred, or some

Engine = Callable[[Callable[[], Iterator[Task]], Crew, int], Iterator[Report | Began]]
"""(tasks from the first on, crew, how many tasks there are) -> what happens."""


@dataclass(frozen=True)
class How:
    """How a job is run.

    Attributes:
        engine: what draws; None for `workers` processes of this machine.
        workers: None for one for each GPU, or else for each core; 0 for this process alone.
        max_failures: rows that may fail before the run stops; None for 1 %.
        retry_failed: draw rows again that failed.
        verify: read all that is there, and draw again what is damaged.
        new: take over an output of another job.
        progress: file of JSON lines; None for none.
        terminal: whether somebody watches.
        tell: called with how far the job is, as in these lines.
        say: what the user is told, line by line.
    """

    engine: Engine | None = None
    workers: int | None = None
    max_failures: int | None = None
    retry_failed: bool = False
    verify: bool = False
    new: bool = False
    progress: str | None = None
    terminal: bool = False
    tell: Callable[[State], None] = lambda state: None
    say: Callable[[str], None] = print


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        rows: of the table.
        shards: of it.
        drawn, taken: rows with a new picture, and rows whose picture was there in another shard.
        failed: rows without a picture, of this run or an earlier one.
        retired: shards that were put aside.
    """

    rows: int
    shards: int
    drawn: int
    taken: int
    failed: int
    retired: int


def run_batch(prompts: str, out: str, job: Job, how: How) -> Summary:
    """Draw each row of a table exactly once, as far as that was not done before.

    Args:
        prompts: path or URL of the table.
        out: path or URL of the folder that the pictures go to.
        job: what draws, and what is written.
        how: it is run.

    Raises:
        InputError: something that cannot be used, too many rows failed, or another process writes there.
        ModelLoadError: the model was refused.
        StorageError: nothing can be written there.
    """
    Settings(prompts=("a",), **{name: value for name, value in job.settings.items() if name != "strength"})
    table, store = open_table(prompts), open_store(out)
    if store.place.startswith("memory://") and (how.engine is not None or how.workers != 0):
        raise InputError("memory:// is of one process alone, got others that draw; add --workers 0")
    with locked(store, how.say):
        job, layout = settle(store, job, new=how.new)
        damaged = find_all_damage(store, how.say) if how.verify else frozenset()
        plan = make_plan(table, layout, store, retry_failed=how.retry_failed, damaged=damaged)
        if plan.equal:
            how.say(
                f"{plan.equal:,} of {plan.rows:,} rows are equal to others and show the same; give them a column seed"
            )
        limit = max(LEAST, int(plan.rows * SHARE)) if how.max_failures is None else how.max_failures
        _check_failures(plan.failed, limit, out)
        drawn = taken = 0
        failed = plan.failed
        if plan.missing:
            with Progress(plan.rows, plan.missing_rows, plan.failed, how.progress, how.terminal, how.tell) as progress:
                _draw(table, job, layout, store, plan, how, progress, limit)
                drawn, taken, failed = progress.drawn, progress.taken, progress.failed
        retired = retire(store, plan)
    return Summary(plan.rows, plan.shards, drawn, taken, failed, retired)


def _draw(
    table: Table, job: Job, layout: Layout, store: Store, plan: Plan, how: How, progress: Progress, limit: int
) -> None:
    crew = Crew(job.model, job.style, store, layout.format, ("id", *layout.columns.kept))
    tasks, workers = partial(tasks_of, table, layout, store, plan), _workers(how.workers, crew)
    if how.engine is not None:
        events = how.engine(tasks, crew, len(plan.missing))
    elif workers:
        events = draw_locally(tasks(), crew, min(workers, len(plan.missing)))
    else:
        events = draw_here(tasks(), crew)
    try:
        for event in events:
            if isinstance(event, Began):
                progress.under_way(event.shard, event.rows)
                continue
            progress.shard(event)
            _check_failures(progress.failed, limit, store.place)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(
            f"interrupted; {progress.rows - progress.missing + progress.done:,} of {progress.rows:,} rows are done; "
            "the same command goes on"
        ) from error
    finally:
        with suppress(AttributeError):
            events.close()  # type: ignore[attr-defined]  # of a generator: ends its processes now


def tasks_of(table: Table, layout: Layout, store: Store, plan: Plan) -> Iterator[Task]:
    """Yield the shards that are to be written.

    Raises:
        InputError: the table has changed since the plan was made.
        StorageError: the store fails.
    """
    there = origins(store, plan)
    for shard in read_shards(table, layout):
        if shard.name not in plan.wanted:
            raise InputError(f"{shown(table.place)} has changed while it was drawn; give the same command again")
        if shard.number in plan.missing:
            taken = {name: there[name] for name in shard.names if name in there}
            yield Task(shard, shard.name in plan.again, taken)


def find_all_damage(store: Store, say: Callable[[str], None]) -> frozenset[str]:
    """Read every shard that is there and return the names of those that are not as they were written.

    Raises:
        StorageError: the store fails.
    """
    found = set[str]()
    for shard in sorted(shards_in(store)):
        if (bad := find_damage(store, shard)) is not None:
            say(f"shard {shard} is damaged ({bad}) and is written again")
            found.add(shard)
    return frozenset(found)


def _check_failures(failed: int, limit: int, out: str) -> None:
    if failed > limit:
        raise InputError(
            f"{limit:,} rows may fail, got {failed:,} that did; see {out[:120]}/failures, then add "
            "--retry-failed or a higher --max-failures"
        )


def _workers(asked: int | None, crew: Crew) -> int:
    if asked is not None:
        return asked
    if crew.model.device in (None, "auto", "cuda") and (gpus := count_gpus()):
        return gpus
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // crew.style.threads) if crew.model.device in (None, "auto", "cpu") else 1

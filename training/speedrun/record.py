"""What a speedrun has done and how long it took: a JSON file, by which the same command goes on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentdiff.errors import InputError, shown
from latentdiff.files import is_file, is_folder, parse_json, read_file, write_file

Clock = Callable[[], float]
FILE, LOCK = "speedrun.json", ".speedrun"
DATA = "data"  # folder of emoji
MOST = 2**24  # bytes
OFTEN = 20.0  # seconds between two notes of the time


@dataclass
class Stage:
    """A part of a speedrun.

    Attributes:
        seconds: that it took until now, those of runs that were broken off too.
        planned: seconds that it was to take; None where nobody could know.
        steps, planned_steps: how many it has, and had in the first plan; 0 where it has none.
        pace: seconds of a step.
        changes: lines about plans that were changed on the way.
    """

    seconds: float = 0.0
    planned: float | None = None
    steps: int = 0
    planned_steps: int = 0
    pace: float = 0.0
    done: bool = False
    changes: list[str] = field(default_factory=list)


class Record:
    """The time and the decisions of a speedrun, written down as it goes.

    Args:
        folder: of the speedrun; it is there.
        subject: what it is of; two that differ are two speedruns.
        clock: tells the time in seconds.

    Attributes:
        notes: lines for the report.
        facts: what was found and decided, by name; JSON-ready.
        stages: by name, in order.
        began: whether there was nothing in the folder before.

    Raises:
        InputError: the folder holds another speedrun, or something else.
        StorageError: it cannot be written.
    """

    def __init__(self, folder: Path, subject: Mapping[str, Any], clock: Clock = time.monotonic) -> None:
        self.folder, self.subject, self.clock = folder, dict(subject), clock
        self.stages: dict[str, Stage] = {}
        self.facts: dict[str, Any] = {}
        self.notes: list[str] = []
        self.began = not is_file(folder / FILE)
        if self.began:
            require_empty(folder)
        else:
            self._read()
        self._last, self._written = clock(), clock()
        self.save()

    @property
    def spent(self) -> float:
        """Seconds that the speedrun took until now."""
        return sum(stage.seconds for stage in self.stages.values())

    def note(self, line: str) -> None:
        """Keep a line for the report, once."""
        if line not in self.notes:
            self.notes.append(line)

    @contextmanager
    def stage(self, name: str, planned: float | None = None) -> Iterator[Stage]:
        """Count the time inside a `with` block as that of a stage, which is done when the block is.

        Args:
            planned: seconds that it is to take, kept from the first time that it is said.
        """
        stage = self.stages.setdefault(name, Stage())
        stage.planned = planned if stage.planned is None else stage.planned
        self._last = self.clock()
        try:
            yield stage
            stage.done = True
        finally:
            self.tick(stage, now=True)

    def tick(self, stage: Stage, now: bool = False) -> None:
        """Add the time since the last call to a stage, and write it down now and then."""
        time_now = self.clock()
        stage.seconds += time_now - self._last
        self._last = time_now
        if now or time_now - self._written > OFTEN:
            self._written = time_now
            self.save()

    def save(self) -> None:
        """Write everything down.

        Raises:
            StorageError: it cannot be written.
        """
        stages = {name: vars(stage) for name, stage in self.stages.items()}
        tree = {"subject": self.subject, "facts": self.facts, "notes": self.notes, "stages": stages}
        write_file(self.folder / FILE, (json.dumps(tree, indent=2) + "\n").encode())

    def release(self) -> None:
        """Give the folder back where nothing came of the speedrun: no plan, and no pictures that were drawn for it."""
        drawn = any(not path.is_dir() for path in (self.folder / DATA).rglob("*"))
        if self.began and "plan" not in self.facts and not drawn:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> None:
        file = self.folder / FILE
        try:
            tree = parse_json(read_file(file, MOST), str(file))
            held, self.facts, self.notes = dict(tree["subject"]), dict(tree["facts"]), list(tree["notes"])
            self.stages = {name: Stage(**stage) for name, stage in tree["stages"].items()}
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(f"{file} is damaged; choose another --out, or remove the folder") from error
        if apart := [name for name in {**held, **self.subject} if held.get(name) != self.subject.get(name)]:
            name = apart[0]
            raise InputError(
                f"{self.folder} holds a speedrun with {name} {shown(held.get(name))}, asked for "
                f"{shown(self.subject.get(name))}; choose another --out"
            )


def require_empty(folder: Path) -> None:
    """Raise InputError where a folder holds something that is not of a speedrun."""
    if not folder.exists():
        return
    if not is_folder(folder):
        raise InputError(f"{folder} must be a folder; choose another --out")
    found = sorted(path.name for path in folder.iterdir() if path.name != LOCK and not path.name.startswith(".tmp-"))
    if found:
        raise InputError(f"{folder} holds something else ({shown(found[0])}); choose another --out")

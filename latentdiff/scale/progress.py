"""How far a job is: a line on the terminal, and JSON lines for programs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

from latentdiff.errors import StorageError, shown
from latentdiff.scale.commit import Report

__all__ = ["Progress", "State"]

State = dict[str, float | int | None]
"""What a JSON line says."""

INTERVAL = 1.0  # seconds between two lines, but after a shard


class Progress:
    """What is done of a job.

    Args:
        rows: of the table.
        missing: of these, those that are to be drawn or taken over.
        failed: those that could not be drawn, of earlier runs.
        file: where JSON lines are appended; None for none.
        terminal: whether somebody watches.
        tell: called with what each of these lines says.

    Raises:
        StorageError: the file cannot be written.
    """

    def __init__(
        self,
        rows: int,
        missing: int,
        failed: int,
        file: str | None,
        terminal: bool,
        tell: Callable[[State], None] = lambda state: None,
    ) -> None:
        self.rows, self.missing, self.failed, self._tell_others = rows, missing, failed, tell
        self.drawn = self.taken = 0
        self._in_hand = dict[int, int]()  # rows that are drawn of shards that are not done, by shard
        self._begun = self._written = time.monotonic()
        self._bar = tqdm(
            total=rows, initial=rows - missing, unit="row", disable=not terminal, dynamic_ncols=True, smoothing=0.05
        )
        try:
            self._file = None if file is None else open(file, "a", encoding="utf-8")  # noqa: SIM115
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise StorageError(f"cannot write {shown(file)}: {reason}; choose another --progress") from error

    @property
    def done(self) -> int:
        """Rows of shards that were written in this run."""
        return self.drawn + self.taken + self._failed_now

    _failed_now = 0

    def under_way(self, shard: int, rows: int) -> None:
        """Note how many rows of a shard are drawn already."""
        self._in_hand[shard] = rows
        self._tell(time.monotonic() - self._written >= INTERVAL)

    def shard(self, report: Report) -> None:
        """Note that a shard is written."""
        self._in_hand.pop(report.number, None)
        self.drawn, self.taken = self.drawn + report.drawn, self.taken + report.taken
        self.failed, self._failed_now = self.failed + report.failed, self._failed_now + report.failed
        self._tell(True)

    def state(self) -> State:
        """Return figures: rows of the table and done, pictures per second, seconds left, failures."""
        seconds = time.monotonic() - self._begun
        passed = self.done + sum(self._in_hand.values())
        rate = (passed - self.taken) / seconds if seconds > 0 else 0.0
        left = (self.missing - passed) / rate if rate > 0 else None
        return {
            "time": round(time.time(), 3),
            "rows": self.rows,
            "done": self.rows - self.missing + self.done,
            "drawn": self.drawn,
            "taken": self.taken,
            "failed": self.failed,
            "pictures_per_second": round(rate, 4),
            "seconds_left": None if left is None else round(left, 1),
        }

    def _tell(self, write: bool) -> None:
        passed = self.rows - self.missing + self.done + sum(self._in_hand.values())
        self._bar.set_postfix(failed=self.failed, refresh=False)
        self._bar.update(passed - self._bar.n)
        if not write:
            return
        self._written, state = time.monotonic(), self.state()
        self._tell_others(state)
        if self._file is not None:
            self._file.write(json.dumps(state) + "\n")
            self._file.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()

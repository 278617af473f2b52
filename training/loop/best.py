"""The best step of a run by a value that is measured now and then: its model in best/, replaced by better ones.

The checkpoint says which step was best, and the folder has the model. A step may be better than the best of the newest
checkpoint, and the run be killed before the next: so what was best stays beside it until that checkpoint is whole.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from latentdiff.checkpoints.saver import flush_to_disk
from latentdiff.errors import InputError, StorageError
from latentdiff.files import is_file, parse_json, read_file

BEST = "best"  # folder in that of a run
RECORD = "best.json"  # in it
BEFORE, NEW, OLD = ".best-before", ".best-new", ".best-old"
PICTURES = ".evaluation-"  # what folders of drawn pictures begin with, each gone after its evaluation
MOST = 2**16  # bytes of the record


@dataclass
class Best:
    """The best of several evaluations.

    Attributes:
        name: of the value.
        step: of the best; 0 before there is one.
        value: of that step.
        waited: evaluations since then.
    """

    name: str = ""
    step: int = 0
    value: float = 0.0
    waited: int = 0

    def improved_by(self, value: float, better: str) -> bool:
        """Say whether a value is better than that of the best step; what is not finite never is."""
        if not math.isfinite(value):
            return False
        return not self.step or (value < self.value if better == "lower" else value > self.value)


def keep(run: Path, best: Best, save: Callable[[Path], object]) -> None:
    """Put a model into best/ of a run, which has the old or the new one and never a part.

    Args:
        save: writes the model into a folder that is there.

    Raises:
        StorageError: it cannot be written.
    """
    place, before, new = run / BEST, run / BEFORE, run / NEW
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        save(new)
        (new / RECORD).write_text(json.dumps(_record(best), indent=2) + "\n")
        flush_to_disk(new / RECORD)
        flush_to_disk(new)
        if place.exists() and before.exists():
            _discard(place)
        elif place.exists():
            os.replace(place, before)
        os.replace(new, place)
        flush_to_disk(run)
    except OSError as error:
        raise StorageError(f"could not save {place}: {error}; free space, then go on with --resume") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def settle(run: Path) -> None:
    """Delete the best model of the checkpoint before, now that a newer one is whole."""
    if (run / BEFORE).exists():
        _discard(run / BEFORE)


def restore(run: Path, best: Best) -> None:
    """Make best/ that of the checkpoint that a run goes on from, whatever was found to be better after it."""
    place, before = run / BEST, run / BEFORE
    for leftover in (run / NEW, run / OLD, *run.glob(f"{PICTURES}*")):
        shutil.rmtree(leftover, ignore_errors=True)
    if before.exists() and is_record(before, best):
        if place.exists():
            _discard(place)
        os.replace(before, place)
    settle(run)
    if place.exists() and not is_record(place, best):
        _discard(place)


def is_record(folder: Path, best: Best) -> bool:
    """Say whether a folder has the model of the best step."""
    if not is_file(folder / RECORD):
        return False
    try:
        return bool(parse_json(read_file(folder / RECORD, MOST), RECORD) == _record(best))
    except InputError:
        return False


def _record(best: Best) -> dict[str, str | int | float]:
    return {name: value for name, value in asdict(best).items() if name != "waited"}


def _discard(folder: Path) -> None:
    """Delete a folder, which loses its name before its files."""
    doomed = folder.with_name(OLD)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)

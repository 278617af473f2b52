"""Write a shard: its pictures, the list of those that failed, and its manifest last, which makes it count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentdiff.errors import StorageError
from latentdiff.scale.formats import FORMATS, Picture, Sample, damage
from latentdiff.scale.manifest import FAILURES, MANIFESTS, Manifest, file_of, read_manifest, render_failures
from latentdiff.scale.plan import Origin, Task
from latentdiff.scale.rows import Row
from latentdiff.scale.store import Store, write_bytes

__all__ = ["Draw", "Report", "find_damage", "write_shard"]

Draw = Callable[[Sequence[Row]], Iterator[Picture | str]]
"""Rows -> for each, in order, its picture, or why it could not be drawn."""


@dataclass(frozen=True)
class Report:
    """What became of a shard.

    Attributes:
        number: of the shard.
        drawn, taken, failed: rows with a new picture, with one that was there, and with none.
    """

    number: int
    drawn: int
    taken: int
    failed: int

    @property
    def rows(self) -> int:
        """All rows of it."""
        return self.drawn + self.taken + self.failed


def write_shard(store: Store, form: str, kept: tuple[str, ...], task: Task, draw: Draw) -> Report:
    """Draw what a shard lacks and write it.

    Args:
        store: where it goes.
        form: a key of `FORMATS`.
        kept: names of the columns that are written beside pictures.
        task: the shard.
        draw: what draws rows.

    Raises:
        StorageError: the store fails.
    """
    shard, entries, counts, seen = task.shard, list[dict[str, Any]](), Counter[str](), Counter[str]()
    taken = _taken(store, task.taken)
    if task.again:  # which would tell of other files meanwhile
        store.remove(file_of(shard.name))

    def samples() -> Iterator[Sample]:
        for row, name, picture in _pictures(task, taken, draw):
            entry: dict[str, Any] = {"row": row.number, **({"copy": row.copy} if row.copy else {}), "name": name}
            entries.append(entry)
            if isinstance(picture, str):
                counts["failed"] += 1
                entry["failed"] = picture
                continue
            counts["taken" if name in taken else "drawn"] += 1
            seen[name] += 1
            key = name if seen[name] == 1 else f"{name}-{seen[name]}"
            entry |= {"key": key, "bytes": len(picture.data), "sha256": picture.sha256}
            yield Sample(key, name, row.number, row.kept, picture)

    data = FORMATS[form].write(store, shard.name, samples(), kept)
    manifest = Manifest(shard.name, form, data, entries)
    if manifest.failed:
        write_bytes(store, file_of(shard.name, FAILURES), render_failures(manifest))
    elif task.again:
        store.remove(file_of(shard.name, FAILURES))
    write_bytes(store, file_of(shard.name, MANIFESTS), manifest.render())
    return Report(shard.number, counts["drawn"], counts["taken"], counts["failed"])


def find_damage(store: Store, shard: str) -> str | None:
    """Read a shard and return which of its files is not as it was written; None where all are.

    Raises:
        StorageError: the store fails.
    """
    manifest = read_manifest(store, shard)
    if manifest is None:
        return "its manifest"
    return next((path for path in manifest.data if damage(store, path, manifest.data[path])), None)


def _pictures(task: Task, taken: Mapping[str, Picture], draw: Draw) -> Iterator[tuple[Row, str, Picture | str]]:
    """Yield each row with its name and its picture, or why it has none; equal rows are drawn once."""
    shard, left = task.shard, Counter(task.shard.names)
    firsts = {name: row for row, name in zip(reversed(shard.rows), reversed(shard.names))}
    lacking = [firsts[name] for name in left if name not in taken and name not in task.given_up]
    drawing, held = draw(lacking), dict[str, Picture | str]()
    for row, name in zip(shard.rows, shard.names):
        left[name] -= 1
        if name in taken:
            picture: Picture | str = taken[name]
        elif name in task.given_up:
            picture = task.given_up[name]
        else:
            picture = held[name] if name in held else next(drawing)
            if left[name]:
                held[name] = picture
            else:
                held.pop(name, None)
        yield row, name, picture


def _taken(store: Store, wanted: Mapping[str, Origin]) -> dict[str, Picture]:
    """Return the pictures that are there already; one that is not as it was written is drawn anew."""
    by_shard = dict[tuple[str, str], dict[str, list[str]]]()
    for name, origin in wanted.items():
        by_shard.setdefault((origin.path, origin.format), {}).setdefault(origin.key, []).append(name)
    found = dict[str, Picture]()
    for (path, form), names in by_shard.items():
        try:
            for key, picture in FORMATS[form].read(store, path, set(names)):
                for name in names[key]:
                    if picture.sha256 == wanted[name].sha256:
                        found[name] = picture
        except (StorageError, OSError, ValueError, KeyError) as error:
            if isinstance(error, StorageError) and not isinstance(error.__cause__, FileNotFoundError):
                raise
    return found

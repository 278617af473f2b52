"""What is still to be drawn: computed each time from the table and from which manifests are there.

A shard is a fixed range of rows, named by its number and by the names of its pictures. So nothing has to be kept about
a run: a shard is done where a manifest of its name is, and a row that changes gives its shard another name. Pictures
that an earlier shard has are taken over into the new one, byte for byte, so that only what changed is drawn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from latentdiff.errors import InputError
from latentdiff.scale.formats import FORMATS, SHARDS
from latentdiff.scale.manifest import FAILURES, MANIFESTS, count_failures, read_manifest, shards_in
from latentdiff.scale.rows import Columns, Maker, Row, read_rows
from latentdiff.scale.store import Store
from latentdiff.scale.table import Table

__all__ = [
    "EARLIER",
    "Head",
    "Layout",
    "Origin",
    "Plan",
    "Shard",
    "Task",
    "compare",
    "make_plan",
    "origins",
    "read_shards",
]

EARLIER = "earlier"  # folder of shards that the table no longer asks for
DIGITS = 16
MOST_NAMES = 2**22  # that are remembered to count equal rows


@dataclass(frozen=True)
class Layout:
    """What the shards of a job are made of.

    Attributes:
        maker: what draws.
        columns: of the table.
        format: a key of `FORMATS`.
        shard_size: rows of a shard.
    """

    maker: Maker
    columns: Columns
    format: str
    shard_size: int


@dataclass(frozen=True)
class Shard:
    """A range of rows, with the names of their pictures.

    Attributes:
        number: of the shard, from 0.
        name: of its files.
    """

    number: int
    name: str
    rows: tuple[Row, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Head:
    """A shard by its number, its name and how many rows it has."""

    number: int
    name: str
    rows: int


@dataclass(frozen=True)
class Origin:
    """Where a picture is that was drawn before.

    Attributes:
        path: of its shard.
        format: of that.
        key: of the picture in it.
        sha256: of the picture.
    """

    path: str
    format: str
    key: str
    sha256: str


@dataclass(frozen=True)
class Task:
    """A shard that is to be written.

    Attributes:
        again: whether one of its name is there, which is replaced.
        taken: pictures that are there already, by name.
        given_up: why pictures are not tried again, by name.
    """

    shard: Shard
    again: bool = False
    taken: Mapping[str, Origin] = field(default_factory=dict)
    given_up: Mapping[str, str] = field(default_factory=dict)

    @property
    def lacking(self) -> int:
        """How many rows are to be drawn, about."""
        return max(0, len(self.shard.rows) - len(self.taken))


@dataclass(frozen=True)
class Plan:
    """What a job lacks.

    Attributes:
        rows, shards: how many the table asks for.
        wanted: names of all its shards.
        missing: numbers of those that are to be written, with the number of their rows.
        again: names of those among them that are there, but are replaced.
        equal: rows that are the same as another, about; see `Repeats`.
        failed: rows of shards that are done which could not be drawn.
    """

    rows: int
    shards: int
    wanted: frozenset[str]
    missing: Mapping[int, int]
    again: frozenset[str]
    equal: int
    failed: int

    @property
    def missing_rows(self) -> int:
        """How many rows are in the shards that are to be written."""
        return sum(self.missing.values())


def read_shards(table: Table, layout: Layout) -> Iterator[Shard]:
    """Yield the shards of a table, in order.

    Raises:
        InputError: see `read_rows`.
    """
    rows, name_of, number = read_rows(table, layout.maker, layout.columns), layout.maker.namer(), 0
    while chunk := tuple(islice(rows, layout.shard_size)):
        names = tuple(map(name_of, chunk))
        ends = [(row.number, row.copy) for row in (chunk[0], chunk[-1])]
        digest = hashlib.sha256(f"{layout.format}\0{len(chunk)}\0{ends}\0{layout.columns.kept}\0".encode())
        digest.update("".join(names).encode())
        for row in chunk:
            if row.kept:
                digest.update(json.dumps([row.number, row.kept], sort_keys=True, default=str).encode())
        yield Shard(number, f"{number:08d}-{digest.hexdigest()[:DIGITS]}", chunk, names)
        number += 1


def make_plan(
    table: Table, layout: Layout, store: Store, *, retry_failed: bool = False, damaged: frozenset[str] = frozenset()
) -> Plan:
    """Compare a table with what is there.

    Args:
        table: what is to be drawn.
        layout: of its shards.
        store: the output.
        retry_failed: shards with rows that failed count as missing.
        damaged: shards that do as well.

    Raises:
        InputError: the table has no row, or see `read_rows`.
        StorageError: the store fails.
    """
    repeats = Repeats()

    def heads() -> Iterator[Head]:
        for shard in read_shards(table, layout):
            repeats.add(shard.names)
            yield Head(shard.number, shard.name, len(shard.rows))

    plan = compare(heads(), layout.format, store, retry_failed=retry_failed, damaged=damaged)
    if not plan.rows:
        raise InputError(f"PROMPTS must have a row at least, got none in {table.place}; say what to draw")
    return replace(plan, equal=repeats.count)


def compare(
    heads: Iterable[Head],
    form: str,
    store: Store,
    *,
    retry_failed: bool = False,
    damaged: frozenset[str] = frozenset(),
) -> Plan:
    """Compare the shards of a table with those that are there; see `make_plan`.

    Args:
        heads: of all shards, in order.
        form: a key of `FORMATS`.
    """
    done, failures, files = shards_in(store), shards_in(store, FAILURES), store.list(SHARDS)
    path = FORMATS[form].path
    wanted, missing, again, failed = set[str](), dict[int, int](), set[str](), 0
    rows = number = 0
    for head in heads:
        rows, number = rows + head.rows, head.number + 1
        wanted.add(head.name)
        there = head.name in done and path(head.name).rpartition("/")[2] in files
        if head.name in done and not there and head.name in failures:
            manifest = read_manifest(store, head.name)  # perhaps none of its rows could be drawn, so it has no files
            there = manifest is not None and not manifest.data
        if there and not (head.name in damaged or (retry_failed and head.name in failures)):
            failed += count_failures(store, head.name) if head.name in failures else 0
            continue
        missing[head.number] = head.rows
        if head.name in done:
            again.add(head.name)
    return Plan(rows, number, frozenset(wanted), missing, frozenset(again), 0, failed)


class Repeats:
    """Counts the names that have come before, in memory that does not grow with them.

    Exactly for some millions of names; of more, by those of a share of all names, which is halved each time there are
    too many.
    """

    def __init__(self) -> None:
        self._kept, self._fresh, self._many, self._below = np.array([], np.uint64), list[int](), 0, 2**64

    def add(self, names: Iterable[str]) -> None:
        """Note some names."""
        self._fresh += [key for name in names if (key := int(name[:16], 16)) < self._below]
        if len(self._fresh) > MOST_NAMES // 4:
            self._settle()

    @property
    def count(self) -> int:
        """How many names have come before."""
        self._settle()
        return round((self._many - len(self._kept)) * (2**64 / self._below))

    def _settle(self) -> None:
        self._many += len(self._fresh)
        self._kept = np.unique(np.concatenate([self._kept, np.array(self._fresh, np.uint64)]))
        self._fresh = []
        while len(self._kept) > MOST_NAMES:
            before = len(self._kept)
            self._below //= 2
            self._kept = self._kept[self._kept < self._below]
            self._many = round(self._many * len(self._kept) / before)


def origins(store: Store, plan: Plan) -> dict[str, Origin]:
    """Return where pictures are, by name, that are in shards which the plan does not ask for or writes again.

    Args:
        store: the output.
        plan: of the job.

    Raises:
        StorageError: the store fails.
    """
    found = dict[str, Origin]()
    prefixes = (f"{EARLIER}/", "")
    homes = {file: prefix for prefix in prefixes for file in store.list(f"{prefix}{SHARDS}")}
    for place in prefixes:
        for shard in sorted(shards_in(store, f"{place}{MANIFESTS}")):
            if not place and shard in plan.wanted and shard not in plan.again:
                continue
            manifest = read_manifest(store, shard, f"{place}{MANIFESTS}")
            if manifest is None or manifest.format not in FORMATS:
                continue
            path = FORMATS[manifest.format].path(shard)
            home = homes.get(path.rpartition("/")[2])  # not beside its manifest where putting it aside was interrupted
            for entry in manifest.entries if home is not None else ():
                if "failed" not in entry:
                    found[entry["name"]] = Origin(f"{home}{path}", manifest.format, entry["key"], entry["sha256"])
    return found


def retire(store: Store, plan: Plan) -> int:
    """Move the shards that the table does not ask for to `EARLIER`, where their pictures are found again.

    Returns:
        How many there were.

    Raises:
        StorageError: the store fails.
    """
    count = 0
    for shard in sorted(shards_in(store) - plan.wanted):
        for folder, suffixes in ((SHARDS, ("", ".tar", ".parquet")), (FAILURES, (".jsonl",)), (MANIFESTS, (".jsonl",))):
            for suffix in suffixes:
                path = f"{folder}/{shard}{suffix}"
                store.move(path, f"{EARLIER}/{path}")
        count += 1
    for name in store.list(SHARDS):  # of shards that were never finished
        if name.partition(".")[0] not in plan.wanted:
            store.remove(f"{SHARDS}/{name}")
    for shard in shards_in(store, FAILURES) - plan.wanted:
        store.remove(f"{FAILURES}/{shard}.jsonl")
    return count

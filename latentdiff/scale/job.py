"""What a job is: its model, the layout of its shards, how it draws; and `job.json`, which an output is known by.

Another model or other settings would mix pictures in one output, so they are refused, unless that is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from latentdiff.errors import InputError, shown
from latentdiff.files import parse_json
from latentdiff.generation.options import check_integer
from latentdiff.generation.result import recorded_name
from latentdiff.scale.drawing import Style
from latentdiff.scale.formats import FORMATS
from latentdiff.scale.manifest import shards_in
from latentdiff.scale.model import EAGER, Model
from latentdiff.scale.plan import Layout
from latentdiff.scale.rows import Columns, Maker, file_hash
from latentdiff.scale.store import Store, write_bytes

__all__ = ["FILE", "Job", "Loras", "settle"]

FILE = "job.json"
VERSION = 1
SHARD_SIZE, BATCH = 256, 4
MAX_SHARD_SIZE = 100_000
FREE = ("batch", "threads", "model")  # may change between two runs: how, not what; and where the model is

Loras = tuple[tuple[str, tuple[float, ...]], ...]


@dataclass(frozen=True)
class Job:
    """What is drawn, how and into what, besides the table; numbers that are None are those of the output, or defaults.

    Attributes:
        model: what draws.
        settings: of rows that do not say otherwise.
        loras: of rows that name none.
        format: a key of `FORMATS`.
        shard_size: rows of a shard.
        kept: columns that are written beside pictures.
        batch, threads, metadata, mark: see `drawing.Style`.
    """

    model: Model
    settings: Mapping[str, Any]
    loras: Loras = ()
    format: str | None = None
    shard_size: int | None = None
    kept: tuple[str, ...] = ()
    batch: int | None = None
    threads: int | None = None
    metadata: bool = True
    mark: bool = True

    def record(self) -> dict[str, Any]:
        """Return what `job.json` says.

        Raises:
            InputError, ModelLoadError: see `Model.facts`.
        """
        return {
            "version": VERSION,
            **self.model.facts(),
            "settings": {name: self.settings[name] for name in sorted(self.settings)},
            "loras": [[recorded_name(file), file_hash(file), list(weights)] for file, weights in self.loras],
            "format": self.format,
            "shard_size": self.shard_size,
            "keep": sorted(self.kept),
            "metadata": self.metadata,
            "mark": self.mark,
            "batch": self.batch,
            "threads": self.threads,
        }

    def layout(self, record: Mapping[str, Any]) -> Layout:
        """Return the layout of its shards, by its record."""
        named = ["model_hash", "model_defaults", "prediction_type", "dtype", "embeddings", "metadata", "mark"]
        named += ["engine"] if record["engine"] != EAGER else []  # so that pictures of before keep their names
        maker = Maker({name: record[name] for name in named}, self.settings, self.loras)
        return Layout(maker, Columns(self.kept), str(self.format), int(self.shard_size or 0))

    @property
    def style(self) -> Style:
        """How pictures are drawn and written."""
        return Style(int(self.batch or 0), int(self.threads or 0), self.metadata, self.mark)


def settle(store: Store, job: Job, *, new: bool = False) -> tuple[Job, Layout]:
    """Compare a job with the one that an output has pictures of, and note it there.

    Args:
        store: the output.
        job: what is asked for.
        new: whether it may be another one.

    Returns:
        The job with all numbers, and the layout of its shards.

    Raises:
        InputError: a number that cannot be used, or the output is of another job.
        StorageError: the store fails.
    """
    before = _read(store)
    known = {} if before is None or new else before
    job = replace(
        job,
        format=job.format or known.get("format", "webdataset"),
        shard_size=job.shard_size or known.get("shard_size", SHARD_SIZE),
        batch=job.batch or known.get("batch", BATCH),
        threads=job.threads or known.get("threads", 1),
    )
    if job.format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, got {shown(job.format)}; choose one")
    check_integer("shard size", job.shard_size, 1, MAX_SHARD_SIZE, f"try {SHARD_SIZE}")
    check_integer("batch", job.batch, 1, 1024, f"try {BATCH}")
    check_integer("threads", job.threads, 1, 1024, "try 1")
    record = json.loads(json.dumps(job.record(), default=list))
    if known and (differing := differences(known, record)) and shards_in(store):
        raise InputError(
            f"{shown(store.place, 120)} is of another job: {'; '.join(differing)[:300]}; choose another OUT, or --new "
            "to have its pictures put aside"
        )
    if record != before:
        write_bytes(store, FILE, json.dumps(record, indent=2).encode() + b"\n")
    return job, job.layout(record)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name what differs between two records, with both values."""
    found = []
    for name in dict.fromkeys([*before, *now]):
        old, own = before.get(name), now.get(name)
        if name in FREE or old == own:
            continue
        if name == "settings" and isinstance(old, dict) and isinstance(own, dict):
            of_before, of_now = ({key: shown(value) for key, value in tree.items()} for tree in (old, own))
            found += [
                f"{key} was {of_before.get(key, 'not given')}, is {of_now.get(key, 'not given')}"
                for key in {**old, **own}
                if old.get(key) != own.get(key)
            ]
        elif name == "model_hash":
            found.append(f"model was {str(old)[:12]} ({before.get('model')}), is {str(own)[:12]} ({now.get('model')})")
        else:
            found.append(f"{name} was {shown(old)}, is {shown(own)}")
    return found


def _read(store: Store) -> dict[str, Any] | None:
    data = store.read(FILE)
    if data is None:
        return None
    place = f"{store.place}/{FILE}"
    tree = parse_json(data, place)
    if not isinstance(tree, dict) or tree.get("version") != VERSION:
        raise InputError(f"{shown(place, 200)} must be of version {VERSION}, got another; choose another OUT")
    return {"engine": EAGER, **tree}  # which jobs of before do not say

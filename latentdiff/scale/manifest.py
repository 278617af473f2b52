"""The manifest of a shard: what it holds, row by row. A shard whose manifest is there is done.

JSON lines. The first says how many rows there are, how many failed, and which files hold the pictures, with size and
SHA-256; each further one is a row: its number, the name of its picture, its key in the shard and the SHA-256 of the
picture, or else why there is none. Nothing in it depends on when, where or how often the shard was begun.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentdiff.scale.store import Store

__all__ = ["FAILURES", "MANIFESTS", "Manifest", "read_manifest", "render_failures"]

VERSION = 1
MANIFESTS, FAILURES = "manifests", "failures"
SUFFIX = ".jsonl"


@dataclass(frozen=True)
class Manifest:
    """What a shard holds.

    Attributes:
        shard: its name.
        format: a key of `formats.FORMATS`.
        data: size and SHA-256 of its files, by path.
        entries: of its rows: `row`, `name` and either `key`, `bytes` and `sha256`, or `failed`.
    """

    shard: str
    format: str
    data: Mapping[str, Mapping[str, Any]]
    entries: Sequence[Mapping[str, Any]]

    @property
    def failed(self) -> list[Mapping[str, Any]]:
        """The rows that could not be drawn."""
        return [entry for entry in self.entries if "failed" in entry]

    def render(self) -> bytes:
        """Return the file."""
        lines = b"".join(_line(entry) for entry in self.entries)
        head: dict[str, Any] = {
            "version": VERSION,
            "shard": self.shard,
            "format": self.format,
            "rows": len(self.entries),
            "failed": len(self.failed),
            "data": self.data,
        }
        return _line({**head, "sha256": _digest(head, lines)}) + lines


def file_of(shard: str, folder: str = MANIFESTS) -> str:
    """Return the path of a shard's manifest, or of its list of failures."""
    return f"{folder}/{shard}{SUFFIX}"


def shards_in(store: Store, folder: str = MANIFESTS) -> set[str]:
    """Return the names of the shards that have a manifest, or failures."""
    return {name.removesuffix(SUFFIX) for name in store.list(folder) if name.endswith(SUFFIX)}


def read_manifest(store: Store, shard: str, folder: str = MANIFESTS) -> Manifest | None:
    """Return the manifest of a shard; None where there is none that is whole.

    Raises:
        StorageError: the place fails.
    """
    data = store.read(file_of(shard, folder))
    if data is None:
        return None
    try:
        first, _, rest = data.partition(b"\n")
        head = json.loads(first)
        if head["shard"] != shard or head.pop("sha256") != _digest(head, rest):
            return None
        return Manifest(shard, head["format"], head["data"], [json.loads(line) for line in rest.splitlines()])
    except (ValueError, KeyError, TypeError):
        return None


def render_failures(manifest: Manifest) -> bytes:
    """Return the list of a shard's failures, for people."""
    return b"".join(_line(entry) for entry in manifest.failed)


def count_failures(store: Store, shard: str) -> int:
    """Return how many rows of a shard failed, by its list."""
    return (store.read(file_of(shard, FAILURES)) or b"").count(b"\n")


def _digest(head: Mapping[str, Any], lines: bytes) -> str:
    return hashlib.sha256(_line(head) + lines).hexdigest()


def _line(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(tree, separators=(",", ":"), default=str).encode("utf-8", "surrogatepass") + b"\n"

"""Tar shards in webdataset's layout, indexed once so that every picture in them can be read on its own."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentdiff.errors import InputError

PICTURES = ("png", "jpg", "jpeg", "webp")
MAX_METADATA_BYTES = 2**20


@dataclass
class Member:
    """What the members of one key say: where the picture is, and what is known of it.

    Attributes:
        shard: the tar file.
        key: the name of the members up to the first dot after the last slash.
        row: the object of the .json member, and the .txt member as "text".
        offset: of the picture in the shard, in bytes; None while none was found.
        size: of the picture in bytes.
    """

    shard: Path
    key: str
    row: dict[str, Any]
    offset: int | None = None
    size: int = 0

    def read(self) -> bytes:
        """Return the encoded picture.

        Raises:
            ValueError: there is none.
            OSError: the shard cannot be read.
        """
        if self.offset is None:
            raise ValueError("no picture")
        with self.shard.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.size)


def read_shards(files: Sequence[Path]) -> list[Member]:
    """Return all keys of tar files, in the order of files and of the members in them.

    Raises:
        InputError: a file is no uncompressed tar archive or ends too early.
    """
    return [member for file in files for member in _read_shard(file)]


def _read_shard(file: Path) -> list[Member]:
    members: dict[str, Member] = {}
    try:
        with tarfile.open(file, "r:") as archive:
            for entry in archive:
                if not entry.isreg():
                    continue
                folder, slash, base = entry.name.rpartition("/")
                stem, _, extension = base.partition(".")
                member = members.setdefault(folder + slash + stem, Member(file, folder + slash + stem, {}))
                kind = extension.rpartition(".")[-1].lower()
                if kind in PICTURES and member.offset is None:
                    member.offset, member.size = entry.offset_data, entry.size
                elif kind in ("txt", "json"):
                    member.row.update(_metadata(archive, entry, kind))
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{file} is not a whole, uncompressed tar file ({error}); write it again") from error
    return list(members.values())


def _metadata(archive: tarfile.TarFile, entry: tarfile.TarInfo, kind: str) -> dict[str, Any]:
    """Return what a .txt or .json member says; one that cannot be read says nothing, as if it were missing."""
    stream = archive.extractfile(entry)
    if stream is None or entry.size > MAX_METADATA_BYTES:
        return {}
    try:
        text = stream.read().decode("utf-8")
        found = {"text": text.strip()} if kind == "txt" else json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}

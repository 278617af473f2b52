"""Tar shards in webdataset's layout, indexed once so that every picture in them can be read on its own."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import tarfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from latentdiff.errors import InputError
from latentdiff.files import is_file, make_folder, open_file, parse_json, read_file, write_file
from latentdiff.images import MAX_FILE_BYTES

from .image_info import ImageInfo, decoded, info_of, is_finding, locked, try_info
from .prefetch import prefetched
from .remote import Forward, RemoteFile, is_remote, look_up, read_range, without_secrets

PICTURES = ("png", "jpg", "jpeg", "webp")
MAX_METADATA_BYTES = 2**20
MAX_SHARDS = 1_000_000
TOO_LARGE = f"is larger than {MAX_FILE_BYTES // 2**20} MiB"
MAX_KEPT_BYTES = 2**30
HELD_BYTES = 2**26  # of pictures that wait to be decoded while a remote shard is read


@dataclass
class Member:
    """What the members of one key say: where the picture is, and what is known of it.

    Attributes:
        shard: path or URL of the tar file.
        key: the name of the members up to the first dot after the last slash.
        row: the object of the .json member, and the .txt or .caption member as "text".
        offset: of the picture in the shard, in bytes; None while none was found.
        size: of the picture in bytes.
        finding: of the picture in a remote shard, which is examined as it passes by.
    """

    shard: str
    key: str
    row: dict[str, Any]
    offset: int | None = None
    size: int = 0
    finding: ImageInfo | str | None = None

    @property
    def name(self) -> str:
        """What the picture is called in messages."""
        place = without_secrets(self.shard) if is_remote(self.shard) else self.shard
        return f"{place.rpartition('/')[2]}: {self.key}"

    def read(self) -> bytes:
        """Return the encoded picture.

        Raises:
            ValueError: there is none.
            OSError: the shard cannot be read.
        """
        if self.offset is None:
            raise ValueError("no picture")
        if self.size > MAX_FILE_BYTES:
            raise ValueError(TOO_LARGE)
        if is_remote(self.shard):
            return read_range(self.shard, self.offset, self.size)
        with open_file(self.shard) as stream:
            stream.seek(self.offset)
            return stream.read(self.size)


def expand_braces(pattern: str) -> list[str]:
    """Return the names that a pattern stands for: `{0000..0019}` for numbers, `{a,b}` for one of several.

    Raises:
        InputError: they are too many, or a range runs backwards.
    """
    pieces = re.split(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}", pattern)  # what is in braces comes every second time
    choices: list[Sequence[str]] = [[piece] for piece in pieces]
    for place in range(1, len(pieces), 2):
        first, dots, last = pieces[place].partition("..")
        if not dots:
            choices[place] = pieces[place].split(",")
            continue
        if not int(first) <= int(last) < int(first) + MAX_SHARDS:
            raise InputError(
                f"{pattern}: {{{pieces[place]}}} must run up to at most {MAX_SHARDS:,} shards, as {{0000..0019}}"
            )
        choices[place] = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    if math.prod(map(len, choices)) > MAX_SHARDS:
        raise InputError(f"{pattern} stands for more than {MAX_SHARDS:,} shards; name fewer")
    return ["".join(parts) for parts in product(*choices)]


def read_shards(files: Sequence[Path]) -> list[Member]:
    """Return all keys of tar files, in the order of files and of the members in them.

    Raises:
        InputError: a file is no uncompressed tar archive or ends too early.
    """
    members = []
    for file in files:
        try:
            with open_file(file) as stream:
                members += _read_shard(stream, str(file), str(file))
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error.strerror}); check the path") from error
    return members


def read_remote_shards(urls: Sequence[str], cache: Path | None) -> list[Member]:
    """Return all keys of remote tar files, each with what is found of its picture.

    Each shard is read once, from its first byte to its last, and what was found is kept under its address, size and
    tag, so that a run that was stopped goes on with the shards it lacks.

    Args:
        cache: folder of what is kept; None keeps nothing.

    Raises:
        InputError: a file is not there, gives no ranges, or is no whole, uncompressed tar archive.
        StorageError: a server cannot be reached, or the cache cannot be written.
    """
    if cache is not None:
        make_folder(cache)
    files = list(prefetched(lambda number: look_up(urls[number]), range(len(urls)), threads=8))
    size, members = sum(file.size for file in files), []
    with (
        locked(cache / "shards.lock") if cache else nullcontext(),  # one process reads, the others what it found
        tqdm(desc="shards", total=size, unit="B", unit_scale=True, disable=size < HELD_BYTES) as progress,
    ):
        for file in files:
            members += _read_remote_shard(file, cache)
            progress.update(file.size)
    return members


def _read_remote_shard(file: RemoteFile, cache: Path | None) -> list[Member]:
    stamp = hashlib.sha256(f"{without_secrets(file.url)}\0{file.size}\0{file.tag}".encode()).hexdigest()[:16]
    kept = cache / f"shard-{stamp}.json" if cache else None
    if kept is not None and (found := _kept(kept, file)) is not None:
        return found
    stream, passing = Forward(file), _Passing()
    try:
        members = _read_shard(stream, file.url, without_secrets(file.url), passing.add)
    finally:
        stream.close()
    passing.examine()
    if kept is not None:
        rows = [{name: value for name, value in asdict(one).items() if name != "shard"} for one in members]
        write_file(kept, json.dumps(rows).encode())
    return members


def _kept(kept: Path, file: RemoteFile) -> list[Member] | None:
    """Return what was written down of a remote shard; None where that is not there, or damaged."""
    if not is_file(kept):
        return None
    try:
        rows = parse_json(read_file(kept, MAX_KEPT_BYTES), str(kept))
        if isinstance(rows, list) and all(map(_is_member, rows)):
            return [Member(shard=file.url, **one) for one in rows]
    except InputError:
        pass
    print(f"{kept} is damaged; {file.name} is read again", file=sys.stderr)
    return None


def _is_member(one: object) -> bool:
    """Say whether a value that was read from a file is what is kept of a `Member`."""
    if not isinstance(one, dict) or set(one) != {"key", "row", "offset", "size", "finding"}:
        return False
    placed = one["offset"] is None or type(one["offset"]) is int
    told = one["finding"] is None or is_finding(one["finding"])
    return isinstance(one["key"], str) and isinstance(one["row"], dict) and type(one["size"]) is int and placed and told


class _Passing:
    """Pictures of a shard that is being read, examined some at a time."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Member, bytes]] = []
        self.size = 0

    def add(self, member: Member, data: bytes) -> None:
        self.waiting.append((member, data))
        self.size += len(data)
        if self.size >= HELD_BYTES:
            self.examine()

    def examine(self) -> None:
        findings = prefetched(self._finding, range(len(self.waiting)))
        for (member, _), finding in zip(self.waiting, findings, strict=True):
            member.finding = finding
        self.waiting, self.size = [], 0

    def _finding(self, number: int) -> ImageInfo | str:
        member, data = self.waiting[number]

        def read_info() -> ImageInfo:
            with decoded(data, member.name) as found:
                return info_of(*found)

        return try_info(read_info, member.name)


def _read_shard(
    stream: Any, shard: str, name: str, pass_by: Callable[[Member, bytes], None] | None = None
) -> list[Member]:
    """Return the keys of a shard.

    Args:
        stream: of its bytes; read forwards.
        name: of the shard, for messages.
        pass_by: given every picture.

    Raises:
        InputError: it is no uncompressed tar archive or ends too early.
    """
    members: dict[str, Member] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for entry in archive:
                if entry.size < 0:  # which would lead back to where it came from
                    raise tarfile.ReadError(f"a size of {entry.size}")
                folder, slash, base = entry.name.rpartition("/")
                if not entry.isreg() or base.startswith("._"):  # which macOS puts beside each file
                    continue
                stem, _, extension = base.partition(".")
                member = members.setdefault(folder + slash + stem, Member(shard, folder + slash + stem, {}))
                kind = extension.rpartition(".")[-1].lower()
                if kind in PICTURES and member.offset is None:
                    member.offset, member.size = entry.offset_data, entry.size
                    if entry.size > MAX_FILE_BYTES:
                        member.finding = TOO_LARGE
                    elif pass_by is not None:
                        pass_by(member, _content(archive, entry, entry.size))
                elif kind == "caption":  # that of the other kinds is the one, where there are several
                    member.row = _metadata(archive, entry, kind) | member.row
                elif kind in ("txt", "json"):
                    member.row.update(_metadata(archive, entry, kind))
            stream.seek(archive.offset)  # of the first block that is no header of a member
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"the block of zeros at its end is not at byte {archive.offset}")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{name} is not a whole, uncompressed tar file ({error}); write it again") from error
    return list(members.values())


def _metadata(archive: tarfile.TarFile, entry: tarfile.TarInfo, kind: str) -> dict[str, Any]:
    """Return what a .txt, .caption or .json member says; nothing, if it cannot be read."""
    try:
        cut = entry.size > MAX_METADATA_BYTES  # which leaves a text that is too long for a caption, and no JSON
        text = _content(archive, entry, MAX_METADATA_BYTES).decode("utf-8", "ignore" if cut else "strict")
        content = json.loads(text) if kind == "json" else {"text": text.strip()}
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _content(archive: tarfile.TarFile, entry: tarfile.TarInfo, most: int) -> bytes:
    """Return the first `most` bytes of a member."""
    stream = archive.extractfile(entry)
    return b"" if stream is None else stream.read(most)

"""How a shard holds its pictures: a tar archive in webdataset's layout, a parquet file, or a folder of files.

Each is the same to the byte whenever it is written: no times, no users, nothing of the machine.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, cast

from latentdiff.errors import StorageError
from latentdiff.files import fingerprint
from latentdiff.scale.store import Store

__all__ = ["FORMATS", "SHARDS", "Format", "Picture", "Sample"]

SHARDS = "shards"
PICTURES_IN_GROUP = 64  # of a parquet file, which are held in memory together


@dataclass(frozen=True)
class Picture:
    """A picture as it is stored.

    Attributes:
        data: PNG.
        settings: that make it again; see `GeneratedImage.record`.
    """

    data: bytes
    settings: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """The hash of the PNG."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Sample:
    """A row of a shard with its picture.

    Attributes:
        key: its name in the shard: that of the picture, with a number where rows are equal.
        name: of the picture.
        row: number in the table.
        kept: further cells of the row.
    """

    key: str
    name: str
    row: int
    kept: Mapping[str, Any]
    picture: Picture


Files = dict[str, dict[str, Any]]
"""Size and SHA-256 of what was written, by path."""


class Format(Protocol):
    """A way to hold pictures."""

    def path(self, shard: str) -> str:
        """Return the file or folder of a shard."""

    def write(self, store: Store, shard: str, samples: Iterable[Sample], kept: tuple[str, ...]) -> Files:
        """Write a shard as its samples come.

        Args:
            kept: names of all columns that are kept.
        """

    def read(self, store: Store, path: str, keys: set[str]) -> Iterator[tuple[str, Picture]]:
        """Yield the pictures of some keys."""


class WebDataset:
    """KEY.png, KEY.json and KEY.txt, the prompt, one after another in an uncompressed tar archive."""

    def path(self, shard: str) -> str:
        return f"{SHARDS}/{shard}.tar"

    def write(self, store: Store, shard: str, samples: Iterable[Sample], kept: tuple[str, ...]) -> Files:
        path = self.path(shard)
        with store.writing(path) as file:
            hashed = Hashed(file)
            with tarfile.open(fileobj=cast(BinaryIO, hashed), mode="w|", format=tarfile.USTAR_FORMAT) as archive:
                for sample in samples:
                    for suffix, data in self._members(sample):
                        info = tarfile.TarInfo(f"{sample.key}.{suffix}")
                        info.size = len(data)
                        archive.addfile(info, io.BytesIO(data))
        return {path: hashed.fingerprint}

    def _members(self, sample: Sample) -> Iterator[tuple[str, bytes]]:
        settings = sample.picture.settings
        told = {**sample.kept, "name": sample.name, "row": sample.row, "prompt": settings["prompt"]}
        yield "json", rendered({**told, "seed": settings["seed"], "settings": settings})
        yield "png", sample.picture.data
        yield "txt", settings["prompt"].encode("utf-8", "surrogatepass")

    def read(self, store: Store, path: str, keys: set[str]) -> Iterator[tuple[str, Picture]]:
        settings: Any = None
        with store.open(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for entry in archive:
                key, _, suffix = entry.name.partition(".")
                content = archive.extractfile(entry) if key in keys and suffix in ("json", "png") else None
                if content is None:
                    continue
                if suffix == "json":
                    settings = json.loads(content.read())["settings"]
                else:
                    yield key, Picture(content.read(), settings)


class Parquet:
    """One row for each picture, which `datasets.load_dataset("parquet", ...)` shows as one."""

    def path(self, shard: str) -> str:
        return f"{SHARDS}/{shard}.parquet"

    def write(self, store: Store, shard: str, samples: Iterable[Sample], kept: tuple[str, ...]) -> Files:
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        picture = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        columns = {"key": pa.string(), "name": pa.string(), "row": pa.int64(), "prompt": pa.string()}
        columns |= {"seed": pa.int64(), "image": picture, "settings": pa.string()}
        columns |= {name: pa.string() for name in kept if name not in columns}
        features = {"info": {"features": {"image": {"_type": "Image"}, **_plain(columns)}}}
        schema = pa.schema(columns, metadata={"huggingface": json.dumps(features)})
        path = self.path(shard)
        with store.writing(path) as file:
            hashed = Hashed(file)
            with ParquetWriter(hashed, schema, compression="none") as writer:  # PNGs are as small as they get
                for group in _groups(samples):
                    rows = [self._row(sample, columns) for sample in group]
                    writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        return {path: hashed.fingerprint}

    def _row(self, sample: Sample, columns: Mapping[str, Any]) -> dict[str, Any]:
        settings = sample.picture.settings
        kept = {name: cell if isinstance(cell, str) else json.dumps(cell, default=str) for name, cell in _there(sample)}
        return {
            **{name: kept.get(name) for name in columns},
            "key": sample.key,
            "name": sample.name,
            "row": sample.row,
            "prompt": settings["prompt"],
            "seed": settings["seed"],
            "image": {"bytes": sample.picture.data, "path": f"{sample.key}.png"},
            "settings": rendered(settings).decode(),
        }

    def read(self, store: Store, path: str, keys: set[str]) -> Iterator[tuple[str, Picture]]:
        from pyarrow.parquet import ParquetFile

        with store.open(path) as file:
            for batch in ParquetFile(file).iter_batches(PICTURES_IN_GROUP, columns=["key", "image", "settings"]):
                for row in batch.to_pylist():
                    if row["key"] in keys:
                        yield row["key"], Picture(row["image"]["bytes"], json.loads(row["settings"]))


class PlainFiles:
    """A folder with KEY.png and KEY.json for each picture."""

    def path(self, shard: str) -> str:
        return f"{SHARDS}/{shard}"

    def write(self, store: Store, shard: str, samples: Iterable[Sample], kept: tuple[str, ...]) -> Files:
        folder, files = self.path(shard), Files()
        store.remove(folder)  # of a run that was killed
        for sample in samples:
            settings = sample.picture.settings
            told = {**sample.kept, "name": sample.name, "row": sample.row, "settings": settings}
            for suffix, data in (("json", rendered(told)), ("png", sample.picture.data)):
                path = f"{folder}/{sample.key}.{suffix}"
                with store.writing(path) as file:
                    file.write(data)
                files[path] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return files

    def read(self, store: Store, path: str, keys: set[str]) -> Iterator[tuple[str, Picture]]:
        for key in sorted(keys):
            told, data = store.read(f"{path}/{key}.json"), store.read(f"{path}/{key}.png")
            if told is not None and data is not None:
                yield key, Picture(data, json.loads(told)["settings"])


FORMATS: dict[str, Format] = {"webdataset": WebDataset(), "parquet": Parquet(), "files": PlainFiles()}


class Hashed:
    """A file that is written from its first byte to its last, and hashed meanwhile."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._size = file, hashlib.sha256(), 0
        self.closed = False

    def write(self, data: Any) -> int:
        """Write bytes."""
        self._digest.update(data)
        self._size += memoryview(data).nbytes
        self._file.write(data)
        return memoryview(data).nbytes

    def tell(self) -> int:
        """Return the place of the next byte."""
        return self._size

    def flush(self) -> None:
        """Pass on what was written."""
        self._file.flush()

    def close(self) -> None:
        """Leave the file itself to its owner."""

    def writable(self) -> bool:
        """Say that it can be written."""
        return True

    def readable(self) -> bool:
        """Say that it cannot be read."""
        return False

    def seekable(self) -> bool:
        """Say that it has no other place than its end."""
        return False

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Size and SHA-256 of all that was written."""
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}


def rendered(tree: Mapping[str, Any]) -> bytes:
    """Return JSON on one line."""
    return json.dumps(tree, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")


def damage(store: Store, path: str, expected: Mapping[str, Any]) -> bool:
    """Say whether a file is another than was written, to its last byte.

    Raises:
        StorageError: the place fails.
    """
    try:
        with store.open(path) as file:
            found = fingerprint(file)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return True
        raise
    return found != (expected["bytes"], expected["sha256"])


def _plain(columns: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"dtype": str(kind), "_type": "Value"} for name, kind in columns.items() if name != "image"}


def _there(sample: Sample) -> Iterator[tuple[str, Any]]:
    return ((name, cell) for name, cell in sample.kept.items() if cell is not None)


def _groups(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    group = list[Sample]()
    for sample in samples:
        group.append(sample)
        if len(group) == PICTURES_IN_GROUP:
            yield group
            group = []
    if group:
        yield group

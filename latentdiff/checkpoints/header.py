"""The header of a safetensors file, checked in full before a single tensor is allocated.

The format: 8 bytes of little-endian length, that many bytes of JSON naming dtype, shape and place of every tensor, then
the bytes of the tensors without gap. The checks here are stricter than the reference reader's, which lets duplicate
names and unknown keys pass.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from latentdiff.errors import ModelFormatError, ModelPathError, UnsafeModelError, suggest

__all__ = ["DTYPE_BYTES", "Header", "TensorInfo", "read_header", "require_regular"]

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 20_000
MAX_RANK = 8
MAX_DIGITS = 15  # of any number in the header: far above every real size, far below what overflows
MAX_QUOTES = 2**20  # bounds how many strings the JSON parser makes of a hostile header

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}

# What is never opened, by the bytes it starts with (or has at 257, for tar).
UNSAFE = (
    (0, b"PK\x03\x04", "a zip archive, as torch.save writes"),
    (0, b"PK\x05\x06", "a zip archive"),
    (0, b"\x80\x02", "a pickle"),
    (0, b"\x80\x03", "a pickle"),
    (0, b"\x80\x04", "a pickle"),
    (0, b"\x80\x05", "a pickle"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"BZh", "a bzip2 archive"),
    (0, b"\xfd7zXZ", "an xz archive"),
    (0, b"\x28\xb5\x2f\xfd", "a zstandard archive"),
    (0, b"7z\xbc\xaf", "a 7z archive"),
    (0, b"GGUF", "a GGUF file"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\x93NUMPY", "a NumPy file, which may hold pickles"),
    (257, b"ustar", "a tar archive"),
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its dtype (a key of `DTYPE_BYTES`), shape, and where in the file its bytes start."""

    dtype: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds: tensors by name, and its free-form metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def require_regular(path: Path) -> int:
    """Return the size of a regular file in bytes.

    Raises:
        ModelPathError: there is no such file, or it cannot be read.
        ModelFormatError: it is a folder, device or pipe.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise ModelPathError(
            f"{path}: expected a file, got none ({getattr(error, 'strerror', None) or error})"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise ModelFormatError(f"{path}: expected a regular file, got a folder, device or pipe")
    return status.st_size


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        UnsafeModelError: the content is a pickle, an archive or another format that is never opened.
        ModelFormatError: the content is not a well-formed safetensors file.
        ModelPathError: there is no such file.
    """
    size = require_regular(path)
    try:
        with path.open("rb") as file:
            start = file.read(512)
            length = int.from_bytes(start[:8], "little")
            if start[8:9] != b"{" or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                _refuse(path, start, length, size)
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise ModelPathError(f"{path}: cannot be read ({error.strerror})") from error
    # Those inside of strings, such as training statistics that are JSON, begin and end none.
    if len(raw) != length or raw.count(b'"') - raw.count(b'\\"') > MAX_QUOTES:
        raise _bad(path, "its header is cut off or holds too many strings")
    return _check(path, _parse(path, raw), 8 + length, size)


def _refuse(path: Path, start: bytes, length: int, size: int) -> None:
    """Raise the error for a file that does not start as safetensors files do."""
    like_ours = start[4:9] == b"\0\0\0\0{"  # a damaged safetensors file, whose length may look like another mark
    for offset, mark, what in UNSAFE:
        if start[offset : offset + len(mark)] == mark and not like_ours:
            raise UnsafeModelError(
                f"{path}: expected safetensors, got {what}, which can run code when opened; "
                "convert it to safetensors where you trust it"
            )
    if size == 0:
        raise _bad(path, "it is empty")
    if start[8:9] != b"{":
        raise _bad(path, "it does not start with a safetensors header")
    limit = f"{MAX_HEADER_BYTES // 2**20} MiB and the {size} bytes of the file"
    reason = f"its header claims {length} bytes, which must fit in {limit}"
    if length <= size - 8:
        raise ModelFormatError(f"{path}: {reason}; if it is all metadata, save the tensors again without")
    raise _bad(path, reason)


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    objects = 0

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal objects
        objects += 1
        if objects > MAX_TENSORS + 2:  # the tensors, the metadata, and what is around them
            raise ValueError(f"more than {MAX_TENSORS} tensors")
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name twice")
        for text in (*found, *found.values()):
            if isinstance(text, str):
                text.encode()  # half of a surrogate pair is no text, and raises
        return found

    def whole(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise ValueError("a number too large")
        if digits == "-0":
            raise ValueError("-0, which is no whole number")
        return int(digits)

    def never(text: str) -> Any:
        raise ValueError(f"{text[:20]}, which is no whole number")

    try:
        tree = json.loads(
            raw.decode("utf-8"), object_pairs_hook=unique, parse_int=whole, parse_float=never, parse_constant=never
        )
    except json.JSONDecodeError as error:
        raise _bad(path, f"its header is not JSON ({error.msg} at byte {error.pos})") from error
    except (ValueError, RecursionError) as error:
        reason = "is nested too deeply" if isinstance(error, RecursionError) else f"holds {error}"
        raise _bad(path, f"its header {reason}") from error
    if not isinstance(tree, dict):
        raise _bad(path, "its header is no JSON object")
    return tree


def _check(path: Path, tree: dict[str, Any], data_start: int, size: int) -> Header:
    metadata = tree.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, "its __metadata__ must map text to text")
    if not 1 <= len(tree) <= MAX_TENSORS:
        raise _bad(path, f"it holds {len(tree)} tensors, which must be 1 to {MAX_TENSORS}")
    tensors, places = {}, []
    for name, entry in tree.items():
        dtype, shape, begin, end = _entry(path, name, entry)
        tensors[name] = TensorInfo(dtype, shape, data_start + begin)
        places.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(places):
        if begin != position:
            raise _bad(path, f"{'a hole' if begin > position else 'an overlap'} before tensor {_short(name)}")
        position = end
    if position != size - data_start:
        raise _bad(path, f"its tensors take {position} bytes, but {size - data_start} follow the header")
    return Header(tensors, metadata)


def _entry(path: Path, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """Return dtype, shape, and the first byte and that behind the last, counted from the end of the header."""
    label = f"tensor {_short(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"{label} must have dtype, shape and data_offsets and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _bad(path, f"{label} has unknown dtype {_short(str(dtype))}{suggest(str(dtype)[:20], DTYPE_BYTES)}")
    if not _whole_numbers(shape) or len(shape) > MAX_RANK:
        raise _bad(path, f"{label} must have a shape of at most {MAX_RANK} whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(path, f"{label} must have two rising data_offsets")
    if prod(side or 1 for side in shape) * DTYPE_BYTES[dtype] >= 2**63:  # possible where another side is 0
        raise _bad(path, f"{label} has a shape that no memory can address")
    implied = prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != implied:
        raise _bad(path, f"{label} takes {offsets[1] - offsets[0]} bytes, but its shape implies {implied}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _bad(path: Path, reason: str) -> ModelFormatError:
    return ModelFormatError(f"{os.fspath(path)}: not a well-formed safetensors file: {reason}; get it again")

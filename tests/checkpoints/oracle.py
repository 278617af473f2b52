"""What a safetensors file holds by the rules alone, written a second time to judge the loader, without its code."""

from __future__ import annotations

import json
import re
from math import prod
from typing import Any

import torch
from torch import Tensor

SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
FLOATS = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
SIZES |= {name: dtype.itemsize for name, dtype in FLOATS.items()}


class Pairs(list[tuple[str, Any]]):
    """The members of a JSON object in their order, doubles included."""


class Number(str):
    """A number as it is written."""

    __slots__ = ()


def rules(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Return dtype, shape and bytes of every tensor by name, or None for a file that breaks a rule."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 10 or not 2 <= length <= min(16 * 2**20, len(content) - 8) or content[8:9] != b"{":
        return None
    try:
        text = content[8 : 8 + length].decode()
        tree = json.loads(text, object_pairs_hook=Pairs, parse_int=Number, parse_float=Number, parse_constant=Number)
        json.dumps(tree, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError):
        return None
    metadata = [value for name, value in tree if name == "__metadata__"]
    entries = [(name, value) for name, value in tree if name != "__metadata__"]
    if len(metadata) > 1 or not all(_texts(value) for value in metadata):
        return None
    if len(dict(entries)) != len(entries) or not 1 <= len(entries) <= 20_000:
        return None
    data, places = content[8 + length :], []
    for name, entry in entries:
        if type(entry) is not Pairs or sorted(key for key, _ in entry) != ["data_offsets", "dtype", "shape"]:
            return None
        components = dict(entry)
        shape, offsets = _whole(components["shape"]), _whole(components["data_offsets"])
        if type(components["dtype"]) is not str or components["dtype"] not in SIZES:
            return None
        if shape is None or offsets is None or len(shape) > 8 or len(offsets) != 2:
            return None
        size = SIZES[components["dtype"]]
        if offsets[1] - offsets[0] != prod(shape) * size or prod(max(side, 1) for side in shape) * size >= 2**63:
            return None
        places.append((offsets[0], offsets[1], name, components["dtype"], shape))
    position = 0
    for begin, end, *_ in sorted(places):
        if begin != position:
            return None
        position = end
    if position != len(data):
        return None
    return {name: (dtype, shape, data[begin:end]) for begin, end, name, dtype, shape in places}


def _texts(value: Any) -> bool:
    return (
        type(value) is Pairs
        and all(type(text) is str for _, text in value)
        and len({key for key, _ in value}) == len(value)
    )


def _whole(value: Any) -> tuple[int, ...] | None:
    if type(value) is not list or not all(
        type(item) is Number and re.fullmatch(r"0|[1-9]\d{0,14}", item) for item in value
    ):
        return None
    return tuple(int(item) for item in value)


def tensor(dtype: str, shape: tuple[int, ...], content: bytes) -> Tensor:
    """Return a tensor of its bytes."""
    if not content:
        return torch.empty(shape, dtype=FLOATS[dtype])
    return torch.frombuffer(bytearray(content), dtype=FLOATS[dtype]).reshape(shape)


def finite(weights: Tensor) -> bool:
    """Say whether every value is finite."""
    return bool(torch.isfinite(weights.to(torch.float64)).all())


def bitwise_equal(first: Tensor, second: Tensor) -> bool:
    """Say whether dtypes, shapes and all bits are the same."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[first.dtype.itemsize]
    return torch.equal(first.contiguous().view(kind), second.contiguous().view(kind))

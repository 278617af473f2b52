"""Safetensors files with one thing changed, harmless or not; `oracle.py` tells which."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import random
import tarfile
import zipfile
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from tests.checkpoints.oracle import FLOATS, SIZES, rules, tensor

Entries = list[tuple[str, Any]]  # of a header, doubles allowed

WORDS = (
    "a",
    "b.weight",
    "conv_in.bias",
    "",
    "é",
    "\u540d",
    "\U0001f98a",
    "a b",
    "x" * 300,
    "../a",
    "\u202e",
    "\n",
    "\0",
)
NON_FINITE = {
    "F8_E4M3": ("7f", "ff"),
    "F8_E5M2": ("7c", "7d", "fc"),
    "F16": ("007c", "00fc", "007e", "01fc"),
    "BF16": ("807f", "80ff", "c07f"),
    "F32": ("0000807f", "000080ff", "0000c07f", "010080ff"),
    "F64": ("000000000000f07f", "000000000000f0ff", "000000000000f87f"),
}
# JSON texts put where something else belongs.
ODD = (
    *("null", "true", "false", "-1", "-0", "0", "1", "2", "8", "0.5", "2.0", "1e3", "1E400", "01", "+1", "0x10", "1_0"),
    *("NaN", "Infinity", "-Infinity", "2147483648", "9223372036854775807", "18446744073709551616"),
    *("9" * 15, "9" * 16, "9" * 5000, '""', '"F32"', '"F16"', '"\\ud800"', "[]", "{}", "[0]", "[[0]]", "[1,2,3]"),
    *("[0,8]", "[0,0]", "[8,0]", "[-8,0]", "[0,1e2]", '["0","8"]', '{"a":1,"a":1}', "", ",", "[", "}", "'a'", "//"),
)
DTYPES = (
    "f32",
    "F23",
    "F4",
    "F6_E2M3",
    "F8_E8M0",
    "F8_E4M3FNUZ",
    "C64",
    "F128",
    "float32",
    "F32 ",
    "F\u0663\u0662",
    "",
)


def good(rng: random.Random) -> tuple[Entries, bytes]:
    """Return header and data of a small file, all of whose numbers are below 2 in size."""
    entries: Entries = []
    data = bytearray()
    for number in range(rng.randint(1, 4)):
        dtype = rng.choice(list(SIZES))
        shape = [rng.randint(0 if rng.random() < 0.1 else 1, 4) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 8)))]
        count = 1
        for i, side in enumerate(shape):
            shape[i] = side if count * side <= 64 else 1
            count *= shape[i]
        raw = bytearray(rng.randbytes(count * SIZES[dtype]))
        if dtype in FLOATS:
            for last in range(SIZES[dtype] - 1, len(raw), SIZES[dtype]):
                raw[last] &= 0xBF  # the highest bit of the exponent
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
        entries.append((f"{number}{rng.choice(WORDS)}", entry))
    rng.shuffle(entries)
    if rng.random() < 0.3:
        entries.insert(0, ("__metadata__", {"format": "pt", rng.choice(WORDS): rng.choice(WORDS)}))
    return entries, bytes(data)


def join(entries: Entries | str, data: bytes, padding: int = 0) -> bytes:
    """Return the bytes of a file; a string is taken as the text of its header."""
    text = entries if isinstance(entries, str) else written(entries)
    header = text.encode("utf-8", "surrogatepass") + b" " * padding
    return len(header).to_bytes(8, "little") + header + data


def split(content: bytes) -> tuple[Entries, bytes]:
    """Return header and data of a good file."""
    length = int.from_bytes(content[:8], "little")
    return list(json.loads(content[8 : 8 + length]).items()), content[8 + length :]


def written(entries: Entries) -> str:
    """Return the text of a header."""
    return "{" + ",".join(f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in entries) + "}"


def same(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    """Write the same otherwise: order, blanks, escapes."""
    rng.shuffle(entries)
    text = json.dumps(dict(entries), indent=rng.choice((None, 1)), ensure_ascii=rng.random() < 0.5)
    return join(text, data, rng.randint(0, 9))


def flip(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    """Change a few bytes, most of them in the header."""
    content = bytearray(join(entries, data))
    end = len(content) if rng.random() < 0.2 else len(content) - len(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(end)
        content[place] = rng.choice((content[place] ^ 1 << rng.randrange(8), rng.randrange(256)))
    return bytes(content)


def cut(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    """Remove or insert bytes at any place."""
    content = join(entries, data)
    place, count = rng.randrange(len(content) + 1), rng.choice((1, 2, 8, 100))
    return rng.choice(
        (
            content[:place],
            content[:place] + content[place + count :],
            content[:place] + rng.randbytes(count) + content[place:],
        )
    )


def trailing(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    """Make the data longer or shorter than the header says."""
    count = rng.choice((1, 7, 8, 4096))
    return join(entries, rng.choice((data + bytes(count), data[:-count], bytes(count) + data)))


def length(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    """Let the first eight bytes say something else."""
    content = join(entries, data)
    true = int.from_bytes(content[:8], "little")
    choices = (0, 1, 2, true - 1, true + 1, len(content) - 8, len(content), 2**24, 2**24 + 1, 2**31, 2**63, 2**64 - 1)
    return rng.choice(choices).to_bytes(8, "little") + content[8:]


def offsets(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    """Move where tensors begin or end: holes, overlaps, exchanges."""
    places = [entry["data_offsets"] for name, entry in entries if name != "__metadata__"]
    first, second = rng.choice(places), rng.choice(places)
    change = rng.randrange(4)
    if change == 0:
        first[rng.randrange(2)] += rng.choice((-8, -1, 1, 2, 8, 2**40))
    elif change == 1:
        step = rng.choice((-4, 1, 4, 64))
        first[:] = [first[0] + step, first[1] + step]
    elif change == 2:
        first[:], second[:] = list(second), list(first)
    else:
        first[:] = list(second)
    return join(entries, data)


def shape(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    """Change a shape: other sides, more of them, or the same number of values in another one."""
    entry = rng.choice([entry for name, entry in entries if name != "__metadata__"])
    sides = entry["shape"]
    change = rng.randrange(5)
    if change == 0:
        sides.insert(rng.randint(0, len(sides)), rng.choice((0, 1, 2, 2**31, 10**14, 10**18)))
    elif change == 1:
        sides[:] = sides[::-1]
    elif change == 2:
        sides.extend([1] * rng.choice((1, 7, 8, 9, 1000)))
    elif change == 3:
        empty = {"dtype": rng.choice(list(SIZES)), "data_offsets": [len(data), len(data)]}
        entries.append(("empty", {**empty, "shape": [0, *[10 ** rng.choice((1, 6, 9, 14))] * rng.randint(1, 7)]}))
    elif sides:
        sides[rng.randrange(len(sides))] += rng.choice((-1, 1))
    return join(entries, data)


def dtype(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    """Name another dtype, one of the same size among them."""
    entry = rng.choice([entry for name, entry in entries if name != "__metadata__"])
    entry["dtype"] = rng.choice((*SIZES, *DTYPES))
    return join(entries, data)


def names(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    """Give a tensor another name, perhaps one that another has, or write one twice."""
    place = rng.randrange(len(entries))
    others = [name for name, _ in entries]
    name = rng.choice((*WORDS, *others, "__metadata__", "\ud800", "\udfff\ud800", "x" * 100_000))
    if rng.random() < 0.5:
        entries[place] = (name, entries[place][1])
    else:
        entries.append((name, entries[place][1]))
    return join(entries, data)


def keys(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    """Add, leave out or rename a key of an entry, or write one twice."""
    place = rng.randrange(len(entries))
    name, entry = entries[place]
    text = json.dumps(entry)
    key = rng.choice(list(entry))
    other = rng.choice((*SIZES, "x", "", "Dtype", "auto_map", "__class__", "offset", *entry))
    changed = rng.choice(
        (
            json.dumps({k: v for k, v in entry.items() if k != key}),
            text.replace(json.dumps(key), json.dumps(other), 1),
            text[:-1] + f", {json.dumps(other)}: {rng.choice(ODD)}" + "}",
            text[:-1] + f", {json.dumps(key)}: {json.dumps(entry[key])}" + "}",
        )
    )
    entries[place] = (name, "@@")
    return join(written(entries).replace('"@@"', changed, 1), data)


def odd(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    """Put an odd value in the place of another one, at any depth."""
    value = rng.choice(ODD)
    place = rng.randrange(len(entries))
    name, entry = entries[place]
    key = rng.choice(list(entry))
    inner = entry[key]
    if isinstance(inner, list) and inner and rng.random() < 0.6:
        inner[rng.randrange(len(inner))] = "@@"
    elif rng.random() < 0.7:
        entry[key] = "@@"
    else:
        entries[place] = (name, "@@")
    return join(written(entries).replace('"@@"', value, 1), data)


def nested(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    """Nest brackets, closed or not, where a value belongs."""
    depth = rng.choice((2, 2, 9, 50, 50, 900, 1100, 5000, 20_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    value = opening * depth + rng.choice(("", "1" + closing * depth))
    entries.append((rng.choice(("x", "__metadata__")), "@@"))
    return join(written(entries).replace('"@@"', value, 1), data)


def structure(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    """Write a header that is no object of entries."""
    text = written(entries)
    kinds = ("[]", "{}", '""', "0", "null", "", " ", f"[{text}]", f" {text}", f"\ufeff{text}", f"{text}{{}}", text[:-1])
    more = ('{"__metadata__":{}}', f'{{"tensors":{text}}}', text[:-1] + ",}", text.replace('"', "'"), text + "\n")
    return join(rng.choice((*kinds, *more)), rng.choice((data, b"")))


def non_finite(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    """Put a NaN or an infinity, or a number beyond half precision, into a tensor of floats, where there is one."""
    found = [entry for _, entry in entries if entry.get("dtype") in NON_FINITE]
    found = [entry for entry in found if entry["data_offsets"][0] < entry["data_offsets"][1]]
    if not found:
        return join(entries, data)
    entry = rng.choice(found)
    kind, (begin, end) = entry["dtype"], entry["data_offsets"]
    large = {"F32": "00ca9a47", "F64": "00000000d012f340"}
    value = bytes.fromhex(rng.choice((*NON_FINITE[kind], large.get(kind, NON_FINITE[kind][0]))))
    place = begin + len(value) * rng.randrange((end - begin) // len(value))
    return join(entries, data[:place] + value + data[place + len(value) :])


def many(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    """Write about as many tensors as are allowed."""
    count = 20_000 - len([name for name, _ in entries if name != "__metadata__"]) + rng.choice((0, 1, 500))
    entries += [(f"z{i}", {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}) for i in range(count)]
    return join(entries, data)


def text(rng: random.Random, entries: Entries, data: bytes) -> bytes:
    """Write something that is no model at all."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4265146304\n"
    words = (
        pointer,
        "<!DOCTYPE html><html></html>",
        "{}",
        json.dumps(dict(entries)),
        "a red fox\n" * 99,
        "\0" * 600,
        "",
    )
    return rng.choice((*(word.encode() for word in words), rng.randbytes(rng.randrange(600))))


def recoded(rng: random.Random, content: bytes) -> bytes:
    """Return a file with each tensor in a precision of its own, one perhaps with a value that is not finite."""
    entries, data = [], b""
    broken = rng.random() < 0.5
    for name, (dtype, shape, raw) in (rules(content) or {}).items():
        kind = rng.choice(list(FLOATS))
        new = bytearray(tensor(dtype, shape, raw).to(FLOATS[kind]).reshape(-1).view(torch.uint8).numpy().tobytes())
        if broken and new:
            value = bytes.fromhex(rng.choice(NON_FINITE[kind]))
            place = len(value) * rng.randrange(len(new) // len(value))
            new[place : place + len(value)], broken = value, False
        entries.append((name, {"dtype": kind, "shape": list(shape), "data_offsets": [len(data), len(data) + len(new)]}))
        data += new
    return join(entries, data, rng.randrange(8))


Mutation = Callable[[random.Random, Entries, bytes], bytes]
MUTATIONS: tuple[Mutation, ...] = (
    *(same, flip, cut, trailing, length, offsets, shape, dtype, names, keys, odd, nested, structure, non_finite, text),
)


class Bomb:
    """Leaves a mark in the working folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("executed", "w"))


@cache
def archives() -> dict[str, bytes]:
    """Return files of the kinds that are never opened."""
    made: dict[str, bytes] = {f"pickle {protocol}": pickle.dumps(Bomb(), protocol) for protocol in range(2, 6)}
    for kind, new in (("torch", True), ("old torch", False)):
        buffer = io.BytesIO()
        torch.save({"a": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=new)
        made[kind] = buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("data.pkl", made["pickle 2"])
    made["zip"] = buffer.getvalue()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("data.pkl"))
    made["tar"] = buffer.getvalue()
    compressors = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}
    made |= {name: compress(made["pickle 2"]) for name, compress in compressors.items()}
    starts = {"gguf": b"GGUF\3", "hdf5": b"\x89HDF\r\n\x1a\n", "npy": b"\x93NUMPY\1", "zstd": b"\x28\xb5\x2f\xfd"}
    return made | {name: start + bytes(600) for name, start in starts.items()}

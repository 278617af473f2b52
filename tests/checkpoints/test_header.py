"""The header check: every malformed file is refused with a clean error, before anything is allocated."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from latentdiff.checkpoints import read_header
from latentdiff.errors import ModelFormatError, ModelLoadError, ModelPathError, UnsafeModelError

GOOD = save({"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.float16)}, metadata={"format": "pt"})
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(header: Any, data: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def read(folder: Path, content: bytes) -> Any:
    path = folder / "weights.safetensors"
    path.write_bytes(content)
    return read_header(path)


def test_a_good_file_is_described(tmp_path: Path) -> None:
    header = read(tmp_path, GOOD)
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("F16", (4,)),
    }
    assert header.metadata == {"format": "pt"}
    assert read(tmp_path, file_of({"a": ENTRY, "z": {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]}}))


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "text": (b"hello world, this is text", "does not start"),
    "header longer than file": (GOOD[:100], "claims"),
    "header of 17 MiB": (file_of(b'{"a":' + b" " * 17 * 2**20), "claims"),
    "not json": (file_of(b'{"a": }'), "not JSON"),
    "not utf-8": (file_of(b'{"\xff": 1}'), "holds"),
    "nested": (file_of(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "no tensor": (file_of({}, b""), "0 tensors"),
    "metadata alone": (file_of({"__metadata__": {}}, b""), "0 tensors"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}, "a": ENTRY}), "__metadata__"),
    "name twice": (file_of(f'{{"a": {json.dumps(ENTRY)}, "a": {json.dumps(ENTRY)}}}'.encode()), "a name twice"),
    "unknown key": (file_of({"a": {**ENTRY, "x": 1}}), "nothing else"),
    "key missing": (file_of({"a": {"dtype": "F32", "shape": [2]}}), "nothing else"),
    "entry is a list": (file_of({"a": [1]}), "nothing else"),
    "unknown dtype": (file_of({"a": {**ENTRY, "dtype": "F23"}}), "unknown dtype 'F23'; did you mean 'F32'"),
    "dtype is a list": (file_of({"a": {**ENTRY, "dtype": ["F32"]}}), "unknown dtype"),
    "negative side": (file_of({"a": {**ENTRY, "shape": [-2]}}), "whole numbers"),
    "true as side": (file_of({"a": {**ENTRY, "shape": [True]}}), "whole numbers"),
    "fraction": (file_of({"a": {**ENTRY, "shape": [2.0]}}), "no whole number"),
    "not a number": (file_of(b'{"a": NaN}'), "no whole number"),
    "huge number": (file_of({"a": {**ENTRY, "shape": [10**30]}}), "a number too large"),
    "rank 9": (file_of({"a": {**ENTRY, "shape": [1] * 9}}), "at most 8"),
    "offsets swapped": (file_of({"a": {**ENTRY, "data_offsets": [8, 0]}}), "rising"),
    "wrong length": (file_of({"a": {**ENTRY, "shape": [3]}}), "implies 12"),
    "hole": (file_of({"a": ENTRY, "b": {**ENTRY, "data_offsets": [16, 24]}}, b"\0" * 24), "a hole"),
    "overlap": (file_of({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, b"\0" * 12), "an overlap"),
    "trailing bytes": (file_of({"a": ENTRY}, b"\0" * 9), "9 follow"),
    "cut off": (file_of({"a": ENTRY}, b"\0" * 7), "7 follow"),
    "20,001 tensors": (
        file_of({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(20_001)}, b""),
        "holds 20001 tensors",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_files_are_refused(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    with pytest.raises(ModelFormatError, match=message) as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "torch":
        torch.save({"a": torch.zeros(2)}, buffer)
    elif kind == "old torch":
        torch.save({"a": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=False)
    elif kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("data.pkl", pickle.dumps(Bomb()))
    elif kind == "tar":
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("data.pkl"))
    else:
        return {"gguf": b"GGUF\x03\0\0\0" + b"\0" * 64, "gzip": b"\x1f\x8b\x08\0" + b"\0" * 64}[kind]
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["torch", "old torch", "zip", "tar", "gguf", "gzip"])
def test_archives_are_recognised_by_content(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UnsafeModelError, match="convert it to safetensors"):
        read(tmp_path, archive(kind))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickles_are_recognised_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsafeModelError, match="a pickle"):
        read(tmp_path, pickle.dumps(Bomb(), protocol=protocol))
    assert not (tmp_path / "executed").exists()


def test_a_header_length_that_looks_like_a_pickle_is_none(tmp_path: Path) -> None:
    text = json.dumps({"a": ENTRY}).encode().ljust(0x280)
    content = file_of(text)
    assert content[:2] == b"\x80\x02"
    assert read(tmp_path, content)
    with pytest.raises(ModelFormatError):
        read(tmp_path, content[:300])


def test_missing_and_special_files(tmp_path: Path) -> None:
    with pytest.raises(ModelPathError, match="expected a file"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(ModelFormatError, match="regular file"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFormatError, match="regular file"):
        read_header(tmp_path / "pipe")


def test_random_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    """Flip, cut and insert: what is accepted must describe exactly the bytes that are there."""
    rng = random.Random(0)
    accepted = 0
    for _ in range(600):
        content = bytearray(GOOD)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(content))
            action = rng.randrange(3)
            if action == 0:
                content[place] = rng.randrange(256)
            elif action == 1:
                del content[place : place + rng.randint(1, 9)]
            else:
                content[place:place] = rng.randbytes(rng.randint(1, 9))
        try:
            header = read(tmp_path, bytes(content))
        except ModelLoadError:
            continue
        accepted += 1
        assert all(len(info.shape) <= 8 for info in header.tensors.values())
    assert accepted < 600 / 2


def test_messages_are_one_printable_line(tmp_path: Path) -> None:
    """Names in a model may hold what moves the cursor of a terminal, or be very long."""
    for name in ("a\nb", "\x1b[2J", "\u202e", "\U000e0001" * 5000, "x" * 9999):
        with pytest.raises(ModelFormatError) as caught:
            read(tmp_path, file_of({name: {**ENTRY, "dtype": "F23"}}))
        assert str(caught.value).isprintable() and len(str(caught.value)) < 800
        assert str(ModelLoadError(f"{name}; get it again")).endswith("; get it again")
        assert str(ModelLoadError(name)).isprintable() and len(str(ModelLoadError(name))) < 800

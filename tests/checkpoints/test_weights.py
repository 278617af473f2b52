"""Tensors as they come from files: bitwise what was written, cast, finite, and in no more memory than they need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentdiff.checkpoints import read_header
from latentdiff.checkpoints import weights as weights_module
from latentdiff.checkpoints.weights import FLOATS, read_weights
from latentdiff.errors import ModelLoadError, ModelValueError
from tests.checkpoints.header_mutations import NON_FINITE, join
from tests.checkpoints.oracle import bitwise_equal

ROOT = Path(__file__).parents[2]
TARGETS = (torch.float32, torch.float16, torch.bfloat16)


def read(file: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return read_weights(file, read_header(file).tensors, dtype, "cpu")


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("target", TARGETS)
def test_values_are_those_of_the_file(tmp_path: Path, kind: str, target: torch.dtype) -> None:
    values = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(FLOATS[kind])
    tensors = {"a": values, "empty": values[:0].clone(), "number": values[0, 0].clone()}
    save_file(tensors, tmp_path / "a.safetensors")
    found = read(tmp_path / "a.safetensors", target)
    assert found.keys() == tensors.keys()
    assert all(bitwise_equal(found[name], tensor.to(target)) for name, tensor in tensors.items())


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
def test_float8_becomes_float16_where_no_precision_is_asked_for(tmp_path: Path, kind: str) -> None:
    """Nothing is computed in it, and float16 has all its values."""
    every = torch.arange(256, dtype=torch.uint8).view(FLOATS[kind])
    values = every[every.float().isfinite()]
    save_file({"a": values}, tmp_path / "a.safetensors")
    found = read_weights(tmp_path / "a.safetensors", read_header(tmp_path / "a.safetensors").tensors)["a"]
    assert found.dtype == torch.float16 and torch.equal(found.float(), values.float())


@pytest.mark.parametrize("kind", NON_FINITE)
@pytest.mark.parametrize("target", TARGETS)
def test_every_kind_of_value_that_is_not_finite_is_refused(tmp_path: Path, kind: str, target: torch.dtype) -> None:
    for value in map(bytes.fromhex, NON_FINITE[kind]):
        entry = {"dtype": kind, "shape": [3], "data_offsets": [0, 3 * len(value)]}
        (tmp_path / "a.safetensors").write_bytes(join([("a", entry)], bytes(len(value)) * 2 + value))
        with pytest.raises(ModelValueError, match="a has 1 values that are NaN or infinite"):
            read(tmp_path / "a.safetensors", target)


def test_the_range_is_that_of_the_precision_asked_for(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1e5, -1e5])}, tmp_path / "a.safetensors")
    assert read(tmp_path / "a.safetensors", torch.float32)["a"].tolist() == [1e5, -1e5]
    with pytest.raises(ModelValueError, match=r"2 values that are NaN or infinite in torch\.float16"):
        read(tmp_path / "a.safetensors", torch.float16)
    widest = torch.tensor([65504.0, -65504.0], dtype=torch.float16)  # whose difference is infinite
    save_file({"a": widest}, tmp_path / "a.safetensors")
    assert torch.equal(read(tmp_path / "a.safetensors", torch.float16)["a"], widest)


@pytest.mark.parametrize("padding", range(8))
def test_tensors_may_start_anywhere(tmp_path: Path, padding: int) -> None:
    values = torch.arange(6.0)
    entry = {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}
    (tmp_path / "a.safetensors").write_bytes(join([("a", entry)], values.numpy().tobytes(), padding))
    found = read(tmp_path / "a.safetensors", torch.float32)["a"]
    assert torch.equal(found, values) and found.data_ptr() % 4 == 0


def test_a_file_that_changes_after_its_header_was_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(99)}, file)
    tensors = read_header(file).tensors
    held = read_weights(file, tensors, torch.float32, "cpu")["a"]
    held += 1  # a change of the weights is none of the file
    save_file({"a": torch.zeros(99)}, tmp_path / "b.safetensors")
    os.replace(tmp_path / "b.safetensors", file)
    assert held.tolist() == [2.0] * 99
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(ModelLoadError, match="cannot be read"):
        read_weights(file, tensors, torch.float32, "cpu")
    file.unlink()
    with pytest.raises(ModelLoadError, match="No such file"):
        read_weights(file, tensors, torch.float32, "cpu")


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the end of the process, as of one that is mapped."""
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(99), "b": torch.ones(99_999), "c": torch.ones(99_999)}, file)
    tensors = read_header(file).tensors
    monkeypatch.setattr(weights_module, "_require_finite", lambda *_: os.truncate(file, 0))
    with pytest.raises(ModelLoadError, match="it is being written"):
        read_weights(file, tensors, None, "cpu")


PEAK = """
import sys
from pathlib import Path
import torch
from latentdiff.checkpoints import weights as weights_module
from latentdiff.checkpoints.header import read_header
from latentdiff.checkpoints import weights as weights_module
from latentdiff.checkpoints.weights import read_weights

def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024

file, target = Path(sys.argv[1]), getattr(torch, sys.argv[2])
tensors = read_header(file).tensors
read_weights(file, dict(list(tensors.items())[:1]), target, "cpu")
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")  # the peak starts anew
before = memory("VmRSS")
weights = read_weights(file, tensors, target, "cpu")
size = sum(tensor.nbytes for tensor in weights.values()) / 2**20
print((memory("VmHWM") - before) / size)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no such measure on this system")
@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
@pytest.mark.parametrize("target", ["float16", "float32"])
def test_weights_are_held_once(tmp_path: Path, kind: torch.dtype, target: str) -> None:
    """64 MiB of weights, or 32, in tensors of half a MiB to one: no more memory than 1.15 times what they take."""
    save_file({f"{i:02d}": torch.zeros(2**18, dtype=kind) for i in range(64)}, tmp_path / "a.safetensors")
    arguments = [str(tmp_path / "a.safetensors"), target]
    run = subprocess.run([sys.executable, "-c", PEAK, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.9 < float(run.stdout) < 1.15

"""The cache on disk: only what changed is computed again, after a kill too, and by one process at a time."""

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from latentdiff.training.data import cache
from latentdiff.training.data.cache import CachedTensors, stored
from safetensors.torch import load_file, save_file

from latentdiff.errors import InputError, StorageError

ROOT = Path(__file__).parents[2]


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


class Encoder:
    """Count what is encoded: the tensor of a number is filled with it."""

    def __init__(self, delay: float = 0.0) -> None:
        self.asked: list[int] = []
        self.delay = delay

    def __call__(self, numbers: Sequence[int]) -> torch.Tensor:
        time.sleep(self.delay)
        self.asked += numbers
        return torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, 3)


def filled(folder: Path, count: int, encode: Encoder) -> CachedTensors:
    return stored(folder, [key(n) for n in range(count)], encode, [()] * count, batch_size=4)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARD_ENTRIES", 8)


@pytest.mark.usefixtures("small_shards")
def test_only_what_is_lacking_is_computed(tmp_path: Path) -> None:
    first, second = Encoder(), Encoder()
    assert filled(tmp_path, 20, first).take([19, 0, 7]).tolist() == [[19.0] * 3, [0.0] * 3, [7.0] * 3]
    assert sorted(first.asked) == list(range(20))
    assert filled(tmp_path, 23, second).take(range(23))[:, 0].tolist() == list(range(23))
    assert second.asked == [20, 21, 22]


def test_equal_keys_are_computed_once_and_shapes_are_kept_apart(tmp_path: Path) -> None:
    asked: list[list[int]] = []

    def encode(numbers: Sequence[int]) -> torch.Tensor:
        asked.append(list(numbers))
        return torch.full((len(numbers), 2, 3 if numbers[0] % 2 else 4), float(numbers[0]))

    keys = [key(1), key(2), key(3), key(1)]
    found = stored(tmp_path, keys, encode, [(4,), (3,), (4,), (4,)], batch_size=8)
    assert asked == [[1], [0, 2]]
    assert [tuple(found[index].shape) for index in range(4)] == [(2, 4), (2, 3), (2, 4), (2, 4)]


@pytest.mark.usefixtures("small_shards")
def test_a_broken_shard_is_computed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path, 16, Encoder())
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:50])
    again = Encoder()
    assert filled(tmp_path, 16, again).take(range(16))[:, 0].tolist() == list(range(16))
    assert len(again.asked) == 8
    assert file.name in capsys.readouterr().err


@pytest.mark.usefixtures("small_shards")
def test_of_several_at_once_one_computes(tmp_path: Path) -> None:
    encoders = [Encoder(delay=0.02) for _ in range(3)]
    found: list[CachedTensors] = []
    threads = [threading.Thread(target=lambda e=e: found.append(filled(tmp_path, 40, e))) for e in encoders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(encoder.asked) for encoder in encoders) == [0, 0, 40]
    assert all(one.take(range(40))[:, 0].tolist() == list(range(40)) for one in found)


@pytest.mark.usefixtures("small_shards")
def test_after_kill_9_finished_shards_are_kept_and_who_waits_goes_on(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from latentdiff.training.data import cache\n"
        "from tests.training.test_cache import *\n"
        "cache.SHARD_ENTRIES = 8; filled(Path(sys.argv[1]), 80, Encoder(delay=0.2))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(list(tmp_path.glob("*.safetensors"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    rest, whole = Encoder(), filled(tmp_path / "unbroken", 80, Encoder())
    waiting = threading.Thread(target=filled, args=(tmp_path, 80, rest))
    waiting.start()
    time.sleep(0.1)
    assert rest.asked == []
    process.kill()
    process.wait()
    (tmp_path / ".tmp-0").write_bytes(b"half a shard")
    waiting.join()
    found = filled(tmp_path, 80, rest)
    assert torch.equal(found.take(range(80)), whole.take(range(80)))
    assert not list(tmp_path.glob(".tmp-*"))
    kept = 80 - len(rest.asked)
    assert kept in range(16, 80, 8)
    names = [{file.name for file in place.glob("*.safetensors")} for place in (tmp_path, tmp_path / "unbroken")]
    assert names[0] == names[1]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not write the cache"):
        filled(tmp_path / "file" / "cache", 1, Encoder())


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", ["values", "keys", "not a number", "no checksum"])
def test_a_damaged_shard_is_found_by_its_checksum(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path, 16, Encoder())
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    tensors, content = load_file(file), bytearray(file.read_bytes())
    if damage == "no checksum":
        save_file(tensors, file)
    else:
        part = tensors["keys" if damage == "keys" else "values"].numpy().tobytes()
        place = content.rindex(part)
        content[place : place + 2] = b"\x01\x7e" if damage == "not a number" else bytes([content[place] ^ 1, 9])
        file.write_bytes(content)
    again = Encoder()
    assert filled(tmp_path, 16, again).take(range(16))[:, 0].tolist() == list(range(16))
    assert len(again.asked) == 8
    assert f"{file.name} is broken" in capsys.readouterr().err
    assert filled(tmp_path, 16, again).take([3]).tolist() == [[3.0] * 3]
    assert len(again.asked) == 8


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_what_is_no_float16_is_not_kept(tmp_path: Path, value: float) -> None:
    with pytest.raises(InputError, match="values that are no float16"):
        stored(tmp_path, [key(0)], lambda numbers: torch.full((1, 3), value), [()], batch_size=1)
    assert not list(tmp_path.glob("*.safetensors"))

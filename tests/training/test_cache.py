"""The cache on disk: only what changed is computed again, after a kill too, and several processes share it out."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
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


def filled(folder: Path, count: int, encode: Callable[[Sequence[int]], torch.Tensor]) -> CachedTensors:
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
def test_several_at_once_share_it_out(tmp_path: Path) -> None:
    encoders = [Encoder(delay=0.05) for _ in range(3)]
    found: list[CachedTensors] = []
    threads = [threading.Thread(target=lambda e=e: found.append(filled(tmp_path, 80, e))) for e in encoders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for encoder in encoders for number in encoder.asked) == list(range(80))
    assert all(0 < len(encoder.asked) < 80 for encoder in encoders)
    assert all(one.take(range(80))[:, 0].tolist() == list(range(80)) for one in found)
    alone = tmp_path / "alone"
    filled(alone, 80, Encoder())
    files = [
        {file.name: file.read_bytes() for file in place.iterdir() if file.is_file()} for place in (tmp_path, alone)
    ]
    assert files[0] == files[1]


@pytest.mark.usefixtures("small_shards")
def test_after_kill_9_finished_shards_are_kept_and_another_process_takes_what_was_in_hand(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from latentdiff.training.data import cache\n"
        "from tests.training.test_cache import *\n"
        "def encode(numbers):\n"
        "    if min(numbers) >= 16:\n"
        "        Path(sys.argv[2]).touch(); time.sleep(600)\n"
        "    return Encoder()(numbers)\n"
        "cache.SHARD_ENTRIES = 8; filled(Path(sys.argv[1]), 80, encode)"
    )
    place, stuck = tmp_path / "cache", tmp_path / "stuck"
    command = [sys.executable, "-c", script, str(place), str(stuck)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not stuck.exists() and process.poll() is None:
        time.sleep(0.01)
    rest, whole = Encoder(), filled(tmp_path / "unbroken", 80, Encoder())
    helping = threading.Thread(target=filled, args=(place, 80, rest))
    helping.start()
    while len(rest.asked) < 80 - 24 and helping.is_alive():
        time.sleep(0.01)
    assert helping.is_alive()  # waits for the shard that the other has in hand
    process.kill()
    process.wait()
    helping.join()
    assert len(rest.asked) == len(set(rest.asked)) == 80 - 16
    assert torch.equal(filled(place, 80, rest).take(range(80)), whole.take(range(80)))
    names = [{file.name for file in folder.glob("*.*")} for folder in (place, tmp_path / "unbroken")]
    assert names[0] == names[1]


def test_what_a_killed_process_left_goes_after_an_hour(tmp_path: Path) -> None:
    for name, age in (("old", 3700), ("new", 3500)):
        (tmp_path / f".tmp-{name}").write_bytes(b"half a shard")
        os.utime(tmp_path / f".tmp-{name}", (time.time() - age, time.time() - age))
    filled(tmp_path, 1, Encoder())
    assert [file.name for file in tmp_path.glob(".tmp-*")] == [".tmp-new"]


def test_a_whole_cache_can_be_read_where_nothing_can_be_written(tmp_path: Path) -> None:
    filled(tmp_path, 3, Encoder())
    before = sorted(tmp_path.iterdir())
    tmp_path.chmod(0o555)
    try:
        assert filled(tmp_path, 3, Encoder()).take([2]).tolist() == [[2.0] * 3]
    finally:
        tmp_path.chmod(0o755)
    assert sorted(tmp_path.iterdir()) == before


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


def test_a_disk_that_damages_all_it_holds_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "write_file", lambda file, data: file.write_bytes(data[:50]))
    with pytest.raises(StorageError, match="is damaged again and again; set another `cache`"):
        filled(tmp_path, 3, Encoder())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_what_is_no_float16_is_not_kept(tmp_path: Path, value: float) -> None:
    with pytest.raises(InputError, match="values that are no float16"):
        stored(tmp_path, [key(0)], lambda numbers: torch.full((1, 3), value), [()], batch_size=1)
    assert not list(tmp_path.glob("*.safetensors"))

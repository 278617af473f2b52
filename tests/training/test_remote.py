"""Shards behind a URL: the same samples as from disk, each byte asked for once, whatever the server does."""

from __future__ import annotations

import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latentdiff.training.config import AutoencoderTraining, DataConfig
from latentdiff.training.data import dataset, remote, shards
from latentdiff.training.data.dataset import CaptionedImages, LazyImages, load_images, open_held_out, open_images
from latentdiff.training.data.latents import LatentSet, cached_latents
from latentdiff.training.data.pictures import draw_views, image_batches
from latentdiff.training.data.prefetch import AHEAD
from latentdiff.training.data.remote import AT_ONCE, Forward, look_up, read_range, without_secrets
from latentdiff.training.loop.checkpointing import load_latest
from PIL import Image

from latentdiff.checkpoints import Encoders
from latentdiff.commands.train import train as cli_train
from latentdiff.diffusion import NoiseSchedule
from latentdiff.errors import InputError, LatentDiffError, MissingDependencyError, StorageError
from latentdiff.models.pixels import LabelConfig, LabelEncoder, PixelSpace, PixelSpaceConfig
from tests.training.test_sources import write_tar
from tests.training.test_stages import recipe


class Server(ThreadingHTTPServer):
    """Gives ranges of the files of a folder; counts the bytes of each, and fails in the ways it is told to."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.sent, self.requests = folder, Counter[str](), 0
        self.failing: dict[int, str] = {}  # every so many requests: "busy", "cut" or "gone"
        self.broken: range = range(0)  # numbers of requests that are not answered
        self.ranges = True

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        number = self.server.requests
        fault = next((kind for every, kind in self.server.failing.items() if number % every == 0), None)
        file = self.server.folder / self.path.partition("?")[0].lstrip("/")
        first, last = map(int, re.findall(r"\d+", self.headers["Range"]))
        if fault == "gone" or number in self.server.broken:
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "busy":
            self.send_error(503)
        elif not file.is_file() or file.stat().st_size <= first:
            self.send_error(416 if file.is_file() else 404)
        else:
            self.give(file, first, last, 0.5 if fault == "cut" else 1.0)

    def give(self, file: Path, first: int, last: int, share: float) -> None:
        whole = file.read_bytes()
        body = whole[first : last + 1] if self.server.ranges else whole
        self.send_response(206 if self.server.ranges else 200)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(whole)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{file.stat().st_mtime_ns}"')
        self.end_headers()
        body = body[: round(len(body) * share)]
        self.server.sent[file.name] += len(body)
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(remote, "WAIT", 0.01)
    (tmp_path / "shards").mkdir()
    with Server(tmp_path / "shards") as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def write_shards(folder: Path, count: int = 3, pictures: int = 5) -> Path:
    """Write shards of noise of several sizes, with a broken picture in the second; return their pattern."""
    for shard in range(count):
        members = []
        for number in range(pictures):
            key, seed = f"{shard}-{number}", shard * pictures + number
            size = (10 + seed % 3, 12, 3)
            noise = np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8)
            Image.fromarray(noise).save(folder / "picture.png")
            data = (folder / "picture.png").read_bytes()
            members += [(f"{key}.png", data[:-30] if key == "1-2" else data), (f"{key}.txt", b"xyz"[seed % 3 :][:1])]
        write_tar(folder / f"{shard:02}.tar", [*members, (f"{shard}-0.cls", bytes(3000))])
    (folder / "picture.png").unlink()
    return folder / f"{{00..{count - 1:02}}}.tar"


def opened(place: Path | str, run: Path, **values: Any) -> CaptionedImages:
    return open_images(DataConfig(folder=str(place), size=8, **values), 2, run)


def latents(place: Path | str, run: Path, **values: Any) -> LatentSet:
    config = DataConfig(folder=str(place), size=8, **values)
    components = Encoders(
        autoencoder=PixelSpace(PixelSpaceConfig()), text_encoder=LabelEncoder(LabelConfig()), schedule=NoiseSchedule()
    )
    return cached_latents(open_images(config, 2, run), config, 0, components, run / "cache")


def autoencoder_config(place: str, run: Path, steps: int) -> AutoencoderTraining:
    values = {"run": {"out": str(run), "steps": steps, "batch_size": 4}, "data": {"folder": place, "size": 8}}
    return AutoencoderTraining.model_validate({"stage": "autoencoder", "model": {}, **values})


def size_of(folder: Path) -> Counter[str]:
    return Counter({file.name: file.stat().st_size for file in folder.glob("*.tar")})


def probes(count: int = 3) -> Counter[str]:
    return Counter({f"{number:02}.tar": 1 for number in range(count)})


@pytest.mark.parametrize("block", [512, 4096, 2**22])
def test_remote_shards_give_the_samples_of_local_ones_in_one_pass(
    tmp_path: Path, server: Server, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK", block)
    monkeypatch.setattr(shards, "HELD_BYTES", 1000)
    pattern = write_shards(server.folder)
    local = opened(pattern, tmp_path / "local")
    away = opened(f"{server.address}/{pattern.name}", tmp_path / "run")
    sizes = size_of(server.folder) + probes()
    assert all(sizes[name] - 10_240 <= sent <= sizes[name] for name, sent in server.sent.items())  # zeros at the end
    assert (away.samples, away.rows, away.skipped) == (local.samples, local.rows, local.skipped)
    assert [row["name"] for row in away.skipped] == ["01.tar: 1-2"]
    assert (tmp_path / "run/skipped.jsonl").read_text() == (tmp_path / "local/skipped.jsonl").read_text()
    assert all(np.array_equal(away.images[n], local.images[n]) for n in (13, 0, 6))
    server.sent.clear()
    again = opened(f"{server.address}/{pattern.name}", tmp_path / "run")
    assert again.samples == local.samples and server.sent == probes()


VIEWS: list[dict[str, Any]] = [{}, {"variants": ["plain", "flip", "background"]}, {"crop": "random", "crops": 3}]


@pytest.mark.parametrize("values", VIEWS, ids=["plain", "variants", "windows"])
def test_latents_cost_the_pictures_once_more_and_then_nothing(
    tmp_path: Path, server: Server, values: dict[str, Any]
) -> None:
    pattern = write_shards(server.folder)
    local = latents(pattern, tmp_path / "local", **values)
    away = latents(f"{server.address}/{pattern.name}", tmp_path / "run", **values)
    assert all(torch.equal(away.latents[n], local.latents[n]) for n in range(len(local.latents)))
    assert (away.captions, away.choices, away.samples) == (local.captions, local.choices, local.samples)
    pictures = Counter(dict.fromkeys(size_of(server.folder), 0))
    for member in shards.read_shards(sorted(server.folder.glob("*.tar"))):
        pictures[Path(member.shard).name] += member.size if member.key != "1-2" else 0
    assert server.sent == size_of(server.folder) + probes() + pictures
    server.sent.clear()
    latents(f"{server.address}/{pattern.name}", tmp_path / "run", **values)
    assert server.sent == probes()


@pytest.mark.parametrize("failing", [{3: "busy"}, {4: "cut"}, {5: "gone"}, {3: "busy", 4: "cut", 5: "gone"}], ids=str)
def test_a_server_that_fails_now_and_then_changes_nothing(
    tmp_path: Path, server: Server, failing: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK", 1024)
    monkeypatch.setattr(remote, "ATTEMPTS", 20)
    pattern = write_shards(server.folder)
    local = latents(pattern, tmp_path / "local")
    server.failing = failing
    away = latents(f"{server.address}/{pattern.name}", tmp_path / "run")
    assert away.samples == local.samples
    assert all(torch.equal(away.latents[n], local.latents[n]) for n in range(len(local.latents)))


def test_a_run_goes_on_from_any_step_and_from_any_process(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = write_shards(server.folder)
    places = str(pattern), f"{server.address}/{pattern.name}"
    configs = [autoencoder_config(place, tmp_path / "run", 9) for place in places]
    local, away = (open_images(config.data, 4, tmp_path / "run") for config in configs)
    assert isinstance(away.images, LazyImages) and not isinstance(local.images, LazyImages)
    whole = list(image_batches(local, configs[0], 0))
    server.failing = {7: "busy"}
    for first in (0, 5):
        for images, expected in zip(image_batches(away, configs[1], first), whole[first:], strict=True):
            assert torch.equal(images, expected)
    server.failing = {1: "busy"}
    with pytest.raises(StorageError, match=r"/0\d\.tar could not be read in 5 attempts \(HTTP Error 503") as error:
        draw_views(away, configs[1], (slice(None),), 0)
    again = ForkingPickler.loads(ForkingPickler.dumps(error.value))  # as it comes from processes that draw
    assert isinstance(again, StorageError) and str(again) == str(error.value)


def test_a_run_that_lost_its_server_ends_with_the_weights_of_one_that_did_not(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentdiff.training.data.pictures.workers", lambda: 0)
    pattern, file = write_shards(server.folder), recipe(tmp_path, "autoencoder", data__size=8)
    cli_train(file, [f"data.folder={pattern}", "run.save_every=1"], False, str(tmp_path / "local"))
    overrides = [f"data.folder='{server.address}/{pattern.name}'", "run.save_every=1"]

    def lose_the_server(data: Any, config: Any, shares: Any, number: int) -> np.ndarray:
        server.failing = {1: "gone"} if number == 2 else {}
        return draw_views(data, config, shares, number)

    with monkeypatch.context() as patch:
        patch.setattr("latentdiff.training.data.pictures.draw_views", lose_the_server)
        with pytest.raises(StorageError, match=r"could not be read in 5 attempts"):
            cli_train(file, overrides, False, str(tmp_path / "away"))
    server.failing = {}
    cli_train(file, overrides, True, str(tmp_path / "away"))
    local, away = (load_latest(tmp_path / name) for name in ("local", "away"))
    assert local is not None and away is not None and (local.step, away.step) == (4, 4)
    for name, tensors in local.tensors.items():
        assert all(torch.equal(tensor, away.tensors[name][key]) for key, tensor in tensors.items())


def test_a_pass_that_is_broken_off_goes_on_with_the_shard_it_was_in(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BLOCK", 1024)
    monkeypatch.setattr(remote, "AT_ONCE", 1)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    pattern = write_shards(server.folder)
    blocks = -(-(server.folder / "00.tar").stat().st_size // 1024)
    server.broken = range(3 + blocks + 2, 10_000)
    with pytest.raises(StorageError, match=r"01\.tar could not be read in 2 attempts .* with --resume") as error:
        opened(f"{server.address}/{pattern.name}", tmp_path / "run")
    assert "\n" not in str(error.value)
    server.broken, before = range(0), Counter(server.sent)
    opened(f"{server.address}/{pattern.name}", tmp_path / "run")
    assert server.sent["00.tar"] == before["00.tar"] + 1
    assert server.sent["02.tar"] <= size_of(server.folder)["02.tar"] + 2


def test_a_shard_that_was_written_again_is_read_again(tmp_path: Path, server: Server) -> None:
    pattern = write_shards(server.folder)
    before = opened(f"{server.address}/{pattern.name}", tmp_path / "run")
    server.sent.clear()
    (server.folder / "01.tar").write_bytes((server.folder / "02.tar").read_bytes())
    after = opened(f"{server.address}/{pattern.name}", tmp_path / "run")
    assert [sample.digest for sample in after.samples[5:10]] == [sample.digest for sample in before.samples[-5:]]
    assert server.sent == probes() + Counter({"01.tar": (server.folder / "01.tar").stat().st_size})
    with pytest.raises(InputError, match=r"changed while it is in use: 01\.tar: 1-"):
        before.images[5]


def test_no_more_is_held_than_is_asked_for_ahead(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK", 10)
    (server.folder / "file").write_bytes(bytes(range(250)) * 40)
    stream = Forward(look_up(f"{server.address}/file"))
    assert stream.read(25) == bytes(range(25))
    stream.close()
    assert server.sent["file"] <= 1 + 10 * (3 + AT_ONCE * AHEAD)
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_every_kind_of_fsspec_is_read(tmp_path: Path) -> None:
    import fsspec

    pattern = write_shards(tmp_path)
    memory = fsspec.filesystem("memory")
    for file in tmp_path.glob("*.tar"):
        memory.pipe(f"/set/{file.name}", file.read_bytes())
    local = opened(pattern, tmp_path / "local")
    for place in (f"memory://set/{pattern.name}", f"file://{pattern}"):
        away = opened(place, tmp_path / "run")
        assert away.samples == local.samples
        assert np.array_equal(away.images[3], local.images[3])
    memory.rm("/set", recursive=True)
    with pytest.raises(InputError, match=r"memory://set/00\.tar cannot be read"):
        opened(f"memory://set/{pattern.name}", tmp_path / "run")


def test_a_file_system_with_a_loop_of_its_own_is_read_from_other_processes(tmp_path: Path) -> None:
    """As those of S3 and Google are; such a loop does not survive a fork."""
    import fsspec
    from fsspec.asyn import AsyncFileSystem

    class Looping(AsyncFileSystem):
        async def _info(self, path: str, **_: Any) -> dict[str, Any]:
            return {"name": path, "type": "file", "size": Path(path).stat().st_size}

        async def _cat_file(self, path: str, start: int = 0, end: int | None = None, **_: Any) -> bytes:
            return Path(path).read_bytes()[start:end]

    fsspec.register_implementation("looping", Looping, clobber=True)
    pattern = write_shards(tmp_path)
    local, away = (autoencoder_config(place, tmp_path / "run", 6) for place in (f"{pattern}", f"looping://{pattern}"))
    opened = [open_images(config.data, 4, tmp_path / "run") for config in (local, away)]
    for expected, images in zip(image_batches(opened[0], local, 0), image_batches(opened[1], away, 0), strict=True):
        assert torch.equal(images, expected)


def test_pictures_are_held_out_of_remote_shards(tmp_path: Path, server: Server) -> None:
    pattern = write_shards(server.folder)
    local = opened(pattern, tmp_path / "local", held_out=0.3)
    config = DataConfig(folder=f"{server.address}/{pattern.name}", size=8, held_out=0.3)
    away = open_images(config, 2, tmp_path / "run")
    assert away.samples == local.samples and len(away) < 14
    server.sent.clear()
    chosen = open_held_out(config, tmp_path / "run/cache", 64)
    assert chosen is not None and len(chosen) + len(away) == 14
    assert not {sample.digest for sample in chosen.samples} & {sample.digest for sample in away.samples}
    assert sum(server.sent.values()) < 3 + sum(size_of(server.folder).values()) / 3
    assert open_held_out(config.model_copy(update={"held_out": 0.0}), tmp_path / "run/cache", 64) is None


def test_local_shards_open_no_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a socket is opened")

    monkeypatch.setattr(socket, "socket", refuse)
    assert len(latents(write_shards(tmp_path), tmp_path / "run").samples) == 14


BAD: dict[str, tuple[str, type[LatentDiffError], str]] = {
    "absent": ("/absent.tar", InputError, r"/absent\.tar cannot be read \(HTTP 404 .*; check the address"),
    "one of many": ("/{00..03}.tar", InputError, r"/03\.tar cannot be read \(HTTP 404"),
    "cut": ("/cut.tar", InputError, r"/cut\.tar is not a whole, uncompressed tar file \(unexpected end of data\)"),
    "cut between": ("/between.tar", InputError, r"/between\.tar is not a whole, .* \(the block of zeros at its end"),
    "no tar": ("/text.tar", InputError, r"/text\.tar is not a whole, uncompressed tar file"),
    "empty": ("/empty.tar", InputError, r"/empty\.tar cannot be read \(HTTP 416"),
    "another kind": ("/00.parquet", InputError, r"only \.tar files are read from an address; download others"),
    "too many": ("/{0..9999999}.tar", InputError, r"\{0\.\.9999999\} must run up to at most 1,000,000 shards"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read_is_one_line_with_its_address(tmp_path: Path, server: Server, kind: str) -> None:
    write_shards(server.folder)
    whole = (server.folder / "00.tar").read_bytes()
    (server.folder / "cut.tar").write_bytes(whole[:3000])
    (server.folder / "between.tar").write_bytes(whole[: whole.index(b"0-2.png")])  # where a member begins
    (server.folder / "text.tar").write_bytes(b"no tar file" * 99)
    (server.folder / "empty.tar").write_bytes(b"")
    path, error, pattern = BAD[kind]
    with pytest.raises(error, match=pattern) as caught:
        load_images(DataConfig(folder=server.address + path, size=8))
    assert "\n" not in str(caught.value) and server.address in str(caught.value)


def test_servers_of_whole_files_and_of_no_kind_are_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(server.folder)
    server.ranges = False
    with pytest.raises(InputError, match=r"00\.tar: the server gives only whole files .* download the shards"):
        look_up(f"{server.address}/00.tar")
    with pytest.raises(InputError, match=r"^quux://host/0\.tar is of no kind that is known: Protocol not known: quux"):
        look_up("quux://host/0.tar")
    with pytest.raises(MissingDependencyError, match=r"^s3://host/0\.tar needs another package: Install s3fs"):
        monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
        look_up("s3://host/0.tar")


def test_passwords_and_signatures_are_not_shown(tmp_path: Path, server: Server) -> None:
    assert without_secrets("https://me:secret@host:80/a/b.tar?signature=1") == "https://host:80/a/b.tar"
    pattern = write_shards(server.folder)
    address = f"{server.address}/{pattern.name}"
    first = opened(f"{address}?signature=1", tmp_path / "run")
    server.sent.clear()
    assert opened(f"{address}?signature=2", tmp_path / "run").samples == first.samples
    assert server.sent == probes()
    with pytest.raises(StorageError, match=r"0\.tar cannot be read any more \(HTTP 404 [^?]*$"):
        read_range(f"{server.address}/0.tar?signature=1", 0, 5)


def test_samples_in_memory_and_samples_asked_for_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of local shards; what the tests above compare with."""
    pattern = write_shards(tmp_path)
    held = opened(pattern, tmp_path / "run")
    monkeypatch.setattr(dataset, "IN_MEMORY_BYTES", 0)
    lazy = opened(pattern, tmp_path / "run")
    assert lazy.samples == held.samples and np.array_equal(lazy.images[:], held.images)

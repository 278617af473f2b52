"""`latentdiff train --encode`: the cache of a run that is to come, by as many processes as there are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from latentdiff.training.data import cache

from latentdiff.cli import main
from latentdiff.commands.train import encode
from latentdiff.commands.train import train as cli_train
from tests.training.test_stages import pictures, recipe
from tests.two_processes import free_port, run_two


def files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.safetensors")}


def encode_as(rank: int, port: int, config: str, place: str) -> None:
    """Be one of two processes that torchrun has started."""
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    cache.SHARD_ENTRIES = 3
    encode(config, [f"cache={place}"], None)


def test_a_run_takes_what_was_encoded_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache, "SHARD_ENTRIES", 3)
    pictures(tmp_path / "pictures", 8)
    cli_train(recipe(tmp_path, "autoencoder"), [], False, None)
    config = recipe(tmp_path, "diffusion")
    assert main(["train", config, "--encode", "--set", f"cache={tmp_path / 'alone'}"]) == 0
    assert "encoded: 8 latents, 9 captions" in capsys.readouterr().out
    assert not (tmp_path / "diffusion/checkpoints").exists()
    run_two(encode_as, free_port(), config, str(tmp_path / "both"))
    encoded = files(tmp_path / "alone")
    assert len(encoded) == 3 + 3
    assert files(tmp_path / "both") == encoded
    with monkeypatch.context() as patched:
        patched.setattr(cache, "_write_shard", lambda *given: pytest.fail("it was there"))
        cli_train(config, [f"cache={tmp_path / 'both'}"], False, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--encode"], "--encode is for the recipe of a U-Net"), (["--encode", "--check"], "not allowed with")],
)
def test_what_cannot_be_encoded(
    tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", recipe(tmp_path, "autoencoder"), *flags]) == 2
    assert message in capsys.readouterr().err

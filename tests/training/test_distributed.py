"""Processes and micro-steps change neither losses nor weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from latentdiff.training.config import RunConfig
from latentdiff.training.loop.distributed import start_accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latentdiff.commands.train import train as cli_train
from latentdiff.errors import InputError
from tests.training.test_stages import pictures, recipe, weights_of
from tests.two_processes import free_port, run_two

Run = tuple[str, list[str], bool, str]  # what `cli_train` takes
# Slow enough that roundings stay roundings: AdamW's first steps are of one size, whatever that of the gradients.
SLOW = "optimizer.learning_rate=3.0e-4"
ADVERSARIAL = ["loss.adversarial=0.5", "loss.adversarial_start=2", "loss.r1=1"]
OVERRIDES = {
    "autoencoder": [SLOW, "run.batch_size=8", "run.log_every=1", "loss.equivariance=0.5", *ADVERSARIAL],
    "diffusion": [SLOW, "run.batch_size=8", "run.log_every=1", "timesteps=importance"],
}


def logged(run: Path) -> dict[str, list[float]]:
    """Return the scalars that a run logged."""
    events = EventAccumulator(str(run / "logs")).Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def train_as(rank: int, port: int, runs: list[Run], launch: dict[str, str]) -> None:
    """Be one of two processes that go through some runs, with what a launch file adds to the environment."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | launch
    for run in runs:
        cli_train(*run)
    assert torch.distributed.get_world_size() == 2


@pytest.mark.long
def test_two_processes_and_micro_steps_train_what_one_process_trains(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", 10)
    files = {"autoencoder": recipe(tmp_path, "autoencoder")}
    cli_train(files["autoencoder"], [], False, None)
    files["diffusion"] = recipe(tmp_path, "diffusion", run__ema_decay=0.5)
    for stage, file in files.items():
        cli_train(file, OVERRIDES[stage], False, str(tmp_path / f"{stage}-one"))
    runs = [(file, OVERRIDES[stage], False, str(tmp_path / f"{stage}-two")) for stage, file in files.items()]
    run_two(train_as, free_port(), runs, {})
    plain = OVERRIDES["autoencoder"][:4]
    cli_train(
        files["diffusion"], [*OVERRIDES["diffusion"], "run.accumulation=2"], False, str(tmp_path / "diffusion-parts")
    )
    cli_train(files["autoencoder"], plain, False, str(tmp_path / "autoencoder-plain"))
    cli_train(files["autoencoder"], [*plain, "run.accumulation=2"], False, str(tmp_path / "autoencoder-parts"))
    for one, other in (
        ("autoencoder-one", "autoencoder-two"),
        ("diffusion-one", "diffusion-two"),
        ("diffusion-one", "diffusion-parts"),
        ("autoencoder-plain", "autoencoder-parts"),
    ):
        assert_same_run(tmp_path / one, tmp_path / other)


def assert_same_run(one: Path, other: Path) -> None:
    """Compare everything that two runs logged, and the weights they ended with."""
    ours, theirs = logged(one), logged(other)
    assert ours.keys() == theirs.keys() and len(ours["loss"]) == 4
    for name, values in ours.items():
        of_first = "parts" in other.name and name.startswith("grad_norm/")  # micro-step
        if name in ("images_per_second", "flops_per_second", "utilisation") or of_first:
            continue
        torch.testing.assert_close(
            torch.tensor(theirs[name]),
            torch.tensor(values),
            rtol=1e-3,  # gradients of the discriminator, which kernels add up in another order
            atol=1e-4,
            msg=lambda text, name=name: f"{other.name} {name}: {text}",
        )
    assert_same_weights(one, other)


def assert_same_weights(one: Path, other: Path) -> None:
    """Compare the weights that two runs ended with."""
    weights, same = weights_of(one), weights_of(other)
    for name, tensor in weights.items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.accumulation=3"], r"multiple of processes x run.accumulation = 1 x 3, got 4; try 3"),
        (["run.accumulation=8"], r"= 1 x 8, got 4; try 8"),
        (["run.accumulation=2", "loss.adversarial=0.5"], "needs run.accumulation 1, got 2"),
    ],
)
def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    file: Any = recipe(tmp_path, "autoencoder")
    with pytest.raises(InputError, match=message):
        cli_train(file, overrides, False, None)
    assert not (tmp_path / "autoencoder").exists()


def test_other_ways_to_share_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(InputError, match="told to use DEEPSPEED, and training knows MULTI_GPU and FSDP only"):
        start_accelerator(RunConfig(out="run", steps=1, batch_size=1, precision="no"))

"""Trackers: each gets scalars and grids, a resumed run goes on where it was, and nobody is spoken to unasked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latentdiff.cli import main
from latentdiff.commands.train import train as cli_train
from latentdiff.errors import InputError
from tests.training.test_stages import pictures, recipe

STEPS = [1, 2, 3, 4]


class Stored:
    """What a service has on its server: the lines and the config of each run, by the name it is found by."""

    def __init__(self) -> None:
        self.lines: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        self.open = 0

    def steps(self, name: str, run: str) -> list[int]:
        return [step for step, values in self.lines[run] if name in values]


class Run:
    """A run as both services hand it out."""

    offline = False

    def __init__(self, stored: Stored, name: str, config: dict[str, Any]) -> None:
        self.stored, self.lines = stored, stored.lines.setdefault(name, [])
        self.starting_step = max((step for step, _ in self.lines), default=-1) + 1
        stored.configs[name] = config
        stored.open += 1

    def log(self, values: dict[str, Any], step: int) -> None:
        self.lines.append((step, values))

    def finish(self) -> None:
        print("* Run finished")
        self.stored.open -= 1


class Picture:
    def __init__(self, file: str) -> None:
        self.bytes = Path(file).read_bytes()


class RefusedError(Exception):
    pass


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Stored:
    """Stand in for Weights & Biases: a run is found by its id."""
    stored = Stored()

    def init(*, project: str, name: str, dir: str, id: str, resume: str, config: dict[str, Any]) -> Run:  # noqa: A002
        assert (project, resume, Path(dir).name) == ("latentdiff", "allow", name) and Path(dir).is_dir()
        return Run(stored, id, config)

    install(monkeypatch, "wandb", init=init, Image=Picture, Error=RefusedError)
    return stored


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Stored:
    """Stand in for Trackio: a run is found by its name, whoever had it, and what is done is told on stdout."""
    stored = Stored()

    def init(project: str, name: str, config: dict[str, Any], resume: str) -> Run:
        assert (project, resume) == ("latentdiff", "allow") and not any(key.startswith("_") for key in config)
        print("* Trackio project initialized")
        return Run(stored, name, config)

    install(monkeypatch, "trackio", init=init, Image=Picture)
    return stored


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)


@pytest.fixture
def config(tmp_path: Path) -> str:
    pictures(tmp_path / "pictures", 6)
    return recipe(tmp_path, "autoencoder", run__log_every=1, run__sample_every=2)


@pytest.mark.parametrize("names", [[], ["tensorboard"], ["wandb"], ["tensorboard", "trackio", "wandb"]], ids=len)
def test_scalars_and_grids_go_where_they_are_asked_to_and_nowhere_else(
    config: str,
    tmp_path: Path,
    wandb: Stored,
    trackio: Stored,
    names: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    cli_train(config, [f"run.trackers={names}"], False, None)
    assert "* " not in capsys.readouterr().out
    run = tmp_path / "autoencoder"
    assert (run / "logs").exists() == ("tensorboard" in names)
    if "tensorboard" in names:
        events = EventAccumulator(str(run / "logs")).Reload()
        assert [event.step for event in events.Scalars("loss")] == STEPS
        assert [event.step for event in events.Images("samples")] == [2, 4]
    for name, stored in (("wandb", wandb), ("trackio", trackio)):
        assert (run / f"{name}.json").exists() == bool(stored.lines) == (name in names)
        for found, lines in stored.lines.items():
            assert stored.steps("loss", found) == stored.steps("learning_rate", found) == STEPS
            grids = {step: values["samples"].bytes for step, values in lines if "samples" in values}
            assert grids == {step: (run / f"samples/{step:08d}.png").read_bytes() for step in (2, 4)}
            assert stored.configs[found]["run"]["trackers"] == names and not stored.open


@pytest.mark.parametrize("offline", [False, True])
def test_a_resumed_run_goes_on_with_the_same_tracked_run_and_writes_no_step_twice(
    config: str,
    tmp_path: Path,
    wandb: Stored,
    trackio: Stored,
    monkeypatch: pytest.MonkeyPatch,
    offline: bool,
) -> None:
    monkeypatch.setattr(Run, "offline", offline)
    both = ["run.trackers=[wandb, trackio]"]
    cli_train(config, both, False, None)
    (tmp_path / "autoencoder/checkpoints/step-00000004/manifest.json").unlink()
    cli_train(config, [*both, "run.steps=6"], True, None)
    for stored in (wandb, trackio):
        (run,) = stored.lines
        assert stored.steps("loss", run) == [*STEPS, 5, 6]
        assert stored.steps("samples", run) == stored.steps("held_out_psnr", run) == [2, 4, 6]


def test_what_a_server_never_got_is_sent_again(config: str, tmp_path: Path, wandb: Stored) -> None:
    ask = ["run.trackers=[wandb]"]
    cli_train(config, ask, False, None)
    (run,) = wandb.lines
    wandb.lines[run] = [line for line in wandb.lines[run] if line[0] < 4]  # as after kill -9
    (tmp_path / "autoencoder/checkpoints/step-00000004/manifest.json").unlink()
    cli_train(config, ask, True, None)
    assert wandb.steps("loss", run) == STEPS


def test_a_run_that_starts_anew_in_its_folder_is_told_from_another(
    config: str, tmp_path: Path, trackio: Stored
) -> None:
    ask, checkpoints = ["run.trackers=[trackio, tensorboard]"], tmp_path / "autoencoder/checkpoints"
    cli_train(config, ask, False, None)
    checkpoints.rename(tmp_path / "lost")
    cli_train(config, ask, False, None)  # as one that was killed before its first checkpoint
    (first,) = trackio.lines
    assert trackio.steps("loss", first) == STEPS
    checkpoints.rename(tmp_path / "lost again")
    cli_train(config, [*ask, "run.seed=1"], False, None)
    other = json.loads((tmp_path / "autoencoder/trackio.json").read_text())["id"]
    assert list(trackio.lines) == [first, f"autoencoder-{other}"]
    assert trackio.steps("loss", f"autoencoder-{other}") == STEPS
    events = EventAccumulator(str(tmp_path / "autoencoder/logs")).Reload()
    assert [event.step for event in events.Scalars("loss")] == STEPS


@pytest.mark.parametrize(("name", "package"), [("wandb", "latentdiff[wandb]"), ("trackio", "trackio")])
def test_a_missing_package_is_named_before_the_run_folder_is_made(
    config: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    package: str,
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["train", config, "--set", f"run.trackers=[{name}]"]) == 2
    message = f"latentdiff: run.trackers: {name} needs a package that is not installed; `pip install {package}`\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "autoencoder").exists()


@pytest.mark.long
def test_a_service_that_refuses_is_an_error_of_one_line(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: Any) -> None:
        raise RefusedError("No API key configured.\nUse `wandb login` to log in.")

    install(monkeypatch, "wandb", init=init, Image=Picture, Error=RefusedError)
    with pytest.raises(InputError) as refused:
        cli_train(config, ["run.trackers=[wandb]"], False, None)
    assert str(refused.value) == (
        "run.trackers: wandb: No API key configured. Use `wandb login` to log in; or set WANDB_MODE=offline"
    )

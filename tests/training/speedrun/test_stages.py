"""A stage ends in time on a machine that is slower or faster than thought, and goes on after any interruption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from latentdiff.training.config import DiffusionTraining, parse_config
from latentdiff.training.loop.run import Stop
from latentdiff.training.speedrun.record import Record
from latentdiff.training.speedrun.stages import run_stage, steps_done


class Clock:
    """Tells a time that steps take."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def config(folder: Path, steps: int) -> DiffusionTraining:
    found = parse_config(
        {
            "stage": "diffusion",
            "data": {"folder": "pictures"},
            "run": {"out": str(folder), "steps": steps, "batch_size": 4},
            "start_from": "embedded",
        }
    )
    assert isinstance(found, DiffusionTraining)
    return found


def never(step: int) -> bool:
    return False


class Trainer:
    """Stands in for a stage: takes steps of so many seconds, and saves where it stops.

    Args:
        pace: step -> its seconds.
        ends: step -> whether somebody stops it there.
    """

    def __init__(self, clock: Clock, pace: Callable[[int], float], ends: Callable[[int], bool] = never) -> None:
        self.clock, self.pace, self.ends = clock, pace, ends
        self.planned: list[int] = []

    def __call__(self, config: DiffusionTraining, resume: bool, stop: Stop) -> Path:
        folder, self.planned = Path(config.run.out), [*self.planned, config.run.steps]
        self.clock.now += 5.0
        done = steps_done(folder)
        while done < config.run.steps:
            stopped = self.ends(done)
            self.clock.now += self.pace(done)
            done += 1
            if (done < config.run.steps and stop(done)) or stopped:
                break
        (folder / f"checkpoints/step-{done:08d}").mkdir(parents=True, exist_ok=True)
        return folder


@pytest.fixture
def record(tmp_path: Path) -> Record:
    (tmp_path / "out").mkdir()
    return Record(tmp_path / "out", {"pictures": "a"}, Clock())


def clock_of(record: Record) -> Clock:
    assert isinstance(record.clock, Clock)
    return record.clock


@pytest.mark.parametrize(("pace", "least"), [(1.0, 1000), (2.0, 480), (0.5, 1900), (10.0, 90)])
def test_a_stage_ends_in_time(record: Record, tmp_path: Path, pace: float, least: int) -> None:
    train = Trainer(clock_of(record), lambda step: pace)
    run_stage(record, "unet", config(tmp_path / "out", 1000), train, end=1000.0)
    stage = record.stages["unet"]
    assert stage.done and least <= stage.steps <= least * 1.12
    assert stage.seconds == pytest.approx(1000.0, rel=0.1) and stage.planned_steps == 1000
    assert len(train.planned) == (1 if pace == 1.0 else 2)
    assert len(stage.changes) == len(train.planned) - 1


def test_a_machine_that_becomes_slow_on_the_way_makes_it_shorter(record: Record, tmp_path: Path) -> None:
    train = Trainer(clock_of(record), lambda step: 1.0 if step < 700 else 5.0)
    run_stage(record, "unet", config(tmp_path / "out", 1000), train, end=1000.0)
    stage = record.stages["unet"]
    assert stage.done and 740 < stage.steps < 900 and stage.seconds < 1500
    assert train.planned == sorted(train.planned, reverse=True)


def test_no_more_steps_than_make_sense(record: Record, tmp_path: Path) -> None:
    train = Trainer(clock_of(record), lambda step: 0.1)
    run_stage(record, "unet", config(tmp_path / "out", 1000), train, end=1000.0, most=1200)
    assert record.stages["unet"].steps == 1000  # 200 steps more take 20 seconds, not worth to open everything again


def test_ctrl_c_ends_it_and_the_next_call_goes_on(record: Record, tmp_path: Path) -> None:
    clock = clock_of(record)
    with pytest.raises(KeyboardInterrupt):
        stopping = Trainer(clock, lambda step: 1.0, ends=lambda step: step == 300)
        run_stage(record, "unet", config(tmp_path / "out", 1000), stopping, end=1000.0)
    assert not record.stages["unet"].done and record.stages["unet"].seconds == pytest.approx(306.0)
    again = Record(tmp_path / "out", {"pictures": "a"}, clock)
    run_stage(again, "unet", config(tmp_path / "out", 1000), Trainer(clock, lambda step: 1.0), end=1000.0)
    assert again.stages["unet"].done and steps_done(tmp_path / "out") == 1000
    assert again.stages["unet"].seconds == pytest.approx(1010.0)


def test_a_kill_loses_some_seconds_of_the_count_alone(record: Record, tmp_path: Path) -> None:
    """What was planned anew before stays as it was."""
    clock = clock_of(record)

    class Killed(BaseException):
        pass

    def kill(step: int) -> bool:
        if step == 400:
            raise Killed
        return False

    run = Trainer(clock, lambda step: 2.0, ends=kill)
    with pytest.raises(Killed):
        run_stage(record, "unet", config(tmp_path / "out", 1000), run, end=1000.0)
    planned = record.stages["unet"].steps
    assert planned < 600
    again = Record(tmp_path / "out", {"pictures": "a"}, clock)
    assert again.stages["unet"].seconds == pytest.approx(clock.now, abs=20)
    train = Trainer(clock, lambda step: 2.0)
    run_stage(again, "unet", config(tmp_path / "out", 1000), train, end=1000.0)
    assert train.planned[0] == planned


def test_what_ended_without_a_model_ends_with_one(record: Record, tmp_path: Path) -> None:
    """Killed after the last checkpoint and before the export, it is called once more and takes no step."""
    (tmp_path / "out/checkpoints/step-00001000").mkdir(parents=True)
    clock = clock_of(record)
    run_stage(record, "unet", config(tmp_path / "out", 1000), Trainer(clock, lambda step: 1.0), end=2000.0)
    assert record.stages["unet"].done and clock.now == 5.0

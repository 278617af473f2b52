"""Run a training stage so that it ends in time: slower or faster than thought, it is planned anew."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, TypeVar

from ..config import AutoencoderTraining, DiffusionTraining
from ..loop.checkpointing import checkpoint_folders
from ..loop.run import Stop
from .plan import steps_that_fit, worth_changing
from .recipes import often
from .record import Record, Stage

# A pace is told from so many steps in a row, and so many seconds, or a tenth of what is left where that is less.
LOOKS, LOOKING = 20, 60.0
Config = TypeVar("Config", AutoencoderTraining, DiffusionTraining)


class Train(Protocol[Config]):  # type: ignore[misc]
    """Runs a stage, see `train_diffusion`."""

    def __call__(self, config: Config, resume: bool, stop: Stop) -> Path:
        """Return what was trained."""


class Watch:
    """Looks at the clock after each step, and stops the stage where another number of steps is worth it.

    Args:
        record: of the speedrun.
        stage: the part of it that this is.
        end: seconds of the speedrun after which the stage is to be over.
        most: steps at most.

    Attributes:
        wanted: steps that the stage is to have in all.
    """

    def __init__(
        self, record: Record, stage: Stage, config: AutoencoderTraining | DiffusionTraining, end: float, most: int
    ) -> None:
        self.record, self.stage, self.config, self.end, self.most = record, stage, config, end, most
        self.wanted = config.run.steps
        self.first: tuple[int, float] | None = None  # step and time from which the pace is counted

    def __call__(self, done: int) -> bool:
        """Say whether to stop after so many steps, and keep the time."""
        self.record.tick(self.stage)
        now, planned = self.record.spent, self.config.run.steps
        if self.first is None:
            self.first = (done, now)
        taken = done - self.first[0]
        if taken < LOOKS or now - self.first[1] <= min(LOOKING, 0.1 * abs(self.end - self.first[1])):
            return False
        self.stage.pace = (now - self.first[1]) / taken
        decay = self.config.optimizer.decay_share
        fitting = steps_that_fit(done, planned, self.stage.pace, self.end - now, decay, self.most)
        if not worth_changing(done, planned, fitting, self.stage.pace, decay):
            return False
        self.wanted = fitting
        self.stage.changes.append(f"after step {done} planned {fitting} steps in place of {planned}")
        return True


def run_stage(
    record: Record,
    name: str,
    config: Config,
    train: Train[Config],
    end: float,
    most: int = 10**9,
) -> None:
    """Train a stage to its end, in as many parts as it takes, from where it was broken off.

    Args:
        name: of the stage.
        config: of it; where it has begun, it goes on with the number of steps that it had then.
        end, most: see `Watch`.

    Raises:
        KeyboardInterrupt: somebody stopped it; its checkpoint is there.
    """
    with record.stage(name, planned=max(0.0, end - record.spent)) as stage:
        if stage.steps and steps_done(Path(config.run.out)):
            config = with_steps(config, stage.steps, stage.pace)
        stage.planned_steps = stage.planned_steps or config.run.steps
        while True:
            stage.steps = config.run.steps
            record.save()
            watch = Watch(record, stage, config, end, most)
            train(config, True, watch)
            record.tick(stage)
            done = steps_done(Path(config.run.out))
            if done >= config.run.steps:
                break
            if watch.wanted == config.run.steps:
                raise KeyboardInterrupt("stopped")
            config = with_steps(config, watch.wanted, stage.pace)


def with_steps(config: Config, steps: int, pace: float) -> Config:
    """Return a config with another number of steps, and what follows from it."""
    run = config.run.model_copy(update={"steps": steps, **often(steps, pace)})
    return config.model_copy(update={"run": run})


def steps_done(folder: Path) -> int:
    """Return the step of the newest checkpoint of a run; 0 where there is none."""
    found = checkpoint_folders(folder)
    return int(found[0].name.removeprefix("step-")) if found else 0

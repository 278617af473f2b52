"""Write scalars and sample grids of a run: TensorBoard files, Weights & Biases, Trackio.

Lines that a killed run wrote after its last checkpoint come again when it is resumed. TensorBoard takes the old ones
back; the services cannot, so the new ones are left out. What a service had not stored when a run was killed, it lacks.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from latentdiff.errors import InputError, MissingDependencyError, StorageError
from latentdiff.files import write_file

from ..config import RunConfig, read_yaml
from ..loop.checkpointing import config_digest

PROJECT = "latentdiff"
# What to install for each. Trackio is no extra of ours as long as it asks for a Pillow older than we do.
PACKAGES = {"tensorboard": "tensorboard", "wandb": "latentdiff[wandb]", "trackio": "trackio"}


class Tracker(Protocol):
    """One place that a run is written to."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars by name."""

    def image(self, step: int, name: str, file: Path) -> None:
        """Write the picture in a file."""

    def close(self) -> None:
        """Write what is left and end."""


def require_trackers(names: Sequence[str]) -> None:
    """Raise MissingDependencyError where the package of a tracker is not installed."""
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise MissingDependencyError(
                f"run.trackers: {name} needs a package that is not installed; `pip install {PACKAGES[name]}`"
            ) from error


def open_trackers(run: RunConfig, first_step: int) -> list[Tracker]:
    """Start the trackers of a run whose folder holds its resolved config, or go on with what they have of it.

    Raises:
        InputError: a service refuses.
    """
    folder = Path(run.out).resolve()
    return [OPEN[name](folder, first_step) for name in run.trackers]


class TensorBoard:
    """Event files in run/logs; those of steps after `first_step` that are there already count no more."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self.writer = SummaryWriter(str(folder / "logs"), purge_step=first_step + 1)
        except OSError as error:
            raise StorageError(
                f"cannot write logs to {folder / 'logs'}: {error.strerror}; move what is there"
            ) from error

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars by name."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def image(self, step: int, name: str, file: Path) -> None:
        """Write the picture in a file."""
        with Image.open(file) as picture:
            self.writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        """Write what is left and end."""
        self.writer.close()


class Remembered:
    """Which run of a service a run folder is, and the last step that it was told of; kept in the run folder.

    Attributes:
        id: a new one where the folder has none, or that of another config.
        last: 0 at first.
    """

    def __init__(self, file: Path, config: Mapping[str, Any]) -> None:
        self.file, self.config = file, config_digest(config)
        self.id, self.last = secrets.token_hex(4), 0
        known = json.loads(file.read_text()) if file.exists() else {}
        if known.get("config") == self.config:
            self.id, self.last = known["id"], known["last"]
        else:
            self.note(0)

    def note(self, step: int) -> None:
        """Keep that the service is being told of a step."""
        write_file(self.file, json.dumps({"id": self.id, "config": self.config, "last": step}).encode())


class ServiceRun(Protocol):
    """What is used of a run of Weights & Biases or of Trackio."""

    def log(self, values: dict[str, Any], *, step: int) -> object:
        """Write scalars and pictures by name."""

    def finish(self) -> object:
        """Write what is left and end."""


class Service:
    """A run of Weights & Biases or of Trackio, which are spoken to alike.

    Args:
        run: what their `init` returned.
        picture: their `Image`.
        remembered: what the run folder knows of it; steps up to its last are left out.
    """

    def __init__(self, run: ServiceRun, picture: Callable[[str], object], remembered: Remembered) -> None:
        self.run, self.picture, self.remembered = run, picture, remembered
        self.last = remembered.last

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars by name."""
        self._write(step, dict(values))

    def image(self, step: int, name: str, file: Path) -> None:
        """Write the picture in a file."""
        self._write(step, {name: self.picture(str(file))})

    def close(self) -> None:
        """Write what is left and end."""
        with redirect_stdout(sys.stderr):  # where Trackio's notes belong
            self.run.finish()

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if step > self.last:
            self.remembered.note(step)  # before it is written, so that a kill between the two cannot write it twice
            self.run.log(values, step=step)


def open_wandb(folder: Path, first_step: int) -> Service:
    """Start or go on with a run of Weights & Biases, whose own settings (WANDB_MODE, WANDB_PROJECT, ...) hold.

    Raises:
        InputError: it cannot be reached, or nobody is logged in.
    """
    import wandb

    config = read_yaml(folder / "config.yaml")
    remembered, project = Remembered(folder / "wandb.json", config), os.environ.get("WANDB_PROJECT", PROJECT)
    places = {"project": project, "name": folder.name, "dir": str(folder)}
    try:
        run = wandb.init(id=remembered.id, resume="allow", config=config, **places)
    except wandb.Error as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"run.trackers: wandb: {reason}; or set WANDB_MODE=offline") from error
    if not run.offline:  # what a run on the server has is known better there
        remembered.last = run.starting_step - 1
    return Service(run, wandb.Image, remembered)


def open_trackio(folder: Path, first_step: int) -> Service:
    """Start or go on with a run of Trackio, whose own settings (TRACKIO_DIR, TRACKIO_SPACE_ID, ...) hold."""
    import trackio

    config = read_yaml(folder / "config.yaml")
    remembered = Remembered(folder / "trackio.json", config)
    with redirect_stdout(sys.stderr):
        run = trackio.init(PROJECT, name=f"{folder.name}-{remembered.id}", config=config, resume="allow")
    return Service(run, trackio.Image, remembered)


OPEN: dict[str, Callable[[Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": open_wandb,
    "trackio": open_trackio,
}

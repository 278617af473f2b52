"""`latentdiff train`: the stage that a YAML config describes."""

from __future__ import annotations

import argparse
import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff import training
from latentdiff.commands.shared import load_torch
from latentdiff.errors import InputError, StorageError, shown

if TYPE_CHECKING:
    from latentdiff.training.config import TrainingConfig

HELP = "Train the stage that a YAML config describes."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("config", help="YAML file, see configs/; a name alone finds one that came with the package")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=VALUE")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint that is whole")
    parser.add_argument("--out", help="run folder, instead of the config's run.out")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="look at everything a run needs, print it, train nothing")
    instead.add_argument(
        "--encode",
        action="store_true",
        help="compute the latents and text states of the run, train nothing; several such commands share the work",
    )


def run(options: argparse.Namespace) -> None:
    """Train the stage that a config describes, or look at what it needs."""
    recipe = find_recipe(options.config)
    if options.check:
        check(recipe, options.overrides, options.out)
    elif options.encode:
        encode(recipe, options.overrides, options.out)
    else:
        train(recipe, options.overrides, options.resume, options.out)
        from latentdiff.training.loop.distributed import leave

        leave()


def find_recipe(config: str) -> str:
    """Return the path of a config; a plain name, or one in configs/, that is no file may be one of the package."""
    named = Path(config)
    if named.parent in (Path(), Path("configs")) and not os.path.exists(named):
        return str(training.find_recipe(named.name) or config)
    return config


def train(config: str, overrides: list[str], resume: bool, out: str | None) -> None:
    """Run the stage that a YAML config describes.

    Args:
        config: path of the YAML file.
        overrides: `section.key=value` strings.
        resume: go on from the newest checkpoint that verifies.
        out: run folder instead of the config's `run.out`.

    Raises:
        InputError, StorageError: see `training.config.load_config` and the stages.
    """
    load_torch()
    from latentdiff.training.config import AutoencoderTraining, ImageTextTraining

    parsed = _parsed(config, overrides, out)
    with space_needed(parsed.run.out, "go on with --resume"):
        if isinstance(parsed, AutoencoderTraining):
            from latentdiff.training.train_autoencoder import train_autoencoder

            train_autoencoder(parsed, resume)
        elif isinstance(parsed, ImageTextTraining):
            from latentdiff.training.train_image_text import train_image_text

            train_image_text(parsed, resume)
        else:
            from latentdiff.training.train_diffusion import train_diffusion

            train_diffusion(parsed, resume)


@contextmanager
def space_needed(out: str, remedy: str) -> Iterator[None]:
    """Say in one line that a disk is full while something is trained in a `with` block.

    Args:
        out: run folder.
        remedy: how to go on when there is space.

    Raises:
        StorageError: a log line or a picture found none; checkpoints, caches and models say so by themselves.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageError(f"no space left for {error.filename or out}; free some, then {remedy}") from error


def check(config: str, overrides: list[str], out: str | None) -> None:
    """Look at everything a run needs, without training.

    Raises:
        InputError, ModelLoadError, StorageError: the run could not be started as it is.
    """
    load_torch()
    from latentdiff.training.check.diffusion import check as check_run

    check_run(_parsed(config, overrides, out))


def encode(config: str, overrides: list[str], out: str | None) -> None:
    """Fill the cache of the run that a YAML config of a U-Net describes.

    Raises:
        InputError, StorageError: see `training.config.load_config` and `training.train_diffusion.encode`.
    """
    load_torch()
    from latentdiff.training import train_diffusion
    from latentdiff.training.config import DiffusionTraining

    parsed = _parsed(config, overrides, out)
    if not isinstance(parsed, DiffusionTraining):
        raise InputError(
            f"--encode is for the recipe of a U-Net, got {shown(config)}, which has no latents; leave it out"
        )
    with space_needed(parsed.cache or parsed.run.out, "give the same command again"):
        train_diffusion.encode(parsed)


def _parsed(config: str, overrides: list[str], out: str | None) -> TrainingConfig:
    from latentdiff.training.config import load_config

    return load_config(config, [*overrides, *([f"run.out={json.dumps(out)}"] if out else [])])

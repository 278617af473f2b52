"""Training: one visible loop a stage (`train_autoencoder.py`, `train_diffusion.py`) over small tested parts."""

from __future__ import annotations


def cli_train(config: str, overrides: list[str], resume: bool, out: str | None) -> None:
    """Run the stage that a YAML config describes; the command line's `latentdiff train`.

    Args:
        config: path of the YAML file.
        overrides: `section.key=value` strings.
        resume: go on from the newest checkpoint that verifies.
        out: run folder instead of the config's `run.out`.

    Raises:
        InputError, StorageError: see `training.config.load_config` and the stages.
    """
    import errno

    from latentdiff.errors import StorageError

    from .config import AutoencoderTraining, load_config

    parsed = load_config(config, [*overrides, *([f"run.out={out}"] if out else [])])
    try:
        if isinstance(parsed, AutoencoderTraining):
            from .train_autoencoder import train_autoencoder

            train_autoencoder(parsed, resume)
        else:
            from .train_diffusion import train_diffusion

            train_diffusion(parsed, resume)
    except OSError as error:  # of a log line or a picture; checkpoints, caches and models have their own
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = error.filename or parsed.run.out
        raise StorageError(f"no space left for {place}; free some, then go on with --resume") from error


def cli_check(config: str, overrides: list[str], out: str | None) -> None:
    """Look at everything a run needs, without training; the command line's `latentdiff train --check`.

    Args:
        config, overrides, out: as of `cli_train`.

    Raises:
        InputError, ModelLoadError, StorageError: the run could not be started as it is.
    """
    from .check.diffusion import check
    from .config import load_config

    check(load_config(config, [*overrides, *([f"run.out={out}"] if out else [])]))


def cli_finetune(dataset: str, out: str, model: str | None, rank: int | None, task: str | None, resume: bool) -> None:
    """Fine-tune a model on captioned pictures with settings chosen for both; the command line's `latentdiff finetune`.

    Raises:
        InputError, ModelLoadError, StorageError: see `training.finetune.finetune`.
    """
    from .finetune import finetune

    finetune(dataset, out, model, rank, task, resume)


def cli_data_digits(out: str) -> None:
    """Write the digits of scikit-learn; the command line's `latentdiff data digits`."""
    import json

    from .datasets.digits import build

    print(json.dumps(build(out)))


def cli_data_emoji(out: str, size: int, name: str = "emoji") -> None:
    """Build the captioned emoji set, or that of Firefox OS; the command line's `latentdiff data emoji` (or fxemoji)."""
    import json

    from .datasets.emoji import FXEMOJI, build

    print(json.dumps(build(out, size, sources=FXEMOJI if name == "fxemoji" else None), indent=2))

"""The tuned sampler of a model: `tuned_sampler.json` in its folder, see `diffusion.tuned`.

As `generation_config.json` it is not part of a model's hash; a picture records the hash of the table it was made with.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from latentdiff.checkpoints.folder import read_json
from latentdiff.diffusion.tuned import TunedSampler, TunedTable
from latentdiff.errors import InputError, ModelConfigError, ModelFormatError, shown, suggest

__all__ = ["FILE", "read_tuned"]

FILE = "tuned_sampler.json"
KEYS = ("schedule", "tables")
NUMBERS = tuple(item.name for item in fields(TunedTable))


def read_tuned(folder: Path) -> TunedSampler | None:
    """Return the tuned sampler of the model in a folder; None where it has no such file.

    Raises:
        ModelLoadError: the file cannot be read, or holds something else.
    """
    file = folder / FILE
    if not file.exists():
        return None
    tree = read_json(file)
    _check_keys(file, tree, KEYS)
    if not isinstance(tree["schedule"], str) or not isinstance(tree["tables"], list):
        raise ModelFormatError(f"{file}: expected a text as schedule and a list as tables; tune it again")
    sampler = TunedSampler(tree["schedule"], {})
    for entry in tree["tables"]:
        sampler = sampler.with_table(_table(file, entry))
    return sampler


def _table(file: Path, entry: object) -> TunedTable:
    if not isinstance(entry, dict):
        raise ModelFormatError(f"{file}: expected a table as an object, got {shown(entry)}; tune it again")
    _check_keys(file, entry, NUMBERS)
    values = {name: _frozen(value) for name, value in entry.items()}
    try:
        return TunedTable(**values)
    except InputError as error:
        raise ModelFormatError(f"{file}: {error}") from error
    except TypeError as error:  # a number where a list belongs, or a list where a number does
        raise ModelFormatError(f"{file}: expected lists of numbers, got something else; tune it again") from error


def _check_keys(file: Path, tree: dict[str, Any], keys: tuple[str, ...]) -> None:
    missing = [key for key in keys if key not in tree]
    unknown = [key for key in tree if key not in keys]
    if missing:
        raise ModelFormatError(f"{file}: has no {missing[0]}; tune it again")
    if unknown:
        raise ModelConfigError(f"{file}: has an unknown key {shown(unknown[0])}{suggest(unknown[0], keys)}")


def _frozen(value: object) -> Any:
    return tuple(_frozen(one) for one in value) if isinstance(value, list) else value

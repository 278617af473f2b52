"""Training configs: one YAML a recipe; an unknown key fails with the closest valid one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from latentdiff.errors import InputError, suggest

from .earlier import modern
from .evaluation import HELD_OUT, EvaluateConfig
from .sections import (
    AutoencoderLoss,
    ConsistencyConfig,
    DataConfig,
    InpaintTask,
    LoraConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PriorConfig,
    RunConfig,
    SamplesConfig,
    TaskConfig,
    TextToImageTask,
    TextualInversionConfig,
    UNetAndTextTraining,
    UNetTraining,
    UpscaleTask,
)
from .stages import STAGES, AutoencoderTraining, DiffusionTraining, ImageTextTraining, TrainingConfig
from .yaml_file import dump_yaml, parse_yaml, read_yaml, short

__all__ = [
    "HELD_OUT",
    "STAGES",
    "AutoencoderLoss",
    "AutoencoderTraining",
    "ConsistencyConfig",
    "DataConfig",
    "DiffusionTraining",
    "EvaluateConfig",
    "ImageTextTraining",
    "InpaintTask",
    "LoraConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PriorConfig",
    "RunConfig",
    "SamplesConfig",
    "TaskConfig",
    "TextToImageTask",
    "TextualInversionConfig",
    "TrainingConfig",
    "UNetAndTextTraining",
    "UNetTraining",
    "UpscaleTask",
    "completed",
    "data_config",
    "dump_yaml",
    "load_config",
    "parse_config",
    "read_yaml",
]


def load_config(file: str | Path, overrides: list[str] | None = None) -> TrainingConfig:
    """Read a YAML config and apply `a.b=value` overrides.

    Raises:
        InputError: no such file, not YAML, a key that does not exist (the closest one is offered) or a wrong value.
    """
    tree = read_yaml(file)
    if not isinstance(tree, dict):
        raise InputError(f"{file} must hold a mapping of keys to values, got {type(tree).__name__}")
    for override in overrides or []:
        _override(tree, override)
    return parse_config(tree, str(file))


def parse_config(tree: dict[str, Any], name: str = "config") -> TrainingConfig:
    """Check a config tree, of this release or an earlier one; see `load_config`."""
    stage = tree.get("stage")
    if not isinstance(stage, str) or stage not in STAGES:
        raise InputError(f"{name}: stage must be one of {', '.join(STAGES)}, got {short(stage)}")
    try:
        return STAGES[stage].model_validate(modern(tree))
    except ValidationError as error:
        raise InputError(f"{name}: {_first_problem(error, STAGES[stage])}") from error


def data_config(folder: str, size: int, recipe: str | None = None) -> DataConfig:
    """Return what says which captioned pictures are meant, of the side that a model has.

    Args:
        recipe: file of a config, whose `keep` and `drop` choose among the pictures; None for all.

    Raises:
        InputError: no path is like that, pictures of that side are not trained on or measured, or the recipe is wrong.
    """
    rules = {} if recipe is None else load_config(recipe).data.model_dump(include={"keep", "drop"})
    try:
        return DataConfig(folder=folder, size=size, **rules)
    except ValidationError as error:
        raise InputError(f"the pictures cannot be read at {size} px: {_first_problem(error, DataConfig)}") from error


def completed(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a config that an earlier release saved as this one saves it, what has come since then at its default."""
    try:
        return parse_config(tree).model_dump(mode="json")
    except InputError:  # it has keys that are gone
        return tree


def _first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """Say the first thing wrong in one line."""
    problem = error.errors(include_url=False)[0]
    if problem["type"] == "value_error":  # of several keys together
        return str(problem["ctx"]["error"])
    place, section = _place(problem["loc"], model)
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{place}'{suggest(place.rpartition('.')[2], section.model_fields)}"
    if problem["type"] == "union_tag_not_found":
        return f"{place}.kind is missing; choose one of {', '.join(_kinds(section, place.rpartition('.')[2]))}"
    if problem["type"] == "union_tag_invalid":
        kinds = _kinds(section, place.rpartition(".")[2])
        return f"{place}.kind must be one of {', '.join(kinds)}, got {short(problem['ctx']['tag'])}"
    return f"{place}: {problem['msg'].lower()}, got {short(problem['input'])}"


def _place(parts: tuple[int | str, ...], model: type[BaseModel]) -> tuple[str, type[BaseModel]]:
    """Return the key that a problem is of, without the kinds of sections on its way, and the section it is in."""
    names, section, choices = list[str](), model, dict[str, type[BaseModel]]()
    for part in map(str, parts):
        if part in choices:
            section, choices = choices[part], {}
            continue
        if len(choices) == 1:  # "X | None"
            (section,) = choices.values()
        names.append(part)
        field = section.model_fields.get(part)
        choices = {} if field is None else _sections(field.annotation)
    return ".".join(names), section


def _kinds(section: type[BaseModel], key: str) -> list[str]:
    return list(_sections(section.model_fields[key].annotation))


def _sections(kind: object) -> dict[str, type[BaseModel]]:
    """Return the sections that a field may hold, by their `kind`, or by their name where they have none."""
    found = [one for one in (get_args(kind) or (kind,)) if isinstance(one, type) and issubclass(one, BaseModel)]
    return {str(one.model_fields["kind"].default) if "kind" in one.model_fields else one.__name__: one for one in found}


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set needs key=value, got {short(override)}; for example --set run.steps=100")
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise InputError(f"--set {override:.80}: '{parent:.80}' is a value, not a section")
        node = child
    node[last] = parse_yaml(text, f"--set {override:.80}")

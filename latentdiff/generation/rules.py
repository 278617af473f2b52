"""Rules between options: what they need, what they contradict, and which a model may set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from latentdiff.errors import InputError, ModelConfigError, shown, suggest
from latentdiff.generation.options import options_of
from latentdiff.generation.request import Settings

__all__ = ["check_defaults", "check_inputs", "check_names", "given_of"]

NAMES = {"image": "an image", "mask": "a mask"}


def check_inputs(
    given: Mapping[str, Any], *, image: bool, mask: bool, names: Mapping[str, str] = NAMES, asked: bool = False
) -> None:
    """Raise InputError where an option or input needs another one that is missing, or contradicts it.

    Args:
        given: options by name; those left out have their defaults.
        image, mask: whether there are such inputs.
        names: how a door calls options and inputs, such as `{"image": "--image"}`.
        asked: options are given because they were asked for, even those with the value of their default.
    """
    known = options_of(Settings)
    defaults = {item.name: item.default for item in fields(Settings)}
    used = {name for name, value in given.items() if value is not None and (asked or _differ(value, defaults[name]))}
    used |= {name for name, there in (("image", image), ("mask", mask)) if there}

    def called(name: str) -> str:
        return names.get(name, name)

    def missing(name: str) -> str:
        return f"no {called(name).removeprefix('an ').removeprefix('a ')}"

    needs = {name: declared.needs for name, declared in known.items() if declared.needs is not None}
    needs["mask"] = ("image", "says which part of {} is drawn anew")
    for name, (other, says) in needs.items():
        if name in used and other not in used:
            raise InputError(f"{called(name)} {says.format(called(other))}, got {missing(other)}; add it")
    for name, other, why in (
        ("hires", "image", "draws from a prompt alone, and then larger"),
        ("outpaint", "mask", "makes its own mask"),
    ):
        if name in used and other in used:
            raise InputError(f"{called(name)} {why}, got {called(other)} besides; leave one of them out")
    if "feather" in used and not used & {"mask", "outpaint"}:
        raise InputError(
            f"{called('feather')} softens the edge of what is drawn anew, got {missing('mask')} and "
            f"{missing('outpaint')}; leave it out"
        )


def _differ(value: object, default: object) -> bool:
    try:
        return bool(value != default)
    except (RuntimeError, ValueError):  # of tensors and arrays, which are no option
        return True


def check_names(given: Mapping[str, object]) -> None:
    """Raise TypeError, as Python does, for arguments that no option is called."""
    known = [*options_of(Settings)]
    for name in given:
        if name not in known:
            raise TypeError(f"a pipeline has no option {shown(name)}{suggest(name, known)}")


def check_defaults(defaults: Mapping[str, Any]) -> None:
    """Raise ModelConfigError unless a model's defaults are options that it may set, with values that can be used."""
    settable = [name for name, declared in options_of(Settings).items() if declared.from_model]
    for name in defaults:
        if name not in settable:
            raise ModelConfigError(
                f"generation_config.json: {shown(name)} is no option of a model{suggest(name, settable)}"
            )
    try:
        Settings(prompts=("",), **defaults)
    except InputError as error:
        raise ModelConfigError(f"generation_config.json: {error}") from error


def given_of(options: Mapping[str, object]) -> dict[str, Any]:
    """Return the options that are given: None is the default, but not of a seed, where it is random elsewhere."""
    return {name: value for name, value in options.items() if value is not None or name == "seed"}

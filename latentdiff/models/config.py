"""Model configurations: frozen dataclasses that read and write the JSON keys of diffusers and transformers."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Union, get_args, get_origin, get_type_hints

from latentdiff.errors import ModelConfigError, suggest

if TYPE_CHECKING:
    from typing_extensions import Self


class ModelConfig:
    """Base of the configuration dataclasses.

    Attributes:
        class_name: the reference class, for `_class_name` and for messages.
        fixed: keys of the reference that are no field here, each with the values that mean what our network does.
        ignored: keys of the reference that do not change the network's output; None ignores every other key.
    """

    class_name: ClassVar[str]
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    ignored: ClassVar[frozenset[str] | None] = frozenset()

    def __post_init__(self) -> None:
        """Check the types of all values, then what `check` demands."""
        hints = self._types()
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if not _fits(value, hints[field.name]):
                wanted = str(field.type).replace(", ...", "")
                raise ModelConfigError(f"{field.name} must be of type {wanted}, got {value!r}; correct the config")
        self.check()

    def check(self) -> None:
        """Raise ModelConfigError when the values do not fit together."""

    @classmethod
    @cache
    def _types(cls) -> dict[str, Any]:
        """Return the types of all fields, whose texts Python would compile anew whenever it is asked."""
        return get_type_hints(cls)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the content of a config.json (or a section of a recipe); absent keys take the reference's defaults.

        Raises:
            ModelConfigError: an unknown key, a value of the wrong type, or one that this network cannot honour.
        """
        if not isinstance(data, Mapping):
            raise ModelConfigError(
                f"the config of {cls.class_name} must be an object with named settings, got {data!r}"
            )
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        values = {}
        for key, value in data.items():
            if key in known:
                values[key] = _tuples(value)
            elif key in cls.fixed:
                if value not in cls.fixed[key]:
                    wanted = " or ".join(json.dumps(choice) for choice in cls.fixed[key])
                    raise ModelConfigError(
                        f"{cls.class_name} here needs {key} = {wanted}, got {value!r}; "
                        "choose a model of the Stable Diffusion 1.x, 2.x or XL family"
                    )
            elif cls.ignored is not None and key not in cls.ignored and not key.startswith("_"):
                raise ModelConfigError(f"{cls.class_name} has no setting {key!r}{suggest(key, known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a config.json that the reference class reads."""
        values = {field.name: _lists(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]
        return {**self.header(), **values}

    def header(self) -> dict[str, Any]:
        """Return what names the reference class in its config.json."""
        return {"_class_name": self.class_name}


def require(condition: bool, message: str) -> None:
    """Raise ModelConfigError(message) unless `condition` holds."""
    if not condition:
        raise ModelConfigError(message)


def require_positive(config: ModelConfig, *names: str) -> None:
    """Raise ModelConfigError unless the named numbers, and all members of the named tuples, are at least 1 or None."""
    for name in names:
        value = getattr(config, name)
        numbers = value if isinstance(value, tuple) else (value,)
        require(
            len(numbers) > 0 and all(number is None or number >= 1 for number in numbers),
            f"{name} must be at least 1, got {_lists(value)}; correct the config",
        )


def _fits(value: object, hint: type | types.UnionType) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(member, get_args(hint)[0]) for member in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def _tuples(value: object) -> Any:
    return tuple(_tuples(member) for member in value) if isinstance(value, (list, tuple)) else value


def _lists(value: object) -> Any:
    return [_lists(member) for member in value] if isinstance(value, tuple) else value

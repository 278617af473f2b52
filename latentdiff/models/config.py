"""What the network configs share: reading diffusers and transformers JSON into a frozen dataclass and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import Self

from latentdiff.errors import ModelConfigError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Base of the network configs.

    `CLASS_NAME` is the class the file names, `FIXED` holds keys of the peers' configs that we honour for one value only:
    another value is refused instead of being computed wrongly.
    """

    CLASS_NAME: ClassVar[str] = ""
    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self:
        """Build the config from a JSON object; keys that do not change the network are passed over.

        Raises:
            ModelConfigError: a known key has a value that this class cannot honour.
        """
        for key, allowed in cls.FIXED.items():
            if key in tree and tree[key] not in allowed:
                raise ModelConfigError(
                    f"{cls.CLASS_NAME} config: {key} must be {' or '.join(map(repr, allowed))}, got {tree[key]!r}"
                )
        names = {field.name for field in dataclasses.fields(cls)}
        values = {key: _frozen(value) for key, value in tree.items() if key in names}
        try:
            return cls(**values)
        except TypeError as error:
            raise ModelConfigError(f"{cls.CLASS_NAME} config: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object that the peer library loads too."""
        return dataclasses.asdict(self)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(part) for part in value) if isinstance(value, (list, tuple)) else value


def per_block(value: Any, count: int, name: str) -> tuple[Any, ...]:
    """Spread one value over `count` blocks, or check that there is one for each.

    Raises:
        ModelConfigError: a list of another length.
    """
    if not isinstance(value, tuple):
        return (value,) * count
    if len(value) != count:
        raise ModelConfigError(f"{name} must have one entry for each of the {count} blocks, got {len(value)}")
    return value

"""Fields of requests: every option of a generation as a field, checked by one reader for all doors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields as fields_of
from typing import Any, TypeVar

from pydantic import AliasChoices, BaseModel, Field, ValidationError

from latentdiff.errors import InputError, shown, suggest
from latentdiff.files import parse_json
from latentdiff.generation.options import Option, options_of
from latentdiff.generation.request import Settings
from latentdiff.serve.http.errors import ApiError

__all__ = ["Extensions", "checked", "own_fields", "own_options", "parse_size", "read_object", "validated"]

LEFT_OUT = ("num_images", "height", "width")  # options that are fields of every door: n and size
SHORT = {"num_inference_steps": "steps"}
LARGEST = 2**64  # of whole numbers: seeds are smaller, and what is counted with is in the range of a float
Fields = TypeVar("Fields", bound=BaseModel)


class Extensions(BaseModel):
    """Fields of ours that are no options of a generation; null is as good as left out."""

    lora: dict[str, float] | list[str] | str | None = Field(
        None, description="LoRAs beside those in the prompt: names with weights, names, or both as in `style:0.8,fox`."
    )
    priority: int = Field(0, ge=-1000, le=0, description="Below 0, jobs of a higher one go first, whoever's they are.")
    deadline: float | None = Field(
        None, ge=0.001, description="Seconds after which nobody wants it; of a client's jobs the nearest goes first."
    )


def own_fields() -> dict[str, Any]:
    """Return the generation options as fields of pydantic, for `create_model`."""
    types = {item.name: str(item.type).partition(" ")[0] for item in fields_of(Settings)}
    plain: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}
    made = dict[str, Any]()
    for name, declared in options_of(Settings).items():
        if name in LEFT_OUT:
            continue
        kind: Any = plain[types[name]] if declared.parse is None else list[float] | dict[str, int] | str
        names = AliasChoices(SHORT[name], name) if name in SHORT else None
        text = declared.help[0].upper() + declared.help[1:] + "."
        made[name] = (kind | None, Field(None, validation_alias=names, description=text))
    return made


def own_options(request: BaseModel) -> dict[str, Any]:
    """Return the generation options that were given, as a pipeline takes them."""
    given = dict[str, Any]()
    for name, declared in options_of(Settings).items():
        value = getattr(request, name, None)
        if name not in LEFT_OUT and value is not None:
            given[name] = _parsed(declared, value)
    return given


def _parsed(declared: Option, value: Any) -> Any:
    if declared.parse is None:
        return value
    if isinstance(value, str):
        return declared.parse(value)
    return tuple(value) if isinstance(value, list) else value


def read_object(body: bytes) -> dict[str, Any]:
    """Return the object of a JSON body, without what is null in it, which is as good as left out.

    Raises:
        ApiError: it is no object.
    """
    try:
        values = parse_json(body, "the body")
    except InputError:
        values = None
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be one JSON object, got something else", "invalid_json")
    return {name: value for name, value in values.items() if value is not None}


def validated(kind: type[Fields], values: Mapping[str, Any]) -> Fields:
    """Return checked fields, among which there is none that is not known.

    Raises:
        ApiError: there is no such field, or it cannot be used.
    """
    names = [SHORT.get(own, own) for own in kind.model_fields]
    for name in values:
        if name not in names and name not in SHORT:
            message = f"there is no field {shown(name)}{suggest(name[:80], names)}"
            raise ApiError(400, message, "unknown_parameter", name[:80])
    return checked(kind, values)


def checked(kind: type[Fields], values: Mapping[str, Any]) -> Fields:
    """Return checked fields.

    Raises:
        ApiError: one cannot be used.
    """
    try:
        made = kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        says = first["msg"][0].lower() + first["msg"][1:]
        message = f"{param or 'the name of a field'}: {says}, got {shown(first['input'])}"
        raise ApiError(400, message, "invalid_value", param) from None
    for name in kind.model_fields:
        value = getattr(made, name)
        if isinstance(value, int) and abs(value) > LARGEST:
            message = f"{name} must stay within 64 bits, got {shown(value)}; make it smaller"
            raise ApiError(400, message, "invalid_value", SHORT.get(name, name))
    return made


def parse_size(size: str | None) -> tuple[int, int] | None:
    """Return width and height of "64x48"; None of "auto" and of nothing.

    Raises:
        InputError: it is neither.
    """
    if size is None or size == "auto":
        return None
    width, cross, height = size.lower().partition("x")
    if not cross or not all(side.isascii() and side.isdecimal() and len(side) < 6 for side in (width, height)):
        raise InputError(f"size must be auto, or width and height as in 64x64, got {shown(size)}; try auto")
    return int(width), int(height)

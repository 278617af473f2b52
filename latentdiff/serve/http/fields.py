"""The fields of a request: those of OpenAI's images API, and beside them every option of a generation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields as fields_of
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, Field, ValidationError, create_model

from latentdiff.errors import InputError, shown, suggest
from latentdiff.generation.options import Option, options_of
from latentdiff.generation.request import Settings
from latentdiff.serve.http.errors import ApiError

__all__ = ["IGNORED", "Fields", "GenerationRequest", "own_options", "parse_size", "read_form", "read_json"]

QUALITIES = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]
# Fields of OpenAI's that mean nothing here; they are taken, and named in the answer.
IGNORED = {
    *("moderation", "style", "user", "safety_identifier", "input_fidelity", "complexity", "prompt_rewriter"),
    *("frame_count", "frame_duration_ms", "svg"),
}
LEFT_OUT = ("num_images", "height", "width")  # options that are fields of OpenAI's: n and size
SHORT = {"num_inference_steps": "steps"}


class Fields(BaseModel):
    """The fields of OpenAI's that mean something here; null is as good as left out."""

    prompt: str = Field("", description="What to draw.")
    model: str | None = Field(None, description="A name of GET /v1/models; those of OpenAI stand for the first one.")
    n: int | None = Field(None, ge=1, description="How many pictures.")
    size: str | None = Field(None, description="`auto`, or width x height as in `1024x1024`.")
    quality: QUALITIES | None = Field(None, description="How many steps, where `steps` does not say it.")
    background: Literal["transparent", "opaque", "auto"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of JPEG and WebP.")
    response_format: Literal["b64_json", "url"] | None = None
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3)


def _own_fields() -> dict[str, Any]:
    """Return the generation options as fields of pydantic."""
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


GenerationRequest: type[Fields] = create_model("GenerationRequest", __base__=Fields, **_own_fields())


def own_options(request: Fields) -> dict[str, Any]:
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


def read_json(body: bytes) -> tuple[Fields, list[str]]:
    """Return the fields of a JSON body, and the names of those that are ignored.

    Raises:
        ApiError: it is no object, or a field cannot be used.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be one JSON object, got something else", "invalid_json")
    return _read(values)


def read_form(values: Mapping[str, str]) -> tuple[Fields, list[str]]:
    """Return the fields of a form, where empty ones are as good as left out, and the names of those that are ignored.

    Raises:
        ApiError: a field cannot be used.
    """
    return _read({name: value for name, value in values.items() if value != "" or name == "prompt"})


def _read(values: Mapping[str, Any]) -> tuple[Fields, list[str]]:
    given = {name: value for name, value in values.items() if value is not None}
    known = {name: given[name] for name in given if _plain(name) not in IGNORED}
    ignored = list(dict.fromkeys(_plain(name) for name in given if name not in known))
    names = [SHORT.get(own, own) for own in GenerationRequest.model_fields]
    for name in known:
        if name not in names and name not in SHORT:
            message = f"there is no field {shown(name)}{suggest(name[:80], names)}"
            raise ApiError(400, message, "unknown_parameter", name[:80])
    try:
        request = GenerationRequest.model_validate(known)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        says = first["msg"][0].lower() + first["msg"][1:]
        message = f"{param}: {says}, got {shown(first['input'])}"
        raise ApiError(400, message, "invalid_value", param) from None
    return request, ignored


def _plain(name: str) -> str:
    """Return the field that a part of one is of, as `svg[model]` in a form is of `svg`."""
    return name.partition("[")[0]


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

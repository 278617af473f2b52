"""The fields of a request: those of OpenAI's images API, and beside them every option of a generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, create_model

from latentdiff.serve.http.fields import Extensions, own_fields, read_object, validated

__all__ = ["IGNORED", "Fields", "GenerationRequest", "read_form", "read_json"]

QUALITIES = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]
# Fields of OpenAI's that mean nothing here; they are taken, and named in the answer.
IGNORED = {
    *("moderation", "style", "user", "safety_identifier", "input_fidelity", "complexity", "prompt_rewriter"),
    *("frame_count", "frame_duration_ms", "svg"),
}


class Fields(Extensions):
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


GenerationRequest: type[Fields] = create_model("GenerationRequest", __base__=Fields, **own_fields())


def read_json(body: bytes) -> tuple[Fields, list[str]]:
    """Return the fields of a JSON body, and the names of those that are ignored.

    Raises:
        ApiError: it is no object, or a field cannot be used.
    """
    return _read(read_object(body))


def read_form(values: Mapping[str, str]) -> tuple[Fields, list[str]]:
    """Return the fields of a form, where empty ones are as good as left out, and the names of those that are ignored.

    Raises:
        ApiError: a field cannot be used.
    """
    return _read({name: value for name, value in values.items() if value != "" or name == "prompt"})


def _read(given: Mapping[str, Any]) -> tuple[Fields, list[str]]:
    known = {name: given[name] for name in given if _plain(name) not in IGNORED}
    ignored = list(dict.fromkeys(_plain(name) for name in given if name not in known))
    return validated(GenerationRequest, known), ignored


def _plain(name: str) -> str:
    """Return the field that a part of one is of, as `svg[model]` in a form is of `svg`."""
    return name.partition("[")[0]

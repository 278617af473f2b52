"""Bodies of requests: of which type they must be, and how the OpenAPI file describes them."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastapi import Request
from pydantic import BaseModel

from latentdiff.serve.http.errors import ApiError

__all__ = ["json_body", "require_json", "schema_of"]


def require_json(request: Request) -> None:
    """Raise ApiError unless the body says that it is JSON, which no page of another server can send unasked."""
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise ApiError(415, "the body must be application/json, got another", "wrong_content_type")


def json_body(fields: type[BaseModel]) -> dict[str, Any]:
    """Return what FastAPI is to say of the body of a route that reads it by itself."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema_of(fields)}}}}


@cache
def schema_of(fields: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of fields, which takes long to make and is not to be changed."""
    return fields.model_json_schema()

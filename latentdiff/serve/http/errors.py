"""Errors as a client of OpenAI's API reads them: a status, a type, a code, and which field is meant."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from latentdiff.errors import (
    ClosedError,
    DeadlineError,
    FilterError,
    InputError,
    JobCancelledError,
    OutOfMemoryError,
    QueueFullError,
    RefusedError,
    printable,
)
from latentdiff.generation.options import options_of
from latentdiff.generation.request import Settings

__all__ = ["ApiError", "ErrorAnswer", "ErrorDetails", "api_error"]

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
AGAIN = (408, 429, 503)  # what may go well when it is sent again
# What the fields are called that options come from.
PARAMS = {"num_inference_steps": "steps", "num_images": "n", "height": "size", "width": "size", "prompts": "prompt"}
PARAMS |= {name: name for name in ("prompt", "size", "image", "mask")}


class ErrorDetails(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """An error."""

    error: ErrorDetails


class ApiError(Exception):
    """An error that is answered.

    Args:
        status: of HTTP.
        message: see `errors.printable`.
        code: a word for programs.
        param: the field of the request that is meant.
        retry_after: seconds after which it may go well.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: object,
        code: str,
        param: str | None = None,
        *,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(printable(message))
        self.status, self.code = status, code
        self.param = None if param is None else printable(param)
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers["retry-after"] = str(5 if retry_after is None else retry_after)
        if status == 408 or status >= 409:
            self.headers["x-should-retry"] = "true" if status in AGAIN else "false"

    @property
    def body(self) -> dict[str, Any]:
        """What is answered."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def api_error(error: Exception, retry_after: int | None = None) -> ApiError:
    """Return how an error of ours is answered; one that was not foreseen tells the client nothing of itself.

    Args:
        retry_after: seconds after which there may be room for a job.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClientDisconnect):
        return ApiError(499, "the client has gone before its request had come", "client_gone")
    if isinstance(error, InputError):
        return ApiError(400, error, "invalid_value", _param(str(error)))
    if isinstance(error, QueueFullError):
        return ApiError(429, error, "queue_full", retry_after=retry_after)
    if isinstance(error, ClosedError):
        return ApiError(503, "the server is shutting down; ask another, or later", "shutting_down", retry_after=30)
    if isinstance(error, JobCancelledError):
        return ApiError(409, error, "cancelled")
    if isinstance(error, DeadlineError):
        return ApiError(504, error, "time_limit")
    if isinstance(error, RefusedError):
        return ApiError(400, error, "content_policy_violation")
    if isinstance(error, FilterError):
        return ApiError(500, error, "filter_failed")
    if isinstance(error, OutOfMemoryError):
        return ApiError(507, error, "out_of_memory")
    logging.getLogger(__name__).error("a request failed in a way that was not foreseen", exc_info=error)
    return ApiError(500, "the server failed; its log says why", "internal_error")


def _param(message: str) -> str | None:
    """Return the field that a message begins with."""
    words = message.removeprefix("the ").removeprefix("a ").split(maxsplit=1)
    word = words[0].removesuffix("'s") if words else ""
    return PARAMS.get(word, word if word in options_of(Settings) else None)

"""The table of limits: how much may be asked for, and how more is answered."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from latentdiff.generation.options import check_integer
from latentdiff.serve.http.errors import ApiError

__all__ = ["Limits"]


def limit(default: int, status: int, says: str) -> Any:
    """Declare a limit: what it is, and the status with which more is answered."""
    return field(default=default, metadata={"status": status, "says": says})


@dataclass(frozen=True)
class Limits:
    """What a server takes at most.

    Raises:
        InputError: a limit is no whole number above 0.
    """

    requests: int = limit(256, 503, "requests at once")
    json_bytes: int = limit(2**20, 413, "bytes of a JSON body")
    upload_bytes: int = limit(64 * 2**20, 413, "bytes of a body with pictures")
    image_bytes: int = limit(50 * 10**6, 413, "bytes of an uploaded picture")
    image_pixels: int = limit(16 * 2**20, 400, "pixels of an uploaded picture")
    images: int = limit(1, 400, "pictures to edit in a request")
    pixels: int = limit(4 * 2**20, 400, "pixels of a drawn picture")
    steps: int = limit(200, 400, "steps of a picture, repeated ones counted")
    n: int = limit(10, 400, "pictures in a request")
    queue: int = limit(64, 503, "jobs that wait")
    client_jobs: int = limit(16, 429, "jobs of a client at once")
    seconds: int = limit(600, 504, "seconds from a request to its pictures")
    body_seconds: int = limit(60, 408, "seconds that a body may take to come")
    drain_seconds: int = limit(60, 503, "seconds that jobs may go on after SIGTERM")
    link_seconds: int = limit(3600, 410, "seconds that a link to a picture holds")
    link_bytes: int = limit(256 * 2**20, 404, "bytes of pictures behind links; the oldest go")

    def __post_init__(self) -> None:
        for item in fields(self):
            check_integer(item.name, getattr(self, item.name), 1, 2**40, f"try {item.default}")

    def exceeded(self, name: str, message: str, param: str | None = None, retry_after: int | None = None) -> ApiError:
        """Return the error of a limit."""
        status = next(item.metadata["status"] for item in fields(self) if item.name == name)
        return ApiError(status, message, f"limit_{name}", param, retry_after=retry_after)

    def check(self, name: str, value: float, param: str) -> None:
        """Raise ApiError where a value is beyond a limit."""
        most = getattr(self, name)
        if value > most:
            says = next(item.metadata["says"] for item in fields(self) if item.name == name)
            raise self.exceeded(
                name, f"{param} must stay within {most:,} {says}, got {value:,.0f}; ask for less", param
            )

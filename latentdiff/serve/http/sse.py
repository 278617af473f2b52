"""Server-sent events."""

from __future__ import annotations

import json
from typing import Any

from starlette.datastructures import Headers

__all__ = ["events_after", "last_seen", "sse_event"]


def sse_event(name: str, data: dict[str, Any], number: int | None = None) -> bytes:
    """Return a server-sent event.

    Args:
        name, data: of the event.
        number: by which a client that comes again says what it has seen; None for none.
    """
    head = "" if number is None else f"id: {number}\n"
    return f"{head}event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def last_seen(headers: Headers, after: int) -> int:
    """Return the number of the last event that a client knows: its `Last-Event-ID`, or else `after`."""
    said = headers.get("last-event-id", "")
    return int(said) if said.isascii() and said.isdecimal() and len(said) < 10 else after


def events_after(events: bytes, number: int) -> bytes:
    """Return those of some events whose number is a larger one."""
    parts = events.split(b"\n\n")
    later = [one for one in parts if not one.startswith(b"id: ") or int(one[4:].partition(b"\n")[0]) > number]
    return b"\n\n".join(later)

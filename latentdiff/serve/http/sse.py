"""Server-sent events."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["sse_event"]


def sse_event(name: str, data: dict[str, Any], number: int | None = None) -> bytes:
    """Return a server-sent event.

    Args:
        name, data: of the event.
        number: by which a client that comes again says what it has seen; None for none.
    """
    head = "" if number is None else f"id: {number}\n"
    return f"{head}event: {name}\ndata: {json.dumps(data)}\n\n".encode()

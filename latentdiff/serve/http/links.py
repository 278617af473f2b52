"""Links to pictures: signed, and good for some time; the pictures are in memory, the oldest go first."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from latentdiff.serve.http.errors import ApiError
from latentdiff.serve.http.limits import Limits

__all__ = ["Links"]


@dataclass(frozen=True)
class Kept:
    """A picture behind a link."""

    data: bytes = field(repr=False)
    media_type: str
    until: int


class Links:
    """Pictures by name, of which nobody knows one without the link.

    Args:
        limits: how long a link holds, and how many bytes are kept.
        place: begins their names, so that whoever stands before several of these knows which one has a picture.
    """

    def __init__(self, limits: Limits, place: str = "") -> None:
        self._limits, self._key, self._lock, self._place = limits, secrets.token_bytes(32), threading.Lock(), place
        self._kept, self._bytes = OrderedDict[str, Kept](), 0

    def add(self, data: bytes, output_format: str) -> str:
        """Keep a picture and return the path of its link."""
        until = int(time.time()) + self._limits.link_seconds
        name = f"{self._place}{secrets.token_urlsafe(16)}.{output_format}"
        with self._lock:
            self._kept[name] = Kept(data, f"image/{output_format}", until)
            self._bytes += len(data)
            while len(self._kept) > 1 and (self._bytes > self._limits.link_bytes or self._oldest.until < time.time()):
                self._bytes -= len(self._kept.popitem(last=False)[1].data)
        return f"/v1/images/files/{name}?expires={until}&signature={self._signature(name, str(until))}"

    def find(self, name: str, expires: str, signature: str) -> Kept:
        """Return the picture of a link.

        Raises:
            ApiError: the link is not ours, has expired, or the picture has gone for newer ones.
        """
        if not hmac.compare_digest(self._signature(name, expires).encode(), signature.encode()):
            raise ApiError(403, "the link is not one of this server; ask for the picture again", "bad_signature")
        if int(expires) < time.time():
            raise self._limits.exceeded("link_seconds", "the link has expired; ask for the picture again")
        with self._lock:
            kept = self._kept.get(name)
        if kept is None:
            raise self._limits.exceeded("link_bytes", "the picture has made room for newer ones; ask for it again")
        return kept

    @property
    def _oldest(self) -> Kept:
        return next(iter(self._kept.values()))

    def _signature(self, name: str, expires: str) -> str:
        return hmac.new(self._key, f"{name}:{expires}".encode(), hashlib.sha256).hexdigest()

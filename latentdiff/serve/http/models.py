"""The models of a server by name: all loaded at its start, none by a path or a name of a request."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import PurePath

from latentdiff.errors import InputError, shown, suggest
from latentdiff.pipeline import Pipeline
from latentdiff.serve.http.errors import ApiError

__all__ = ["Models", "served_name"]

# What clients send without being asked; it stands for the first model here.
ALIAS = re.compile(r"(gpt-image|chatgpt-image|dall-e)-[A-Za-z0-9_.-]{1,40}")


def served_name(model: str | None) -> str:
    """Return what clients call a model that was given as a folder, a file or the name of one: `embedded`, `fox`."""
    if model is None:
        return "embedded"
    path = PurePath(model)
    return path.stem if path.suffix == ".safetensors" else path.name


class Models:
    """Pipelines by name; the first one is drawn with where a request names none, or one of OpenAI's.

    Raises:
        InputError: there is none, or a name that stands for another.
    """

    def __init__(self, pipes: Mapping[str, Pipeline]) -> None:
        if not pipes:
            raise InputError("a server needs a model, got none; name one")
        for name in pipes:
            if not name or ALIAS.fullmatch(name):
                raise InputError(f"a model cannot be served as {shown(name)}; call its folder something else")
        self.pipes, self.started = dict(pipes), int(time.time())
        self.first = next(iter(self.pipes))

    def find(self, name: str | None) -> tuple[str, Pipeline]:
        """Return the name and the pipeline that a request means.

        Raises:
            ApiError: there is no such model.
        """
        own = self.first if name is None or ALIAS.fullmatch(name) else name
        if own not in self.pipes:
            remedy = suggest(own[:80], self.pipes)
            raise ApiError(404, f"model {shown(own)} is not served here{remedy}", "model_not_found", "model")
        return own, self.pipes[own]

    def described(self, name: str) -> dict[str, object]:
        """Return what the API says of a model.

        Raises:
            ApiError: there is no such model.
        """
        self.find(name)
        return {"id": name, "object": "model", "created": self.started, "owned_by": "latentdiff"}

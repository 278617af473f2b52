"""The options of the web UI that mean something here; each client has its own, so that none changes another's model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from latentdiff.errors import shown, suggest
from latentdiff.serve.http.errors import ApiError
from latentdiff.serve.http.models import Models

__all__ = ["FORMATS", "Choices", "Options", "listed_models", "title_of"]

MOST_CLIENTS = 10_000  # whose options are remembered
FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}


@dataclass(frozen=True)
class Options:
    """The options of a client.

    Attributes:
        model: that draws.
        samples_format: of pictures, a key of `FORMATS`.
        clip_skip: as the web UI counts, where 1 leaves out no layer.
    """

    model: str
    samples_format: str = "png"
    clip_skip: int = 1

    def shown(self, models: Models) -> dict[str, Any]:
        """Return them as GET options does."""
        return {
            "sd_model_checkpoint": title_of(models, self.model),
            "sd_checkpoint_hash": models.pipes[self.model].components.model_hash,
            "sd_vae": "Automatic",
            "samples_format": self.samples_format,
            "CLIP_stop_at_last_layers": self.clip_skip,
        }

    def changed(self, values: Mapping[str, Any], models: Models) -> tuple[Options, list[str]]:
        """Return options with some values set, and the names of those that cannot be.

        Raises:
            ApiError: a value cannot be used.
        """
        chosen, now, left = self, self.shown(models), list[str]()
        for name, value in values.items():
            if value is None or value == now.get(name, False):
                continue
            if name == "sd_model_checkpoint":
                chosen = replace(chosen, model=_model(value, models))
            elif name == "samples_format":
                if not isinstance(value, str) or value not in FORMATS:
                    message = f"samples_format {shown(value)} is unknown{suggest(str(value)[:80], FORMATS)}"
                    raise ApiError(400, message, "invalid_value", name)
                chosen = replace(chosen, samples_format=value)
            elif name == "CLIP_stop_at_last_layers":
                if not isinstance(value, int) or not 1 <= value <= 12:
                    message = f"{name} must be a whole number from 1 to 12, got {shown(value)}; try 1"
                    raise ApiError(400, message, "invalid_value", name)
                chosen = replace(chosen, clip_skip=value)
            else:
                left.append(name)
        return chosen, left


class Choices:
    """The options of all clients.

    Args:
        models: that are served.
    """

    def __init__(self, models: Models) -> None:
        self._models, self._of = models, OrderedDict[str, Options]()

    def of(self, client: str) -> Options:
        """Return the options of a client."""
        return self._of.get(client, Options(self._models.first))

    def keep(self, client: str, options: Options) -> None:
        """Remember the options of a client."""
        self._of[client] = options
        self._of.move_to_end(client)
        if len(self._of) > MOST_CLIENTS:
            self._of.popitem(last=False)


def title_of(models: Models, name: str) -> str:
    """Return what clients show of a model, by which they name it."""
    digest = models.pipes[name].components.model_hash
    return f"{name} [{digest[:10]}]" if digest else name


def listed_models(models: Models) -> list[dict[str, Any]]:
    """Return the models as GET sd-models does."""
    return [
        {
            "title": title_of(models, name),
            "model_name": name,
            "hash": pipe.components.model_hash[:10] or None,
            "sha256": pipe.components.model_hash or None,
            "filename": name,  # where it is on this machine is nobody's business
            "config": None,
        }
        for name, pipe in models.pipes.items()
    ]


def _model(given: object, models: Models) -> str:
    """Return the name of a model by that, its title or its hash."""
    text = given if isinstance(given, str) else shown(given)
    for name, pipe in models.pipes.items():
        digest = pipe.components.model_hash
        if text in (name, f"{name}.safetensors", title_of(models, name)) or (digest and text in (digest, digest[:10])):
            return name
    return models.find(text)[0]  # one of OpenAI's, or the error

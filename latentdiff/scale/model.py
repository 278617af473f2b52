"""The model of a job: how a worker loads it, and what it is known by without being loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentdiff.checkpoints.components import ModelSource
from latentdiff.checkpoints.find import find_model
from latentdiff.checkpoints.generation_config import read_defaults
from latentdiff.devices import resolve_dtype
from latentdiff.engine.execution import ENGINES
from latentdiff.errors import InputError, shown
from latentdiff.files import fingerprint, is_file, open_file
from latentdiff.generation.result import recorded_name
from latentdiff.pipeline import Pipeline

__all__ = ["EAGER", "Model"]

EAGER = "eager"


@dataclass(frozen=True)
class Model:
    """A model that is not loaded yet; the arguments are those of `Pipeline.from_pretrained`.

    Attributes:
        engine: what runs it; not "auto", which may be another one on each machine.
        embeddings: textual-inversion files, each with the word for it, or None for its own.
    """

    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    prediction_type: str | None = None
    vae: str | None = None
    attention: str = "sdpa"
    engine: str = EAGER
    embeddings: tuple[tuple[str, str | None], ...] = ()

    def load(self) -> Pipeline:
        """Load it.

        Raises:
            InputError, ModelLoadError: see `Pipeline.from_pretrained`.
        """
        pipe = Pipeline.from_pretrained(
            self.model,
            device=self.device,
            dtype=self.dtype,
            prediction_type=self.prediction_type,
            vae=self.vae,
            attention=self.attention,
            engine=self.engine,
        )
        for file, word in self.embeddings:
            pipe = pipe.with_embedding(file, word)
        return pipe.make_ready()

    def facts(self) -> Mapping[str, Any]:
        """Return all of it that changes a picture, JSON-ready: hashes of its files, and the defaults of the model.

        Raises:
            InputError: there is no such model, dtype or file.
            ModelLoadError: a file cannot be read.
        """
        if self.model is not None and is_file(self.model):
            place, name, defaults = Path(self.model), self.model, dict[str, Any]()
        else:
            place, name = find_model(self.model)
            defaults = read_defaults(place)
        for file, _ in self.embeddings:
            if not is_file(file):
                raise InputError(f"--embedding names {shown(file)}, and there is no such file; check the path")
        source = ModelSource(place, None if self.vae is None else Path(self.vae))
        return {
            "model": recorded_name(name),
            "model_hash": source.hash,
            "model_defaults": defaults,
            "prediction_type": self.prediction_type,
            "dtype": str(resolve_dtype(self.dtype)).removeprefix("torch."),
            "engine": ENGINES[self.engine].recorded_as or self.engine,
            "embeddings": [[_hash(file), word] for file, word in self.embeddings],
        }


def _hash(file: str) -> str:
    with open_file(file, "embedding") as opened:
        return fingerprint(opened)[1]

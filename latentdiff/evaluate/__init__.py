"""Measure a model, or pictures: figures that carry their protocol and their interval."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentdiff.evaluate.evaluation import Evaluation, Reference, Request
    from latentdiff.evaluate.figure import Figure
    from latentdiff.evaluate.likelihood import negative_log_likelihood
    from latentdiff.evaluate.run import METRICS, evaluate, measure

__all__ = ["METRICS", "Evaluation", "Figure", "Reference", "Request", "evaluate", "measure", "negative_log_likelihood"]

# Where public names come from; each is imported when it is first asked for, so that the words of scenes load no torch.
HOMES = {
    "METRICS": "run",
    "Evaluation": "evaluation",
    "Figure": "figure",
    "Reference": "evaluation",
    "Request": "evaluation",
    "evaluate": "run",
    "measure": "run",
    "negative_log_likelihood": "likelihood",
}


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

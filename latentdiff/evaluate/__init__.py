"""Measure a model, or pictures: figures that carry their protocol and their interval."""

from __future__ import annotations

from latentdiff.evaluate.evaluation import Evaluation, Reference, Request
from latentdiff.evaluate.figure import Figure
from latentdiff.evaluate.likelihood import negative_log_likelihood
from latentdiff.evaluate.run import METRICS, measure

__all__ = ["METRICS", "Evaluation", "Figure", "Reference", "Request", "measure", "negative_log_likelihood"]

"""Metrics of a model."""

from __future__ import annotations

from latentdiff.evaluate.likelihood import negative_log_likelihood

__all__ = ["METRICS", "negative_log_likelihood"]

# name -> (components, images (N, 3, H, W) in [-1, 1], a caption for each) -> figures, JSON-ready
METRICS = {"nll": negative_log_likelihood}

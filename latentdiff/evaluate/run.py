"""All metrics by name, and an evaluation from its request to its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latentdiff.errors import InputError, suggest
from latentdiff.evaluate import matching, reconstruction, sets
from latentdiff.evaluate.compose.metric import compose
from latentdiff.evaluate.evaluation import Evaluation, Metric
from latentdiff.evaluate.figure import Figure
from latentdiff.evaluate.likelihood import nll
from latentdiff.evaluate.memorised import memorised
from latentdiff.evaluate.page import write_page
from latentdiff.evaluate.report import claim, merged, write_report
from latentdiff.evaluate.speed import speed

__all__ = ["METRICS", "OF_TRAINING_TOO", "check_metrics", "evaluate", "measure"]

METRICS: dict[str, Metric] = {
    "fid": sets.fid,
    "kid": sets.kid,
    "mmd": sets.mmd,
    "precision_recall": sets.precision_recall,
    "clip": matching.clip,
    "retrieval": matching.retrieval,
    "rfid": reconstruction.rfid,
    "psnr": reconstruction.psnr,
    "ssim": reconstruction.ssim,
    "lpips": reconstruction.lpips,
    "compose": compose,
    "nll": nll,
    "memorised": memorised,
    "speed": speed,
}

OF_TRAINING_TOO = frozenset({"memorised"})
"""Metrics that look at the pictures a model was trained on, besides test pictures."""


def check_metrics(names: Sequence[str]) -> None:
    """Raise InputError where one of some metrics is unknown, or named twice."""
    for name in names:
        if name not in METRICS:
            raise InputError(f"metric {name[:80]!r} is unknown{suggest(name, METRICS)}")
    if len({*names}) < len(names):
        raise InputError(f"--metrics names one twice: {','.join(names)[:80]}; leave that out")


def measure(evaluation: Evaluation, names: Sequence[str]) -> list[Figure]:
    """Return the figures of some metrics.

    Raises:
        InputError: a metric is unknown, or lacks what it needs.
    """
    check_metrics(names)
    return [figure for name in names for figure in METRICS[name](evaluation)]


def evaluate(evaluation: Evaluation, names: Sequence[str]) -> tuple[Mapping[str, Any], list[Figure]]:
    """Measure, and keep a report in the folder of the request that is whole after each metric.

    Figures that the folder has already, of other metrics or protocols, stay in it.

    Returns:
        What was measured, and the figures of these metrics.

    Raises:
        InputError: as `measure`, or the folder holds another evaluation.
        StorageError: it cannot be written.
    """
    check_metrics(names)
    subject, folder = evaluation.subject, evaluation.request.out
    claim(folder, subject)
    found: list[Figure] = []
    for name in names:
        found += measure(evaluation, [name])
        figures = merged(folder, found)
        write_report(figures, subject, folder)
        write_page(figures, subject, folder, evaluation.home)
    return subject, found

"""All metrics by name, and an evaluation from its request to its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, methodcaller
from typing import Any

from latentdiff.errors import InputError, suggest
from latentdiff.evaluate import matching, reconstruction, restoration, sets
from latentdiff.evaluate.compose.metric import compose
from latentdiff.evaluate.evaluation import Evaluation, Metric
from latentdiff.evaluate.figure import Figure
from latentdiff.evaluate.likelihood import nll, sample_of
from latentdiff.evaluate.memorised import memorised
from latentdiff.evaluate.page import write_page
from latentdiff.evaluate.report import claim, merged, release, write_report
from latentdiff.evaluate.speed import speed

__all__ = ["METRICS", "check_metrics", "evaluate", "measure"]

Need = Callable[[Evaluation], object]
"""Asks an evaluation for what a metric cannot do without; it raises LatentDiffError where that is missing."""

REAL, NETWORK, JUDGE, MODEL = map(attrgetter, ("chosen", "network", "judge", "model"))
TRAINING, PERCEPTUAL = methodcaller("reference", "train"), attrgetter("perceptual")


@dataclass(frozen=True)
class Entry:
    """A metric of the table.

    Attributes:
        measure: the metric.
        needs: what is asked for before anything is drawn.
        of_training: whether it looks at the pictures a model was trained on, besides test pictures.
    """

    measure: Metric
    needs: tuple[Need, ...] = ()
    of_training: bool = False


METRICS = {
    "fid": Entry(sets.fid, (REAL, NETWORK)),
    "kid": Entry(sets.kid, (REAL, NETWORK)),
    "mmd": Entry(sets.mmd, (REAL, NETWORK)),
    "precision_recall": Entry(sets.precision_recall, (REAL, NETWORK)),
    "clip": Entry(matching.clip, (JUDGE,)),
    "retrieval": Entry(matching.retrieval, (JUDGE,)),
    "neighbours": Entry(matching.neighbours, (REAL, NETWORK)),
    "rfid": Entry(reconstruction.rfid, (REAL, NETWORK)),
    "psnr": Entry(reconstruction.psnr, (REAL, reconstruction.skimage_metrics)),
    "ssim": Entry(reconstruction.ssim, (REAL, reconstruction.skimage_metrics)),
    "lpips": Entry(reconstruction.lpips, (REAL, PERCEPTUAL)),
    "nll": Entry(nll, (sample_of,)),
    "compose": Entry(compose, (JUDGE,)),
    "inpainting": Entry(restoration.inpainting, (REAL, MODEL)),
    "upscaling": Entry(restoration.upscaling, (REAL, restoration.upscaler, reconstruction.skimage_metrics)),
    "memorised": Entry(memorised, (TRAINING, REAL, NETWORK), of_training=True),
    "speed": Entry(speed),
}


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
    _require(evaluation, names)
    return [figure for name in names for figure in METRICS[name].measure(evaluation)]


def _require(evaluation: Evaluation, names: Sequence[str]) -> None:
    """Ask for everything that some metrics need, so that what is missing is missed before anything is drawn."""
    for need in dict.fromkeys(need for name in names for need in METRICS[name].needs):
        need(evaluation)


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
    _require(evaluation, names)
    subject, folder = evaluation.subject, evaluation.request.out
    claim(folder, subject)
    found: list[Figure] = []
    try:
        for name in names:
            found += METRICS[name].measure(evaluation)
            figures = merged(folder, found)
            write_report(figures, subject, folder)
            write_page(figures, subject, folder, evaluation.home)
    except InputError:
        release(folder)
        raise
    return subject, found

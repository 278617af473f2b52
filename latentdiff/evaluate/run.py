"""All metrics by name, and an evaluation from its request to its report."""

from __future__ import annotations

from collections.abc import Sequence

from latentdiff.errors import InputError, suggest
from latentdiff.evaluate import matching, sets
from latentdiff.evaluate.compose.metric import compose
from latentdiff.evaluate.evaluation import Evaluation, Metric
from latentdiff.evaluate.figure import Figure
from latentdiff.evaluate.likelihood import nll

__all__ = ["METRICS", "check_metrics", "measure"]

METRICS: dict[str, Metric] = {
    "fid": sets.fid,
    "kid": sets.kid,
    "mmd": sets.mmd,
    "precision_recall": sets.precision_recall,
    "clip": matching.clip,
    "retrieval": matching.retrieval,
    "compose": compose,
    "nll": nll,
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
    return [figure for name in names for figure in METRICS[name](evaluation)]

"""Figures for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from latentdiff.serve.scheduler import Scheduler

__all__ = ["registry"]

GAUGES = {
    "waiting": "jobs with images that are not drawn yet",
    "running": "images that are being drawn",
    "decoding": "images that are sampled and not yet decoded",
    "batch_fill": "share of the places that were taken, on average over all steps",
    "step_seconds": "a common step took, in the median of the newest ones",
}
COUNTERS = {
    "pictures": "images that were drawn",
    "done": "jobs that were done",
    "failed": "jobs that failed",
    "cancelled": "jobs that were cancelled",
    "rejected": "jobs that found the queue full",
    "withheld": "images that the content filter refused, or failed on",
    "steps": "common steps that were taken",
}


class _Figures(Collector):
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        """Yield the figures of now."""
        stats = self._scheduler.stats()
        for name, says in GAUGES.items():
            yield GaugeMetricFamily(f"latentdiff_{name}", says, value=getattr(stats, name))
        for name, says in COUNTERS.items():
            yield CounterMetricFamily(f"latentdiff_{name}", says, value=getattr(stats, name))
        name = "latentdiff_admission_seconds"
        waits = Metric(name, "from a job to its first step; quantiles are of the newest ones", "summary")
        for quantile, value in zip(("0.5", "0.95"), stats.admission_seconds):
            waits.add_sample(name, {"quantile": quantile}, value)
        waits.add_sample(f"{name}_count", {}, stats.admissions)
        waits.add_sample(f"{name}_sum", {}, stats.admission_sum)
        yield waits


def registry(scheduler: Scheduler) -> CollectorRegistry:
    """Return the figures of a scheduler, for `prometheus_client.generate_latest`."""
    found = CollectorRegistry()
    found.register(_Figures(scheduler))
    return found

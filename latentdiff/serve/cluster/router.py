"""What Ray Serve asks: where requests go, and how many replicas there should be."""

from __future__ import annotations

import math
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from latentdiff.serve.cluster.routes import Asked, Routes

__all__ = ["ADMITTED", "Router", "replicas_wanted"]

ADMITTED = "admitted"  # the figure of a replica that tells how many jobs wait or are drawn
ASKED = "asked"  # the argument of a request that `Routes` looks at


class Router(RequestRouter):
    """Chooses a replica for each request of a door; see `Routes`."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Begin with nothing known."""
        self._routes = Routes()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas that may take a request, in turn."""
        by_name = {one.replica_id.unique_id: one for one in candidate_replicas}
        busy = {name: self._busy(one) for name, one in by_name.items()}
        return [[by_name[name]] for name in self._routes.choose(_asked(pending_request), busy)]

    def _busy(self, replica: RunningReplica) -> int:
        """Return how many requests a replica is answering, as they went through here, or how many jobs it has."""
        answering = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return max(answering, int((replica.routing_stats or {}).get(ADMITTED, 0)))

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Note which replica took a request."""
        self._routes.went(_asked(pending_request), replica_id.unique_id)


def _asked(request: PendingRequest | None) -> Asked:
    asked = None if request is None else request.kwargs.get(ASKED)
    return asked if isinstance(asked, Asked) else Asked()


def replicas_wanted(context: Any) -> tuple[int, dict[str, Any]]:
    """Return how many replicas there should be, so that each has `target_ongoing_requests` jobs: those of requests that
    are being answered, or, where jobs outlive their requests, those that wait or are drawn.
    """
    admitted = sum(((context.aggregated_metrics or {}).get(ADMITTED) or {}).values())
    return math.ceil(max(admitted, context.total_num_requests) / context.config.target_ongoing_requests), {}

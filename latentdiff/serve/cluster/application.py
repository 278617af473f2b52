"""The application of Ray Serve.

    serve deploy examples/serving/serve.yaml

imports `build` from here; `latentdiff serve --replicas 2` runs it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from latentdiff.serve.cluster.door import Door
from latentdiff.serve.cluster.options import Options
from latentdiff.serve.cluster.replica import Replica
from latentdiff.serve.cluster.router import Router, replicas_wanted
from latentdiff.serve.http.limits import Limits

__all__ = ["ENDING_SECONDS", "build"]

ENDING_SECONDS = Limits().drain_seconds + 10  # of a replica, most of them for jobs
HEALTH_SECONDS = 5  # between two looks at a replica


def build(args: Mapping[str, Any]) -> Application:
    """Return the application.

    Args:
        args: options, by their names; see `Options`.

    Raises:
        InputError: one is not known or cannot be used.
    """
    options, limits = Options.read(dict(args)), Limits()
    number: dict[str, Any] = {"num_replicas": options.replicas}
    if options.max_replicas is not None:
        number = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=options.replicas,
                max_replicas=options.max_replicas,
                target_ongoing_requests=options.target,
                upscale_delay_s=10,
                downscale_delay_s=300,
                policy=AutoscalingPolicy(policy_function=replicas_wanted),
            )
        }
    replicas = serve.deployment(Replica).options(
        name="latentdiff-replica",
        ray_actor_options={"num_gpus": options.gpus, "num_cpus": options.cores},
        max_ongoing_requests=limits.requests,
        graceful_shutdown_timeout_s=ENDING_SECONDS,
        health_check_period_s=HEALTH_SECONDS,
        request_router_config=RequestRouterConfig(request_router_class=Router, request_routing_stats_period_s=1.0),
        **number,
    )
    door = serve.deployment(Door).options(
        name="latentdiff-door",
        num_replicas=options.doors,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=limits.requests,
        graceful_shutdown_timeout_s=ENDING_SECONDS,
        health_check_period_s=HEALTH_SECONDS,
    )
    return door.bind(replicas.bind(options), options)

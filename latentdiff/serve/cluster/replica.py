"""A replica: the models and a scheduler of their own, which answer whole requests that a door passes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import torch
from ray import serve
from starlette.types import Message

from latentdiff.pipeline import Pipeline
from latentdiff.serve.cluster.options import Options
from latentdiff.serve.cluster.router import ADMITTED
from latentdiff.serve.filter import NudityFilter
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.models import served_name
from latentdiff.serve.http.service import Service

__all__ = ["Replica"]

LOOKS = 0.1  # seconds between two looks whether jobs have ended


class Replica:
    """Draws; Serve makes it, and asks it how it is.

    Args:
        options: of the application.
    """

    def __init__(self, options: Options) -> None:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        pipes = {
            served_name(model): Pipeline.from_pretrained(
                model, device=options.device, dtype=options.dtype, engine=options.engine
            )
            for model in options.given_models
        }
        for pipe in pipes.values():
            pipe.make_ready()
        self.limits = Limits() if options.queue is None else Limits(queue=options.queue)
        self.service = Service.open(
            pipes,
            batch=options.batch,
            limits=self.limits,
            lora_dir=options.lora_folder,
            content_filter=None if options.filter is None else NudityFilter(options.filter),
            place=f"{serve.get_replica_context().replica_id.unique_id}.",
        )
        self._answering = set[asyncio.Task[None]]()

    async def answer(self, scope: dict[str, Any], body: bytes, asked: object = None) -> AsyncIterator[Message]:
        """Answer a request: yield the messages of ASGI that the application sends.

        Args:
            scope: of ASGI.
            body: all of it.
            asked: for the router alone.
        """
        messages, gone = asyncio.Queue[Message | None](), asyncio.Event()
        come = False

        async def receive() -> Message:
            nonlocal come
            if not come:
                come = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def answered() -> None:
            try:
                await self.service.api(scope, receive, messages.put)
            except Exception:
                logging.getLogger(__name__).exception("a request failed in a way that was not foreseen")
            finally:
                messages.put_nowait(None)

        task = asyncio.ensure_future(answered())
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            gone.set()  # the application sees to its job by itself

    def check_health(self) -> None:
        """Raise RuntimeError where nothing can be drawn any more, so that Serve begins another in its place."""
        if self.service.desk.scheduler.closed and not self.service.desk.draining:
            raise RuntimeError("the scheduler has ended")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return how many jobs wait or are drawn; see `router.replicas_wanted`."""
        stats = self.service.desk.scheduler.stats()
        return {ADMITTED: float(stats.waiting + stats.running)}

    def record_routing_stats(self) -> dict[str, float]:
        """Return the same for the router."""
        return self.record_autoscaling_stats()

    async def __del__(self) -> None:
        """Finish the jobs that there are, once Serve sends no more requests."""
        service = getattr(self, "service", None)
        if service is None:  # its models could not be loaded
            return
        service.desk.draining = True
        until = asyncio.get_running_loop().time() + self.limits.drain_seconds
        while service.busy and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(LOOKS)
        await service.desk.stop()

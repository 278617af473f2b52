"""A content filter before the page: neither pictures nor previews of what it refuses."""

from __future__ import annotations

import asyncio

import pytest
from PIL import Image

from latentdiff import Pipeline
from latentdiff.serve.filter import Verdict
from latentdiff.serve.http.desk import Desk
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.links import Links
from latentdiff.serve.http.loras import Loras
from latentdiff.serve.http.models import Models
from latentdiff.serve.page.drawing import News, Studio
from latentdiff.serve.scheduler import Scheduler


def refuses(image: Image.Image) -> Verdict:
    """Let nothing through."""
    return Verdict(False, "foxes")


def breaks(image: Image.Image) -> Verdict:
    """Fail."""
    raise RuntimeError("out of order")


@pytest.mark.parametrize(("content_filter", "says"), [(refuses, "refused the picture for foxes"), (breaks, "withheld")])
def test_a_studio_shows_nothing_that_is_refused(pipe: Pipeline, content_filter: object, says: str) -> None:
    limits = Limits()

    async def told(scheduler: Scheduler) -> list[News]:
        studio = Studio(Models({"tiny": pipe}, Loras(None, limits)), Desk(scheduler, limits), Links(limits))
        values = {"mode": "text", "prompt": "fox", "num_inference_steps": "4"}
        return [news async for news in studio.draw(values, "page", "ann")]

    with Scheduler(pipe, content_filter=content_filter) as scheduler:  # type: ignore[arg-type]
        news = asyncio.run(told(scheduler))
    assert news[-1].failed and says in news[-1].says and news[-1].drawn is None
    assert all(not tile.source and not tile.done for one in news for tile in one.tiles)

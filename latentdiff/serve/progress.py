"""How far a job is: of each of its images the steps that are done, and the newest preview."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from latentdiff.serve.jobs import ServedJob

__all__ = ["ImageProgress", "progress_of"]


@dataclass
class ImageProgress:
    """How far an image is.

    Attributes:
        index: of the image in its job.
        status: "waiting", "running" or "drawn".
        step, steps: how many steps are done, and how many it takes, 0 where that is not known yet.
        preview: the newest one.
    """

    index: int
    status: str = "waiting"
    step: int = 0
    steps: int = 0
    preview: Image.Image | None = None

    @property
    def share(self) -> float:
        """How much of it is done, from 0 to 1."""
        return 1.0 if self.status == "drawn" else self.step / self.steps if self.steps else 0.0


def progress_of(job: ServedJob) -> list[ImageProgress]:
    """Return how far the images of a job are."""
    found = [ImageProgress(index) for index in range(job.count)]
    for event in job.past():
        if event.index is None:
            continue
        image = found[event.index]
        image.status = "drawn" if event.kind == "picture" else "running"
        if event.steps:
            image.step, image.steps = event.step, event.steps
        if event.preview is not None:
            image.preview = event.preview
    return found

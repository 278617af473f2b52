"""Draw for many clients at once: jobs share the steps of one loop, and images join and leave between any two.

    with Scheduler(pipe, batch=8) as scheduler:
        job = scheduler.submit("a red fox", client="ann")
        job.result().save("fox.png")

Every image keeps its own row of its own table (sampler, steps, noise), as if it were drawn alone; common is the call of
the U-Net alone, which is made once for all images whose maps, texts and model have the same shape. See docs/serving.md.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType

import torch
from PIL import Image
from torch import Tensor

from latentdiff.engine.memory_estimate import sampling_bytes
from latentdiff.errors import ClosedError, FilterError, InputError, QueueFullError, RefusedError, shown
from latentdiff.generation.decode import OUTPUT_TYPES
from latentdiff.generation.masks import MaskLike
from latentdiff.generation.options import check_integer, number, one_of
from latentdiff.generation.run import Drawing, prepare_drawing
from latentdiff.generation.text import TextCache
from latentdiff.pipeline import ImageLike, Pipeline
from latentdiff.serve.filter import Filter, require_allowed
from latentdiff.serve.helper import DECODE, PREPARE, Helper
from latentdiff.serve.jobs import ServedJob
from latentdiff.serve.places import Place, Places, explained
from latentdiff.serve.preview import CheapPreview, Preview
from latentdiff.serve.stats import Recorder, Stats
from latentdiff.serve.waiting import Waiting

__all__ = ["Scheduler"]

ALONE = (1, 0)  # size of the batch and place in it, in the record of a picture: as if it were drawn alone


class Scheduler:
    """One loop for one model on one device, which draws the images of all jobs in common steps.

    Args:
        pipe: the model, on its device.
        batch: how many images are drawn at once.
        queue: how many jobs may wait.
        memory: bytes that the images being drawn may take by estimate, the weights left out; None for no bound but
            `batch`.
        preview: what makes a small picture of an x0 estimate.
        content_filter: must let every picture through before anybody sees it; there are no previews then.

    Raises:
        InputError: the networks are offloaded, or a number cannot be used.
    """

    def __init__(
        self,
        pipe: Pipeline,
        *,
        batch: int = 8,
        queue: int = 64,
        memory: int | None = None,
        preview: Preview | None = None,
        content_filter: Filter | None = None,
    ) -> None:
        self._require_here(pipe, pipe)
        self.pipe, self.batch = pipe, check_integer("batch", batch, 1, 1024, "try 8")
        self.content_filter = content_filter
        self.memory = None if memory is None else check_integer("memory", memory, 1, 2**60, "try 8 * 2**30")
        self._waiting = Waiting(check_integer("queue", queue, 1, 100_000, "try 64"))
        self._preview, self._texts = CheapPreview() if preview is None else preview, TextCache()
        self._recorder, self._woken, self._stopping = Recorder(self.batch), threading.Event(), False
        self._decoding, self._lock = 0, threading.Lock()
        self._places = Places(self._preview, self._sampled)
        self._helper = Helper("latentdiff-helper")
        self._thread = threading.Thread(target=self._run, name="latentdiff-loop", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: str | Sequence[str] = "",
        *,
        image: ImageLike | None = None,
        mask: MaskLike | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        client: str = "",
        priority: int = 0,
        deadline: float | None = None,
        preview_every: int = 0,
        pipe: Pipeline | None = None,
        **options: object,
    ) -> ServedJob:
        """Hand in a request; what cannot be used is refused at once.

        Args:
            prompt, image, mask, latents, output_type, options: see `Pipeline.__call__`.
            client: whose request it is; clients have turns.
            priority: of jobs that wait, those of a higher one are drawn first, -1000 to 1000.
            deadline: seconds from now after which the job fails, above 0; None for no such time.
            preview_every: steps between previews; 0 for none.
            pipe: another model on the same device, such as `pipe.with_loras(...)`; its images have steps of their own.

        Raises:
            InputError: something that cannot be used, with what can.
            QueueFullError: as many jobs wait as may.
            ClosedError: the scheduler is closed.
        """
        chosen = self.pipe if pipe is None else pipe
        self._require_here(chosen, self.pipe)
        one_of(tuple(OUTPUT_TYPES))("output_type", output_type)
        if self.content_filter is not None:
            one_of(("pil",))("output_type", output_type)  # of which a filter sees what is in it
            preview_every = 0
        check_integer("priority", priority, -1000, 1000, "try 0")
        check_integer("preview_every", preview_every, 0, 1000, "try 5")
        if deadline is not None:
            number(1e-3, 1e9, "try 60")("deadline", deadline)
        try:
            self._waiting.require_room()  # before pictures are opened
            request = chosen.make_job(prompt, image=image, mask=mask, latents=latents, **options)
            job = ServedJob(
                replace(request, texts=self._texts),
                output_type=output_type,
                client=client,
                priority=priority,
                deadline=deadline,
                preview_every=preview_every,
                on_end=self._ended,
            )
            self._waiting.put(job)
        except QueueFullError:
            self._recorder.count("rejected")
            raise
        self._helper.add(PREPARE, self._prepare)
        return job

    @property
    def closed(self) -> bool:
        """Whether no more jobs are taken: it was closed, or its loop ended."""
        return self._waiting.closed

    def check(self, picture: Image.Image) -> None:
        """Raise unless the content filter lets a picture through, if there is one.

        Raises:
            RefusedError, FilterError: see `filter.require_allowed`.
        """
        if self.content_filter is None:
            return
        try:
            require_allowed(self.content_filter, picture)
        except (RefusedError, FilterError):
            self._recorder.count("withheld")
            raise

    def stats(self) -> Stats:
        """Return figures of what waits, what runs, and what was done."""
        return self._recorder.stats(len(self._waiting), len(self._places.running), self._decoding)

    def close(self, drain: bool = True) -> None:
        """Take no more jobs, and return when the loop has ended.

        Args:
            drain: finish all jobs that were taken; False ends them with ClosedError, after the current step.
        """
        jobs = self._waiting.close()
        if not drain:
            self._stopping = True
            for job in jobs:
                job.end("cancelled", ClosedError("the scheduler was closed before the job was done"))
        self._woken.set()
        self._thread.join()
        self._helper.close()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)

    @staticmethod
    def _require_here(pipe: Pipeline, own: Pipeline) -> None:
        if pipe.offload is not None:
            raise InputError("a served model must stay on its device, got one that is offloaded; load without offload")
        if pipe.device != own.device:
            raise InputError(f"pipe must be on {own.device}, got {shown(str(pipe.device))}; move it with pipe.to")

    @torch.no_grad()
    def _run(self) -> None:
        try:
            while True:
                self._woken.clear()
                self._waiting.expire(time.monotonic())
                self._leave()
                self._admit()
                if self._places.running:
                    self._step()
                elif self._waiting.closed and not len(self._waiting) and not self._decoding:
                    return
                else:
                    nearest = self._waiting.nearest_deadline()
                    self._woken.wait(None if nearest is None else max(0.0, nearest - time.monotonic()))
        except Exception as error:  # a fault of ours: nobody may wait for ever
            logging.getLogger(__name__).critical("the scheduler ended", exc_info=error)
            broken = ClosedError(f"the scheduler ended with {type(error).__name__}: {error}; make a new one")
            for job in [*self._waiting.close(), *(place.job for place in self._places.running)]:
                job.fail(broken)

    def _admit(self) -> None:
        """Give free places to the images whose turn it is."""
        while len(self._places.running) < self.batch and self._decoding <= self.batch:
            turn = self._waiting.take(self._fits)
            if turn is None:
                return
            drawing = turn.job.drawing
            if drawing is None:  # it has ended since
                continue
            if turn.index == 0:
                self._recorder.admission(time.monotonic() - turn.job.submitted)
            self._places.admit(turn, drawing, _need(drawing))

    def _fits(self, job: ServedJob) -> bool:
        if self.memory is None or job.drawing is None or not self._places.running:
            return True
        return sum(place.need for place in self._places.running) + _need(job.drawing) <= self.memory

    def _leave(self) -> None:
        """Free the places of the images whose jobs have ended."""
        now = time.monotonic()
        for place in list(self._places.running):
            place.job.expire(now)
            if self._stopping:
                place.job.end("cancelled", ClosedError("the scheduler was closed before the job was done"))
        self._places.leave()

    def _step(self) -> None:
        begun, count = time.monotonic(), len(self._places.running)
        self._places.step()
        self._recorder.step(count, time.monotonic() - begun)

    def _prepare(self) -> None:
        """Prepare the job whose turn is next."""
        job = self._waiting.unprepared()
        request = None if job is None else job.request
        if job is None or request is None:  # it has ended since
            return
        try:
            drawing = prepare_drawing(request, 1)
            need = _need(drawing)
            if self.memory is not None and need > self.memory:
                most = f"{self.memory / 2**20:,.0f} MB"
                raise InputError(f"a picture may take {most}, got one of {need / 2**20:,.0f} MB; ask for a smaller one")
            if job.preview_every and isinstance(self._preview, CheapPreview):
                self._preview.fit(request.components)
            job.drawing = drawing
        except Exception as error:
            job.fail(explained(error))
        self._woken.set()

    def _sampled(self, place: Place, latents: Tensor) -> None:
        """Have the helper decode an image."""
        with self._lock:
            self._decoding += 1
        job, index, drawing = place.job, place.index, place.drawing
        self._helper.add(DECODE, lambda: self._decode(job, index, drawing, latents))

    def _decode(self, job: ServedJob, index: int, drawing: Drawing, latents: Tensor) -> None:
        try:
            if not job.ended:
                picture = drawing.finish(latents, index, ALONE, job.output_type)
                self.check(picture.image)
                self._recorder.count("picture")
                job.add(index, picture)
        except Exception as error:
            job.fail(explained(error))
        with self._lock:
            self._decoding -= 1
        self._woken.set()

    def _ended(self, kind: str) -> None:
        self._recorder.count(kind)
        self._woken.set()


def _need(drawing: Drawing) -> int:
    """Return about how many bytes it takes to sample an image, guided."""
    unet, areas = drawing.job.components.unet, [(stage.shape, stage.windows) for stage in drawing.stages]
    return max(
        sampling_bytes(unet, channels, h * w, h * w if windows is None else windows.tall * windows.wide, 2)
        for (channels, h, w), windows in areas
    )

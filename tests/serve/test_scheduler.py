"""Who is drawn when, and what becomes of a job that is cancelled, late, refused or broken."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from latentdiff import Pipeline
from latentdiff.checkpoints import Components
from latentdiff.engine.engines import Eager
from latentdiff.engine.memory_estimate import sampling_bytes
from latentdiff.errors import (
    ClosedError,
    DeadlineError,
    InputError,
    JobCancelledError,
    LatentDiffError,
    OutOfMemoryError,
    QueueFullError,
)
from latentdiff.generation.text import TextCache
from latentdiff.models.encoding import TokenStates
from latentdiff.serve.jobs import Event, ServedJob
from latentdiff.serve.scheduler import Scheduler
from tests.serve.gate import Gate, eventually

STEPS: dict[str, Any] = {"num_inference_steps": 2}
PLAIN: dict[str, Any] = {**STEPS, "guidance_scale": 1.0}  # one row for each image


@pytest.fixture
def gate(pipe: Pipeline) -> Gate:
    return Gate(pipe)


@pytest.fixture
def single(gate: Gate) -> Iterator[Scheduler]:
    """A scheduler of one place, in which a job of two steps stands before its first call."""
    with Scheduler(gate.pipe, batch=1, queue=8) as scheduler:
        scheduler.submit("cat", client="zoe", **PLAIN)
        gate.arrive()
        yield scheduler
        gate.open()


def admissions(jobs: dict[str, ServedJob]) -> list[str]:
    """Return a list that the names of jobs are added to when their images are admitted."""
    order = list[str]()
    for name, job in jobs.items():
        job.listen(lambda event, name=name: order.append(name) if event.kind == "admitted" else None)
    return order


def prepared(jobs: dict[str, ServedJob]) -> None:
    eventually(lambda: all(job.drawing is not None for job in jobs.values()))


def test_clients_take_turns_image_by_image(gate: Gate, single: Scheduler) -> None:
    jobs = {f"ann {n}": single.submit("cat", client="ann", **PLAIN) for n in range(2)}
    jobs["ann 3 4"] = single.submit("cat", client="ann", num_images=2, **PLAIN)
    jobs |= {f"bob {n}": single.submit("cat", client="bob", **PLAIN) for n in range(2)}
    order = admissions(jobs)
    prepared(jobs)
    gate.open()
    for job in jobs.values():
        job.result(30)
    assert order == ["ann 0", "bob 0", "ann 1", "bob 1", "ann 3 4", "ann 3 4"]


def test_priority_comes_before_turns_and_a_near_deadline_before_order(gate: Gate, single: Scheduler) -> None:
    jobs = {
        "first": single.submit("cat", client="ann", **PLAIN),
        "late": single.submit("cat", client="ann", deadline=1000, **PLAIN),
        "soon": single.submit("cat", client="ann", deadline=500, **PLAIN),
        "urgent": single.submit("cat", client="zoe", priority=1, **PLAIN),
    }
    order = admissions(jobs)
    prepared(jobs)
    gate.open()
    for job in jobs.values():
        job.result(30)
    assert order == ["urgent", "soon", "late", "first"]


def test_a_job_that_is_cancelled_frees_its_place_after_the_step_it_is_in(gate: Gate) -> None:
    with Scheduler(gate.pipe, batch=1) as scheduler:
        first = scheduler.submit("cat", num_inference_steps=50, guidance_scale=1.0)
        gate.arrive()
        second = scheduler.submit("cat", seed=1, **PLAIN)
        prepared({"second": second})
        gate.let(3)
        first.cancel()
        assert len(gate.rows) == 3
        gate.let(1)  # the call that was under way; at the gate now is another
        assert first.status == "cancelled" and second.status == "admitted"
        gate.open()
        second.result(30)
        assert len(gate.rows) == 4 + 2
        with pytest.raises(JobCancelledError, match="the job was cancelled"):
            first.result()
        steps = [event.step for event in first.events() if event.kind == "step"]
        assert steps == [1, 2, 3] and [*first.events()][-1].kind == "cancelled"
        assert (scheduler.stats().cancelled, scheduler.stats().done) == (1, 1)


def test_a_place_is_taken_at_once_though_others_go_on(gate: Gate) -> None:
    """No step is made between the one in which a job was cancelled and the first one of the next job."""
    with Scheduler(gate.pipe, batch=2) as scheduler:
        first = scheduler.submit("cat", num_inference_steps=50, guidance_scale=1.0)
        gate.arrive()
        other = scheduler.submit("cat", seed=1, num_inference_steps=50, guidance_scale=1.0)
        prepared({"other": other})
        gate.let(1)
        third = scheduler.submit("cat", seed=2, **PLAIN)
        prepared({"third": third})
        first.cancel()
        gate.let(1)
        assert third.status == "admitted"
        other.cancel()
        gate.open()
        third.result(30)
    assert gate.rows == [1, 2, 2, 1]


def test_a_job_that_waits_can_be_cancelled(gate: Gate, single: Scheduler) -> None:
    job = single.submit("cat", **PLAIN)
    assert single.stats().waiting == 1
    job.cancel()
    assert single.stats().waiting == 0 and job.ended
    gate.open()
    job.cancel()  # once more does nothing
    eventually(lambda: single.stats().done == 1)
    assert single.stats().pictures == 1 and [event.kind for event in job.events()] == ["cancelled"]


def test_images_join_and_leave_between_two_steps(gate: Gate) -> None:
    with Scheduler(gate.pipe, batch=2) as scheduler:
        long = scheduler.submit("cat", num_inference_steps=6, guidance_scale=1.0)
        gate.arrive()
        short = [scheduler.submit("cat", seed=seed, **PLAIN) for seed in (1, 2)]
        prepared({str(job.submitted): job for job in short})
        gate.open()
        for job in (long, *short):
            job.result(30)
        assert gate.rows == [1, 2, 2, 2, 2, 1]
        eventually(lambda: scheduler.stats().steps == 6)
        stats = scheduler.stats()
        assert stats.pictures == 3 and stats.batch_fill == pytest.approx(10 / 12)
        assert 0 < stats.step_seconds < 30 and 0 < stats.admission_seconds[0] <= stats.admission_seconds[1]


def test_deadlines_end_what_waits_and_what_runs(gate: Gate) -> None:
    with Scheduler(gate.pipe, batch=1) as scheduler:
        running = scheduler.submit("cat", num_inference_steps=50, deadline=1000)
        gate.arrive()
        waiting = scheduler.submit("cat", deadline=0.1, **STEPS)
        running.deadline = time.monotonic()  # however long it took to come so far
        time.sleep(0.15)
        gate.open()
        for job in (running, waiting):
            with pytest.raises(DeadlineError, match=r"the job was to be done in [\d.]+ seconds"):
                job.result(30)
        assert len(gate.rows) == 1
        assert scheduler.submit("cat", **STEPS).result(30).images


def test_a_full_queue_refuses(gate: Gate, single: Scheduler) -> None:
    jobs = [single.submit("cat", **PLAIN) for _ in range(8)]
    with pytest.raises(QueueFullError, match="8 jobs wait already, which is the most that may; try again later"):
        single.submit("cat", **PLAIN)
    assert isinstance(QueueFullError(""), LatentDiffError)
    assert (single.stats().waiting, single.stats().rejected) == (8, 1)
    jobs[3].cancel()
    jobs[3] = single.submit("cat", **PLAIN)
    gate.open()
    assert all(job.result(30).images for job in jobs)


def test_what_cannot_be_drawn_is_refused_when_it_is_handed_in(pipe: Pipeline) -> None:
    with Scheduler(pipe) as scheduler:
        for options, message in (
            ({"sampler": "dimm"}, "did you mean 'ddim'"),
            ({"output_type": "pill"}, "did you mean 'pil'"),
            ({"deadline": 0}, "deadline must be"),
            ({"priority": 1.5}, "priority must be"),
            ({"preview_every": -1}, "preview_every must be"),
        ):
            with pytest.raises(InputError, match=message):
                scheduler.submit("cat", **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="batch must be"):
        Scheduler(pipe, batch=0)


def test_a_job_that_yields_nan_fails_alone(pipe: Pipeline) -> None:
    with Scheduler(pipe, batch=4) as scheduler:
        good = [scheduler.submit("cat", seed=seed, **STEPS) for seed in range(3)]
        bad = scheduler.submit("cat", latents=torch.full((1, 4, 8, 8), 1e38), **STEPS)
        assert all(job.result(30).images for job in good)
        with pytest.raises(InputError, match="the network's output became NaN or infinite"):
            bad.result(30)
        assert bad.status == "failed" and scheduler.stats().failed == 1
        assert scheduler.submit("cat", **STEPS).result(30).images


def test_without_memory_for_all_images_fewer_are_drawn_at_once(gate: Gate) -> None:
    """And only a job that does not fit alone fails."""

    def refuse(sample: Tensor) -> None:
        if sample.shape[0] * sample.shape[2] * sample.shape[3] > 2 * 64:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    gate.refuse = refuse
    with Scheduler(gate.pipe, batch=5) as scheduler:
        jobs = [scheduler.submit("cat", seed=seed, num_inference_steps=4, guidance_scale=1.0) for seed in range(4)]
        large = scheduler.submit("cat", width=64, height=64, **PLAIN)
        gate.open()
        assert all(job.result(30).images for job in jobs)
        with pytest.raises(OutOfMemoryError, match="more memory than the device has left; ask for a smaller one"):
            large.result(30)
        assert gate.rows.count(4) <= 1  # after which no more than two were tried


def test_memory_bounds_what_is_drawn_at_once(gate: Gate) -> None:
    gate.open()
    one = sampling_bytes(gate.pipe.unet, 4, 64, 64, 2)
    with Scheduler(gate.pipe, memory=one + one // 2) as scheduler:
        with pytest.raises(InputError, match=r"a picture may take \d+ MB, got one of \d+ MB; ask for a smaller one"):
            scheduler.submit("cat", width=64, height=64, **PLAIN).result(30)
        jobs = [scheduler.submit("cat", seed=seed, **PLAIN) for seed in range(3)]
        assert all(job.result(30).images for job in jobs)
    assert gate.rows == [1] * 6


def test_a_fault_in_one_job_is_its_own(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    def broken(components: Components, estimate: Tensor) -> Image.Image:
        raise ZeroDivisionError("of a preview")

    with Scheduler(pipe, preview=broken) as scheduler:
        good, bad = (scheduler.submit("cat", preview_every=every, **STEPS) for every in (0, 1))
        assert good.result(30).images
        with pytest.raises(ZeroDivisionError):
            bad.result(30)
    assert "not foreseen" in caplog.text


def test_nobody_waits_for_a_loop_that_broke(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = Scheduler(pipe)
    monkeypatch.setattr(scheduler._places, "step", lambda: 1 / 0)
    with pytest.raises(ClosedError, match="ended with ZeroDivisionError"):
        scheduler.submit("cat", **STEPS).result(30)
    with pytest.raises(ClosedError, match="takes no more jobs"):
        scheduler.submit("cat", **STEPS)
    scheduler.close()
    assert "the scheduler ended" in caplog.text


def test_close_finishes_what_was_taken(pipe: Pipeline) -> None:
    scheduler = Scheduler(pipe, batch=2)
    jobs = [scheduler.submit("cat", seed=seed, **STEPS) for seed in range(5)]
    scheduler.close()
    assert all(job.status == "done" for job in jobs)
    with pytest.raises(ClosedError, match="the scheduler is closed and takes no more jobs"):
        scheduler.submit("cat")
    scheduler.close()


def test_close_without_draining_stops_after_the_step(gate: Gate) -> None:
    scheduler = Scheduler(gate.pipe, batch=1)
    jobs = [scheduler.submit("cat", num_inference_steps=50, guidance_scale=1.0) for _ in range(3)]
    gate.arrive()
    gate.open()
    scheduler.close(drain=False)
    assert len(gate.rows) < 50
    for job in jobs:
        with pytest.raises(ClosedError, match="closed before the job was done"):
            job.result(0)


def test_events_in_order_with_the_newest_preview(pipe: Pipeline) -> None:
    with Scheduler(pipe) as scheduler:
        job = scheduler.submit("cat", num_images=2, num_inference_steps=4, preview_every=1)
        result = job.result(30)
    events = list(job.events())
    for index in range(2):
        own = [event for event in events if event.index == index]
        shown = ["admitted", "step", "step", "step", "preview", "step", "picture"]
        assert [event.kind for event in own] == shown
        assert [(event.step, event.steps) for event in own if event.kind == "step"] == [(n, 4) for n in range(1, 5)]
        (preview,) = (event.preview for event in own if event.preview is not None)
        assert preview.size == (8, 8)
        (picture,) = (event.picture for event in own if event.picture is not None)
        assert picture.image is result.images[index] and picture.seed == result.seeds[index] == index
    assert events[-1] == Event("done")
    with pytest.raises(TimeoutError):
        list(ServedJob(pipe.make_job("cat")).events(timeout=0.01))
    with pytest.raises(TimeoutError, match=r"was not done in 0\.01 seconds"):
        ServedJob(pipe.make_job("cat")).result(timeout=0.01)


def test_previews_look_like_the_picture(pipe: Pipeline) -> None:
    """At the last but one of many steps, as far as one linear map can follow this decoder."""
    with Scheduler(pipe) as scheduler:
        job = scheduler.submit("cat", num_inference_steps=20, preview_every=19)
        picture = job.result(30).images[0]
    (preview,) = (event.preview for event in job.events() if event.preview is not None)
    small = torch.tensor(list(picture.resize(preview.size, Image.Resampling.BOX).tobytes())).float()
    guess = torch.tensor(list(preview.tobytes())).float()
    assert torch.corrcoef(torch.stack([small, guess]))[0, 1] > 0.5


def test_an_event_loop_is_told_without_being_blocked(gate: Gate) -> None:
    async def draw(scheduler: Scheduler) -> tuple[list[str], int]:
        job = scheduler.submit("cat", **PLAIN)
        kinds, ticks = list[str](), 0

        async def tick() -> None:
            nonlocal ticks
            while not job.ended:
                ticks += 1
                if ticks == 5:
                    gate.open()  # the loop has gone on while the call stood at the gate
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        async for event in job.stream():
            kinds.append(event.kind)
        await ticking
        return kinds, ticks

    with Scheduler(gate.pipe) as scheduler:
        kinds, ticks = asyncio.run(draw(scheduler))
    assert kinds == ["admitted", "step", "step", "picture", "done"] and ticks >= 5


def test_a_listener_that_fails_is_let_go_of(pipe: Pipeline) -> None:
    heard = list[str]()

    def listen(event: Event) -> None:
        heard.append(event.kind)
        raise RuntimeError("the event loop is closed")

    with Scheduler(pipe) as scheduler:
        job = scheduler.submit("cat", **STEPS)
        job.listen(listen)
        assert job.result(30).images
    assert len(heard) == 1


def test_nothing_is_left_of_two_hundred_jobs(pipe: Pipeline) -> None:
    def draw(count: int) -> list[weakref.ref[ServedJob]]:
        jobs = list[ServedJob]()
        for number in range(count):
            steps: dict[str, Any] = {"num_inference_steps": 1 + number % 2, "guidance_scale": 1.0}
            jobs.append(scheduler.submit("cat", seed=number, client=str(number), **steps))
            if number % 7 == 0:
                jobs[-1].cancel()
        for job in jobs:
            assert [*job.events(60)][-1].kind in ("done", "cancelled")
        return [weakref.ref(job) for job in jobs]

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(one), Tensor) for one in gc.get_objects())

    with Scheduler(pipe, batch=4, queue=300) as scheduler:
        draw(10)
        before = tensors()
        jobs = draw(200)
        eventually(lambda: scheduler.stats().running == scheduler.stats().decoding == 0)
        eventually(lambda: gc.collect() >= 0 and all(job() is None for job in jobs))
        assert tensors() <= before
        assert scheduler.stats().waiting == 0


def test_no_text_is_encoded_twice(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, encode = list[str](), TokenStates.__call__

    def counted(self: TokenStates, texts: list[str], **options: Any) -> Any:
        encoded.extend(texts)
        return encode(self, texts, **options)

    monkeypatch.setattr(TokenStates, "__call__", counted)
    with Scheduler(pipe) as scheduler:
        for prompt in ("cat", "fox", "cat", "fox"):
            scheduler.submit(prompt, **PLAIN).result(30)
        scheduler.submit("cat", pipe=pipe.to("cpu"), **PLAIN).result(30)  # another model, for all that is known
    assert encoded == ["", "cat", "fox", "", "cat"]


def test_a_cache_of_texts_is_bounded_and_keeps_no_model(pipe: Pipeline) -> None:
    cache, other = TextCache(3), pipe.to("cpu").components
    for text in ("a", "b", "a", "c", "d"):
        cache.get(other, text, 0, True, Eager())
    assert len(cache) == 3
    kept = weakref.ref(other)
    del other
    gc.collect()
    assert kept() is None

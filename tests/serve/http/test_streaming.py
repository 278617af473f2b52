"""Pictures in the making: server-sent events as OpenAI's client reads them, and clients that leave."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from latentdiff import Pipeline
from latentdiff.errors import InputError
from tests.serve.gate import Gate, eventually
from tests.serve.http.conftest import Running, Serve
from tests.serve.http.test_generations import opened

GENERATIONS = "/v1/images/generations"
STEPS: dict[str, Any] = {"steps": 8, "guidance_scale": 1.0, "seed": 5}


def test_partial_pictures_and_then_the_picture(server: Running, pipe: Pipeline) -> None:
    with server.openai() as client:
        stream = client.images.generate(prompt="fox", stream=True, partial_images=3, extra_body=STEPS)
        events = list(stream)
    assert [event.type for event in events[-1:]] == ["image_generation.completed"]
    partial = events[:-1]
    assert {event.type for event in partial} == {"image_generation.partial_image"} and 1 <= len(partial) <= 3
    last = events[-1]
    assert last.type == "image_generation.completed"
    assert (last.size, last.quality, last.background, last.output_format) == ("32x32", "medium", "opaque", "png")
    assert last.usage.output_tokens == 64 and last.usage.total_tokens == last.usage.input_tokens + 64
    expected = pipe("fox", seed=5, num_inference_steps=8, guidance_scale=1.0).images[0]
    assert opened(last.b64_json).tobytes() == expected.tobytes()
    assert [opened(event.b64_json).size for event in events] == [(32, 32)] * len(events)


def test_partial_pictures_are_counted_from_0(gate: Gate, serve: Serve) -> None:
    server = serve(gate.pipe)
    with server.openai() as client:
        stream = client.images.generate(prompt="fox", stream=True, partial_images=3, extra_body=STEPS)
        gate.arrive()
        found = list[Any]()
        for number in range(3):  # of 8 steps every second one
            gate.let(2)
            found.append(next(iter(stream)))
            assert found[number].type == "image_generation.partial_image"
        gate.open()
        found += list(stream)
    assert [event.partial_image_index for event in found[:3]] == [0, 1, 2]
    assert [event.type for event in found[3:]] == ["image_generation.completed"]


def test_without_partial_pictures_there_is_one_event_for_each_picture(server: Running) -> None:
    async def draw() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.images.generate(prompt="fox", n=2, stream=True, extra_body=STEPS)
            return [event async for event in stream]

    events = asyncio.run(draw())
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    assert sorted(event.seed for event in events) == [5, 6]


def test_the_lines_of_an_event(server: Running) -> None:
    with server.http() as client:
        answer = client.post(GENERATIONS, json={"prompt": "fox", "stream": True, **STEPS})
    assert answer.headers["content-type"].startswith("text/event-stream")
    name, data = answer.text.removeprefix(": drawing\n\n").removesuffix("\n\n").split("\n")
    assert name == "event: image_generation.completed" and data.startswith(
        'data: {"type": "image_generation.completed"'
    )


def test_what_is_refused_before_the_first_event_has_its_status(server: Running) -> None:
    with server.openai() as client, pytest.raises(openai.BadRequestError, match="size must be"):
        client.images.generate(prompt="fox", stream=True, size="big", extra_body=STEPS)  # type: ignore[call-overload]


def test_what_fails_later_is_an_event_that_the_client_raises(gate: Gate, serve: Serve) -> None:
    def refuse(sample: object) -> None:
        if len(gate.rows) > 3:
            raise InputError("the network failed")

    gate.refuse = refuse
    gate.open()
    with serve(gate.pipe).openai() as client:
        stream = client.images.generate(prompt="fox", stream=True, partial_images=1, extra_body=STEPS)
        with pytest.raises(openai.APIError, match="the network failed"):
            list(stream)


def test_a_client_that_leaves_ends_its_job(gate: Gate, serve: Serve) -> None:
    server = serve(gate.pipe, batch=1)
    with (
        server.http(trust_env=False) as client,
        client.stream("POST", GENERATIONS, json={"stream": True, "prompt": "a"}),
    ):
        gate.arrive()
    eventually(lambda: server.server.scheduler.stats().cancelled == 1)
    gate.open()
    eventually(lambda: server.server.scheduler.stats().running == 0)
    assert len(gate.rows) < 5 and not server.server.desk.busy


def test_a_client_that_does_not_wait_for_its_answer_ends_its_job(gate: Gate, serve: Serve) -> None:
    server = serve(gate.pipe, batch=1)
    with server.openai(timeout=1.0) as client, pytest.raises(openai.APITimeoutError):
        client.images.generate(prompt="fox", extra_headers={"x-stainless-retry-count": openai.Omit()})
    eventually(lambda: server.server.scheduler.stats().cancelled == 1)
    gate.open()
    eventually(lambda: server.server.scheduler.stats().running == 0)
    assert len(gate.rows) < 5

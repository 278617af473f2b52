"""Requests that are sent again join the job they repeat; first ones never join."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import openai
import pytest

import latentdiff.serve.http.desk
from latentdiff import Pipeline
from tests.serve.gate import Gate, eventually
from tests.serve.http.conftest import Running, Serve
from tests.serve.http.test_edits import picture, png

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
BODY: dict[str, Any] = {"prompt": "fox", "steps": 2, "guidance_scale": 1.0}
FIRST, AGAIN = {"x-stainless-retry-count": "0"}, {"x-stainless-retry-count": "1"}


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs wait for a repeat longer than a busy machine takes to send it."""
    monkeypatch.setattr(latentdiff.serve.http.desk, "PATIENCE", 60)


def ask(server: Running, headers: dict[str, str], timeout: float = 30, **fields: Any) -> httpx.Response:
    with server.http() as client:
        return client.post(GENERATIONS, json={**BODY, **fields}, headers=headers, timeout=timeout)


def pictures(*answers: httpx.Response) -> list[str]:
    return [answer.json()["data"][0]["b64_json"] for answer in answers]


@pytest.mark.usefixtures("patience")
def test_the_client_repeats_by_itself_and_the_picture_is_drawn_once(gate: Gate, serve: Serve) -> None:
    server = serve(gate.pipe)
    found = list[Any]()

    def draw() -> None:
        with server.openai(timeout=1.0, max_retries=2) as client:
            found.append(client.images.generate(prompt="fox", extra_body=BODY))

    thread = threading.Thread(target=draw)
    thread.start()
    gate.arrive()
    eventually(lambda: server.server.desk._repeatable[0].waiters == 0)  # it has given up once
    eventually(lambda: server.server.desk._repeatable[0].waiters == 1)  # and asks again
    gate.open()
    thread.join(30)
    assert found[0].data and server.server.scheduler.stats().done == 1
    assert len(gate.rows) == 2


def test_a_repeat_after_the_answer_was_lost_gets_the_same_one(server: Running) -> None:
    first, again = ask(server, FIRST), ask(server, AGAIN)
    assert len(set(pictures(first, again))) == 1


def test_first_calls_never_join(server: Running) -> None:
    answers = [ask(server, headers) for headers in (FIRST, FIRST, {}, {})]
    assert len(set(pictures(*answers))) == 4


def test_a_repeat_of_another_content_does_not_join(server: Running) -> None:
    first = ask(server, FIRST, prompt="a cat")
    other = ask(server, AGAIN, prompt="a dog")
    assert len(set(pictures(first, other))) == 2


@pytest.mark.usefixtures("patience")
def test_two_repeats_join_the_two_jobs_they_repeat(gate: Gate, serve: Serve) -> None:
    server, found = serve(gate.pipe), list[httpx.Response]()
    for _ in range(2):
        with pytest.raises(httpx.ReadTimeout):
            ask(server, FIRST, timeout=0.5)
    eventually(lambda: [one.waiters for one in server.server.desk._repeatable] == [0, 0])
    threads = [threading.Thread(target=lambda: found.append(ask(server, AGAIN))) for _ in range(2)]
    for number, thread in enumerate(threads):
        thread.start()
        eventually(lambda: sum(one.waiters for one in server.server.desk._repeatable) == number + 1)  # noqa: B023
    gate.open()
    for thread in threads:
        thread.join(30)
    assert len(set(pictures(*found))) == 2 and server.server.scheduler.stats().done == 2


def test_a_job_that_nobody_asks_for_again_is_cancelled(
    gate: Gate, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latentdiff.serve.http.desk, "PATIENCE", 0.2)
    server = serve(gate.pipe)
    with pytest.raises(httpx.ReadTimeout):
        ask(server, FIRST, timeout=0.5)
    eventually(lambda: server.server.scheduler.stats().cancelled == 1)
    gate.open()
    assert ask(server, AGAIN).status_code == 200  # too late to join, so it is drawn anew


def test_a_key_joins_and_belongs_to_one_content(server: Running) -> None:
    key = {"idempotency-key": "first"}
    first, again, other = ask(server, key), ask(server, key), ask(server, {"idempotency-key": "two"})
    assert pictures(first) == pictures(again) != pictures(other)
    wrong = ask(server, key, prompt="another")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (409, "idempotency_key_reused")
    assert wrong.headers["x-should-retry"] == "false"


def test_forms_join_by_their_content(server: Running) -> None:
    def edit(headers: dict[str, str], colour: str) -> httpx.Response:
        with server.http() as client:
            return client.post(EDITS, data=BODY, files={"image": png(picture(colour))}, headers=headers)

    answers = [edit(FIRST, "red"), edit(AGAIN, "red"), edit(AGAIN, "blue")]
    first, again, other = pictures(*answers)
    assert first == again != other


def test_what_failed_is_not_joined(pipe: Pipeline, serve: Serve) -> None:
    server = serve(pipe)
    for headers in (FIRST, AGAIN):
        assert ask(server, headers, size="1000x1000").status_code == 400
    assert not server.server.desk.busy and not server.server.desk._repeatable


def test_repeating_is_said_to_be_useless_where_it_is(gate: Gate, serve: Serve) -> None:
    calls = 0

    def refuse(sample: object) -> None:
        nonlocal calls
        calls += 1
        raise RuntimeError("a fault")

    gate.refuse = refuse
    gate.open()
    with serve(gate.pipe).openai(max_retries=2) as client, pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(prompt="fox", extra_body=BODY)
    assert calls == 1 and caught.value.code == "internal_error" and "a fault" not in str(caught.value)

"""Two servers that share answers through Redis: a key is answered once, and a job that has ended is known to both."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from latentdiff import Pipeline
from latentdiff.cli import main
from tests.needs import needing
from tests.serve.gate import Gate, eventually
from tests.serve.http.conftest import NEEDED, Running, Serve
from tests.serve.http.test_edits import picture, png

pytest_pycollect_makemodule = needing((*NEEDED, "redis", "fakeredis"))

GENERATIONS, JOBS = "/v1/images/generations", "/v1/jobs"
BODY: dict[str, Any] = {"prompt": "fox", "steps": 2, "guidance_scale": 1.0}
KEY = {"idempotency-key": "one"}


def draws(*servers: Running) -> list[int]:
    """Return how many jobs each server has drawn."""
    return [server.server.scheduler.stats().done for server in servers]


def post(server: Running, path: str = GENERATIONS, headers: dict[str, str] = KEY, **more: Any) -> httpx.Response:
    with server.http() as client:
        return client.post(path, headers=headers, **({"json": BODY} | more))


def test_a_key_is_answered_once(pipe: Pipeline, serve: Serve, redis: str) -> None:
    one, two = (serve(pipe, name=name, redis=redis) for name in ("a", "b"))
    first, again = post(one), post(two)
    assert (first.status_code, first.json()) == (again.status_code, again.json()) and again.status_code == 200
    assert again.headers["content-type"] == "application/json" and "x-request-id" in again.headers
    assert draws(one, two) == [1, 0]
    other = post(two, json=BODY | {"prompt": "owl"})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    assert post(two, headers={}).status_code == 200 and draws(one, two) == [1, 1]


def test_a_form_is_the_same_whatever_marks_its_parts(pipe: Pipeline, serve: Serve, redis: str) -> None:
    one, two = (serve(pipe, name=name, redis=redis) for name in ("a", "b"))
    form = {"json": None, "data": {"prompt": "fox", "steps": "2"}, "files": {"image": ("a.png", png(picture()))}}
    answers = [post(server, "/v1/images/edits", **form) for server in (one, two)]
    assert answers[0].request.headers["content-type"] != answers[1].request.headers["content-type"]
    assert answers[0].json() == answers[1].json() and answers[1].status_code == 200
    assert draws(one, two) == [1, 0]


def test_a_repeat_waits_for_the_server_that_is_drawing(gate: Gate, pipe: Pipeline, serve: Serve, redis: str) -> None:
    slow, other = serve(gate.pipe, name="a", redis=redis), serve(pipe, name="b", redis=redis)
    with ThreadPoolExecutor() as threads:
        asked = [threads.submit(post, slow)]
        gate.arrive()
        asked += [threads.submit(post, server) for server in (other, slow)]
        eventually(lambda: slow.server.desk._repeatable[0].waiters == 2)
        gate.open()
        answers = [one.result() for one in asked]
    assert len({answer.json()["data"][0]["b64_json"] for answer in answers}) == 1
    assert draws(slow, other) == [1, 0]


def test_what_failed_is_tried_anew(gate: Gate, pipe: Pipeline, serve: Serve, redis: str) -> None:
    def refuse(sample: Any) -> None:
        raise RuntimeError("out of order")

    gate.refuse = refuse
    gate.open()
    broken, sound = serve(gate.pipe, name="a", redis=redis), serve(pipe, name="b", redis=redis)
    assert post(broken).status_code == 500
    assert "event: error" in post(broken, json=BODY | {"stream": True, "partial_images": 1}).text
    assert post(sound).status_code == 200
    assert post(broken).status_code == 200  # as the other has drawn it
    assert draws(broken, sound) == [0, 1]


def test_a_client_that_waits_and_goes_leaves_nothing(
    gate: Gate, pipe: Pipeline, serve: Serve, redis: str, caplog: pytest.LogCaptureFixture
) -> None:
    slow, other = serve(gate.pipe, name="a", redis=redis), serve(pipe, name="b", redis=redis)
    with ThreadPoolExecutor() as threads:
        drawing = threads.submit(post, slow)
        gate.arrive()
        with other.http() as client, pytest.raises(httpx.ReadTimeout):
            client.post(GENERATIONS, json=BODY, headers=KEY, timeout=0.5)
        eventually(lambda: other.server.server_state.connections == set())
        gate.open()
        assert drawing.result().status_code == 200
    assert draws(slow, other) == [1, 0] and not caplog.records


def test_a_server_that_is_gone_is_not_waited_for(pipe: Pipeline, serve: Serve, redis: str) -> None:
    from redis import Redis

    from latentdiff.serve.http.shared import PREFIX, Answer

    one, two = (serve(pipe, name=name, redis=redis) for name in ("a", "b"))
    post(one)
    with Redis.from_url(redis) as client:
        (name,) = client.keys(f"{PREFIX}key:*")
        eventually(lambda: not Answer.unpacked(client.get(name)).server)
        digest = Answer.unpacked(client.get(name)).digest
        client.set(name, Answer(digest, "a server that was killed").packed(), ex=1)
        assert post(two).status_code == 200
        eventually(lambda: not Answer.unpacked(client.get(name)).server)
    assert draws(one, two) == [1, 1]


def test_a_stream_is_told_again(pipe: Pipeline, serve: Serve, redis: str) -> None:
    one, two = (serve(pipe, name=name, redis=redis) for name in ("a", "b"))
    first, again = (post(server, json=BODY | {"stream": True}) for server in (one, two))
    assert first.text == again.text and "image_generation.completed" in again.text
    assert again.headers["content-type"].startswith("text/event-stream")
    assert draws(one, two) == [1, 0]


def test_a_job_that_has_ended_is_known_to_all(pipe: Pipeline, serve: Serve, redis: str) -> None:
    one, two = (serve(pipe, name=name, redis=redis) for name in ("a", "b"))
    place = post(one, JOBS, {}, json=BODY | {"n": 2}).headers["location"]
    with two.http() as client, one.http() as home:
        eventually(lambda: client.get(place).status_code == 200)
        assert not one.server.shelf.untold and not one.server.service.busy  # as any server tells of it
        assert client.get(place).json() == home.get(place).json()
        assert client.get(place).json()["status"] == "done"
        for index in range(2):
            path = f"{place}/images/{index}"
            assert client.get(path).content == home.get(path).content
        assert client.get(f"{place}/images/2").status_code == 404
        told = client.get(f"{place}/events").text
        assert told == home.get(f"{place}/events").text and "event: done" in told
        last = told.count("id: ") - 1
        rest = client.get(f"{place}/events", headers={"last-event-id": str(last)}).text
        assert rest.count("id: ") == 1 and "event: done" in rest
        assert client.get(f"{place}/events", params={"after": last}).text == rest
        assert home.delete(place).status_code == 200
        assert [asked.get(place).status_code for asked in (client, home)] == [404, 404]


def test_a_job_can_be_forgotten_at_another_server(pipe: Pipeline, serve: Serve, redis: str) -> None:
    one, two = (serve(pipe, name=name, redis=redis) for name in ("a", "b"))
    place = post(one, JOBS, {}).headers["location"]
    with two.http() as client:
        eventually(lambda: client.get(place).status_code == 200)
        one.server.should_exit = True
        eventually(lambda: one.server.desk.draining)
        assert client.delete(place).json()["status"] == "done"
        assert client.get(place).status_code == client.get(f"{place}/images/0").status_code == 404


def test_without_redis_each_server_works_on_alone(
    pipe: Pipeline, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(pipe, name="a", redis="redis://127.0.0.1:9/0")
    answers = [post(server) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200] and draws(server) == [1]
    place = post(server, JOBS, {}).headers["location"]
    with server.http() as client:
        eventually(lambda: client.get(place).json()["status"] == "done")
        assert server.server.shelf.untold  # its pictures are nowhere else
        assert client.get(f"{place}/images/0").status_code == 200
    assert "Redis does not answer" in caplog.text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--redis", "redis://127.0.0.1:9/0", "--name", "a"], "no Redis answers at 127.0.0.1:9"),
        (["--redis", "redis://:secret@127.0.0.1:9/0", "--name", "a"], "no Redis answers at 127.0.0.1:9"),
        (["--redis", "localhost", "--name", "a"], "--redis must be a URL of Redis"),
        (["--redis", "redis://localhost"], "add --name a"),
        (["--redis", "redis://localhost", "--replicas", "2"], "leave it or --replicas out"),
    ],
)
def test_what_cannot_be_used_is_refused(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *options]) == 2
    said = capsys.readouterr().err
    assert says in said and "secret" not in said

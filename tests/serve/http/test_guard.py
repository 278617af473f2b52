"""Who may ask, and how much: tokens, hosts, pages of other servers, and every limit of the table."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from latentdiff import Pipeline
from latentdiff.errors import InputError
from latentdiff.serve.http.guard import check_proxies, check_token
from latentdiff.serve.http.limits import Limits
from tests.serve.gate import Gate, eventually
from tests.serve.http.conftest import Running, Serve

TOKEN = "a-token-of-sixteen-and-more"
STEPS: dict[str, Any] = {"prompt": "fox", "steps": 2, "guidance_scale": 1.0}
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


def png(width: int = 32, height: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


def test_a_token_is_asked_for_where_there_is_one(pipe: Pipeline, serve: Serve) -> None:
    server = serve(pipe, token=TOKEN)
    with server.openai(api_key=TOKEN) as client:
        assert client.images.generate(prompt="fox", extra_body={"steps": 1}).data
    for wrong in ("none", TOKEN[:-1], TOKEN + "x", "\u00e9" * 20):
        with server.http(headers={b"authorization": b"Bearer " + wrong.encode()}) as plain:
            answer = plain.post(GENERATIONS, json=STEPS)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    with server.openai() as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with server.http() as plain:
        statuses = {path: plain.get(path).status_code for path in ("/healthz", "/readyz", "/metrics", "/openapi.json")}
    assert statuses == {"/healthz": 200, "/readyz": 200, "/metrics": 401, "/openapi.json": 401}


def test_an_address_that_others_reach_needs_a_token() -> None:
    for host in ("0.0.0.0", "192.168.1.4", "::", "example.org"):
        with pytest.raises(InputError, match="needs a token"):
            check_token(None, host)
        check_token(TOKEN, host)
    for host in ("127.0.0.1", "127.0.0.5", "::1", "localhost"):
        check_token(None, host)
    for token in ("", "short", "with a space in its middle", "\u00e9" * 20):
        with pytest.raises(InputError, match="16 to 512 printable"):
            check_token(token, "127.0.0.1")


def test_a_proxy_is_an_address_and_needs_a_token() -> None:
    for proxy in ("127.0.0.1", "10.0.0.0/24", "::1", "fd00::/8"):
        check_proxies([proxy])
        with pytest.raises(InputError, match="needs a token, got a proxy"):
            check_token(None, "127.0.0.1", [proxy])
    for proxy in ("*", "", "nginx", "10.0.0.1/24", "0.0.0.0/0", "::/0", "127.0.0.1,10.0.0.1"):
        with pytest.raises(InputError, match="a proxy must be an address"):
            check_proxies(["127.0.0.1", proxy])


# what a server takes for proxies, what comes from 127.0.0.1, and whom it takes for the client
SAID = {
    "nobody is believed unless told": ((), "203.0.113.9", "127.0.0.1"),
    "another is not believed": (("127.0.0.2", "10.0.0.0/8"), "203.0.113.9", "127.0.0.1"),
    "a proxy is": (("127.0.0.1",), "203.0.113.9", "203.0.113.9"),
    "a network of proxies is": (("127.0.0.0/24",), "203.0.113.9", "203.0.113.9"),
    "what a client wrote before it is not": (("127.0.0.1",), "198.51.100.1, 203.0.113.9", "203.0.113.9"),
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_said_of_a_client(pipe: Pipeline, serve: Serve, name: str) -> None:
    proxies, said, client = SAID[name]
    server = serve(pipe, token=TOKEN, proxies=proxies)
    clients, submit = list[str](), server.server.scheduler.submit

    def submitted(*given: Any, **options: Any) -> Any:
        clients.append(options["client"])
        return submit(*given, **options)

    server.server.scheduler.submit = submitted  # type: ignore[method-assign]
    headers = {"authorization": f"Bearer {TOKEN}", "x-forwarded-for": said, "x-forwarded-proto": "https"}
    headers |= {"host": "pictures.example"} if proxies else {}
    with server.http(headers=headers) as plain:
        link = plain.post(GENERATIONS, json=STEPS | {"response_format": "url"}).json()["data"][0]["url"]
    assert clients == [client]
    believed = client != "127.0.0.1"
    assert link.startswith("https://pictures.example/" if believed else "http://")


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},  # whose name was made to point here
        {"host": "evil.example:8000"},
        {"host": "localhost.evil.example"},
        {"host": ""},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_no_page_of_another_server_can_use_it(server: Running, headers: dict[str, str]) -> None:
    with server.http() as client:
        for answer in (
            client.get("/v1/models", headers=headers),
            client.post(GENERATIONS, json=STEPS, headers=headers),
        ):
            assert answer.status_code == 403 and answer.json()["error"]["type"] == "permission_error"
            assert "access-control-allow-origin" not in answer.headers


def test_its_own_pages_can_use_it(server: Running) -> None:
    port = server.url.rpartition(":")[2]
    with server.http() as client:
        for host in ("localhost", "127.0.0.1", "[::1]"):
            own = {"host": f"{host}:{port}", "origin": f"http://{host}:{port}", "sec-fetch-site": "same-origin"}
            assert client.get("/v1/models", headers=own).status_code == 200


def test_every_answer_has_a_number(server: Running) -> None:
    with server.http() as client:
        answers = [
            client.get("/healthz"),
            client.get("/none"),
            client.get("/healthz", headers={"host": "evil.example"}),
        ]
    numbers = {answer.headers["x-request-id"] for answer in answers}
    assert len(numbers) == 3 and all(number.startswith("req_") for number in numbers)


def many(count: int) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("image[]", ("a.png", png(), "image/png"))] * count


# limit -> its value, what asks for too much, and the field that is named
Ask = Callable[[httpx.Client], httpx.Response]
TOO_MUCH: dict[str, tuple[int, Ask, str | None]] = {
    "json_bytes": (1000, lambda c: c.post(GENERATIONS, json={"prompt": "x" * 1000}), None),
    "upload_bytes": (100, lambda c: c.post(EDITS, data=STEPS, files=many(1)), None),
    "image_bytes": (50, lambda c: c.post(EDITS, data=STEPS, files=many(1)), "image"),
    "image_pixels": (1023, lambda c: c.post(EDITS, data=STEPS, files=many(1)), "image"),
    "images": (1, lambda c: c.post(EDITS, data=STEPS, files=many(2)), "image"),
    "pixels": (1023, lambda c: c.post(GENERATIONS, json=STEPS), "size"),
    "steps": (5, lambda c: c.post(GENERATIONS, json={**STEPS, "steps": 3, "resampling": 2}), "steps"),
    "n": (2, lambda c: c.post(GENERATIONS, json={**STEPS, "n": 3}), "n"),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_too_much_is_refused(pipe: Pipeline, serve: Serve, name: str) -> None:
    most, ask, param = TOO_MUCH[name]
    status = next(item.metadata["status"] for item in fields(Limits) if item.name == name)
    with serve(pipe, limits=Limits(**{name: most})).http() as client:
        answer = ask(client)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, f"limit_{name}", param)


def test_a_body_of_unknown_length_is_counted(pipe: Pipeline, serve: Serve) -> None:
    with serve(pipe, limits=Limits(json_bytes=1000)).http() as client:
        chunks = (b" " * 100 for _ in range(20))
        answer = client.post(GENERATIONS, content=chunks, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "limit_json_bytes")


def test_a_body_that_does_not_come(pipe: Pipeline, serve: Serve) -> None:
    server = serve(pipe, limits=Limits(body_seconds=1))
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10) as opened:
        head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        opened.sendall((head + "Content-Length: 10\r\n\r\n{").encode())
        answer = opened.recv(10_000).decode()
    assert answer.startswith("HTTP/1.1 408") and "x-should-retry: true" in answer


def ask_beside(server: Running) -> threading.Thread:
    """Ask for a picture in a thread of its own."""

    def ask() -> None:
        with server.http() as client:
            client.post(GENERATIONS, json=STEPS)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("limits", "status", "code"),
    [
        (Limits(queue=1), 429, "queue_full"),
        (Limits(requests=2), 503, "limit_requests"),
        (Limits(client_jobs=2), 429, "limit_client_jobs"),
    ],
)
def test_a_full_queue_and_too_many_jobs_of_a_client(
    gate: Gate, serve: Serve, limits: Limits, status: int, code: str
) -> None:
    server = serve(gate.pipe, batch=1, limits=limits)
    asking = [ask_beside(server)]
    gate.arrive()
    asking.append(ask_beside(server))
    eventually(lambda: server.server.scheduler.stats().waiting == 1)
    with server.http() as client:
        refusal = client.post(GENERATIONS, json=STEPS)
        gate.open()
        for one in asking:
            one.join(30)
        eventually(lambda: not server.server.desk.busy)
        assert client.post(GENERATIONS, json=STEPS).status_code == 200
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (status, code)
    assert int(refusal.headers["retry-after"]) >= 1 and refusal.headers["x-should-retry"] == "true"


def test_a_job_that_takes_too_long(gate: Gate, serve: Serve) -> None:
    server = serve(gate.pipe, limits=Limits(seconds=1))

    def open_late() -> None:
        gate.arrive()
        time.sleep(1.2)
        gate.open()

    opener = threading.Thread(target=open_late)
    opener.start()
    with server.http() as client:
        answer = client.post(GENERATIONS, json=STEPS)
    opener.join()
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "time_limit")
    assert answer.headers["x-should-retry"] == "false"


ELSEWHERE = {"requests", "queue", "client_jobs", "body_seconds", "seconds"}  # above
ELSEWHERE |= {"drain_seconds"}  # test_drain
ELSEWHERE |= {"link_seconds", "link_bytes"}  # test_links
ELSEWHERE |= {"lora_sets"}  # test_loras
ELSEWHERE |= {"job_seconds", "job_bytes", "kept_jobs"}  # test_jobs


def test_every_limit_has_a_test_and_is_documented() -> None:
    assert {item.name for item in fields(Limits)} == set(TOO_MUCH) | ELSEWHERE
    documented = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
    for item in fields(Limits):
        row = f"| `{item.name}` | {item.default:,} | {item.metadata['says']} | {item.metadata['status']} |"
        assert row in documented, row

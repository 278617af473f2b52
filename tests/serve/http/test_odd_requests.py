"""Requests that no client should send get an answer of 4xx, never one of 5xx."""

from __future__ import annotations

import base64
import http.client
from typing import Any
from urllib.parse import urlsplit

import pytest

from latentdiff.serve.http.jobs.orders import JobRequest
from latentdiff.serve.http.openai.fields import GenerationRequest
from latentdiff.serve.http.webui.fields import Extra, Img2Img
from tests.serve.http.conftest import Running
from tests.serve.http.test_edits import picture, png

BODY: dict[str, Any] = {"prompt": "fox", "steps": 1}
LARGE = 10**400  # beyond every float


def status(server: Running, method: str, path: str, headers: dict[str, str]) -> int:
    """Send a request that better clients refuse to send."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    connection.putrequest(method, path, skip_host="host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.headers["x-request-id"]
    connection.close()
    return answer.status


@pytest.mark.parametrize("host", ["[", "[::1", "]", "a[b", "127.0.0.1\u00bd", ""])
def test_hosts_that_are_none(server: Running, host: str) -> None:
    assert status(server, "GET", "/v1/models", {"host": host}) in (400, 403)


@pytest.mark.parametrize("origin", ["[", "http://[", "http://[::1", "http://a]"])
def test_origins_that_are_none(server: Running, origin: str) -> None:
    assert status(server, "GET", "/v1/models", {"origin": origin}) == 403


@pytest.mark.parametrize("path", ["[", "]/v1", "*", "/[", "//[", "/v1/models/[", "/%5B"])
def test_paths_that_are_none(server: Running, path: str) -> None:
    assert path.startswith("/") or server.server  # as the proxy of a cluster answers others by itself
    assert status(server, "GET", path, {}) == 404


@pytest.mark.parametrize("charset", ["undefined", "idna", "hex", "none", "utf-16", "utf-8"])
def test_charsets_of_forms(server: Running, charset: str) -> None:
    kind = f"multipart/form-data; boundary=edge; charset={charset}"
    part = b'--edge\r\ncontent-disposition: form-data; name="prompt"\r\n\r\nf\xff..x\r\n--edge--\r\n'
    with server.http() as client:
        answers = [
            client.post(f"/v1/images/{door}", content=part, headers={"content-type": kind})
            for door in ("edits", "variations")  # which both have no picture
        ]
    assert [answer.status_code for answer in answers] == [400, 400]


DOORS = {
    "/v1/images/generations": (GenerationRequest, BODY),
    "/v1/jobs": (JobRequest, {**BODY, "image": base64.b64encode(png(picture())).decode()}),
    "/sdapi/v1/img2img": (Img2Img, {**BODY, "init_images": [base64.b64encode(png(picture())).decode()]}),
    "/sdapi/v1/txt2img": (Img2Img, {**BODY, "enable_hr": True}),
    "/sdapi/v1/extra-single-image": (Extra, {"image": base64.b64encode(png(picture())).decode(), "resize_mode": 1}),
}


@pytest.mark.parametrize("door", DOORS)
def test_numbers_without_end(server: Running, door: str) -> None:
    """In every field of every door, alone and in lists."""
    fields, body = DOORS[door]
    found = dict[str, tuple[int, str]]()
    with server.http() as client:
        for name in fields.model_fields:
            for value in (LARGE, -LARGE, 1e300, -1e300, [LARGE] * 4, {"left": LARGE}):
                answer = client.post(door, json={**body, name: value})
                if answer.status_code >= 500:
                    found[f"{name}={str(value)[:12]}"] = answer.status_code, answer.text
    assert not found

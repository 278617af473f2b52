"""Links to pictures: signed, good for some time, and for nothing else."""

from __future__ import annotations

import time
from urllib.parse import parse_qs, urlsplit

import pytest

import latentdiff.serve.http.links
from latentdiff import Pipeline
from latentdiff.serve.http.errors import ApiError
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.links import Links
from tests.serve.http.conftest import Serve

BODY = {"prompt": "fox", "steps": 2, "guidance_scale": 1.0, "response_format": "url"}
TOKEN = "a-token-of-sixteen-and-more"


def test_a_link_is_the_picture_without_a_token(pipe: Pipeline, serve: Serve) -> None:
    server = serve(pipe, token=TOKEN)
    with server.openai(api_key=TOKEN) as client:
        answer = client.images.generate(
            prompt="fox", response_format="url", output_format="webp", extra_body={"steps": 2}
        )
    assert answer.data is not None and answer.data[0].url is not None and answer.data[0].b64_json is None
    url = answer.data[0].url
    assert url.startswith(server.url)
    with server.http() as plain:
        found = plain.get(url, headers={"sec-fetch-site": "cross-site"})
        assert found.status_code == 200 and found.headers["content-type"] == "image/webp"
        assert found.content[8:12] == b"WEBP"
        for wrong in (
            url[:-1] + ("0" if url[-1] != "0" else "1"),
            url.replace("expires=1", "expires=2"),
            url.split("?")[0],
        ):
            assert plain.get(wrong).status_code == 403
        assert plain.get(url, headers={"host": "evil.example"}).status_code == 403


def find(links: Links, path: str) -> bytes:
    parts = urlsplit(path)
    query = parse_qs(parts.query)
    return links.find(parts.path.rpartition("/")[2], query["expires"][0], query["signature"][0]).data


def test_links_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    links, now = Links(Limits(link_seconds=60)), time.time()
    path = links.add(b"fox", "png")
    assert find(links, path) == b"fox"
    monkeypatch.setattr(latentdiff.serve.http.links.time, "time", lambda: now + 62)
    with pytest.raises(ApiError, match="expired") as caught:
        find(links, path)
    assert (caught.value.status, caught.value.code) == (410, "limit_link_seconds")
    links.add(b"cat", "png")
    assert len(links._kept) == 1


def test_the_oldest_make_room() -> None:
    links = Links(Limits(link_bytes=100))
    paths = [links.add(bytes(60), "png") for _ in range(2)]
    assert find(links, paths[1]) == bytes(60)
    with pytest.raises(ApiError, match="made room") as caught:
        find(links, paths[0])
    assert (caught.value.status, caught.value.code) == (404, "limit_link_bytes")


def test_links_of_another_process_are_not_its_own() -> None:
    path = Links(Limits()).add(b"fox", "png")
    with pytest.raises(ApiError, match="not one of this server"):
        find(Links(Limits()), path)

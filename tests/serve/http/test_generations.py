"""Pictures of prompts, asked for with OpenAI's own client over a real socket."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from typing import Any

import httpx
import openai
import pytest
from openai.types import image_generate_params
from PIL import Image

from latentdiff import Pipeline
from latentdiff.generation.result import METADATA_KEY
from latentdiff.marks import GENERATED, source_type_of
from latentdiff.serve.http.fields import IGNORED, GenerationRequest
from tests.serve.http.conftest import Running

STEPS: dict[str, Any] = {"steps": 2, "guidance_scale": 1.0}


def opened(b64: str | None) -> Image.Image:
    assert b64 is not None
    image = Image.open(io.BytesIO(base64.b64decode(b64)))
    image.load()
    return image


def post(server: Running, **fields: Any) -> httpx.Response:
    with server.http() as client:
        body = json.dumps({"prompt": "fox", **STEPS, **fields})  # which httpx refuses to make of half a character
        return client.post("/v1/images/generations", content=body, headers={"content-type": "application/json"})


def refused(server: Running, **fields: Any) -> tuple[int, dict[str, Any]]:
    answer = post(server, **fields)
    return answer.status_code, answer.json()["error"]


def test_the_picture_is_that_of_the_pipeline(server: Running, pipe: Pipeline) -> None:
    with server.openai() as client:
        answer = client.images.generate(prompt="a red fox", extra_body={"seed": 7, **STEPS})
    assert answer.data is not None and len(answer.data) == 1
    picture = opened(answer.data[0].b64_json)
    expected = pipe("a red fox", seed=7, num_inference_steps=2, guidance_scale=1.0, batch_size=1).images[0]
    assert picture.format == "PNG" and picture.tobytes() == expected.tobytes()
    record = json.loads(picture.info[METADATA_KEY])
    assert (record["prompt"], record["seed"], record["num_inference_steps"]) == ("a red fox", 7, 2)
    assert source_type_of(picture) == GENERATED
    assert (answer.size, answer.quality, answer.background, answer.output_format) == (
        "32x32",
        "medium",
        "opaque",
        "png",
    )
    assert answer.usage is not None
    assert (answer.usage.output_tokens, answer.usage.input_tokens_details.image_tokens) == (64, 0)
    assert answer.usage.total_tokens == answer.usage.input_tokens + 64


def test_pictures_without_a_seed_differ_and_say_theirs(server: Running) -> None:
    first, second = (post(server, n=2).json()["data"] for _ in range(2))
    assert len({one["b64_json"] for one in first + second}) == 4
    assert first[1]["seed"] == first[0]["seed"] + 1
    assert post(server, seed=first[1]["seed"]).json()["data"][0]["b64_json"] == first[1]["b64_json"]


def test_the_asynchronous_client(server: Running) -> None:
    async def draw() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.images.generate(prompt="fox", extra_body={"seed": n, **STEPS}) for n in range(3))
            )
        return [answer.data[0].b64_json for answer in answers if answer.data is not None]

    assert len(set(asyncio.run(draw()))) == 3


@pytest.mark.parametrize(("form", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(server: Running, form: str, kind: str) -> None:
    answer = post(server, output_format=form, output_compression=50)
    assert opened(answer.json()["data"][0]["b64_json"]).format == kind
    assert ("output_compression" in answer.headers.get("x-latentdiff-ignored", "")) == (form == "png")


def test_compression_makes_files_smaller(server: Running) -> None:
    sizes = [
        len(post(server, seed=1, output_format="jpeg", output_compression=quality).json()["data"][0]["b64_json"])
        for quality in (5, 100)
    ]
    assert sizes[0] < sizes[1]


def test_quality_is_steps(server: Running) -> None:
    def steps(**fields: Any) -> int:
        with server.http() as client:
            answer = client.post("/v1/images/generations", json={"prompt": "fox", "guidance_scale": 1, **fields})
        return json.loads(opened(answer.json()["data"][0]["b64_json"]).info[METADATA_KEY])["num_inference_steps"]

    assert [steps(quality=quality) for quality in ("low", "medium", "auto", "high")] == [12, 25, 25, 50]
    assert steps(quality="hd", steps=3) == 3


@pytest.mark.parametrize("model", ["gpt-image-1", "dall-e-3", "gpt-image-2.5-flare", "chatgpt-image-latest"])
def test_names_that_clients_hardcode_stand_for_the_first_model(server: Running, model: str) -> None:
    answer = post(server, model=model)
    assert answer.json()["model"] == "tiny" and answer.headers["x-latentdiff-mapped"] == f"model={model}->tiny"


def test_a_model_that_is_not_served(server: Running) -> None:
    for name in ("tinny", "/etc/passwd", "owner/name", "../tiny"):
        status, error = refused(server, model=name)
        assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


def test_models(server: Running) -> None:
    with server.openai() as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").object == "model"
        assert client.models.retrieve("gpt-image-1").id == "gpt-image-1"
        with pytest.raises(openai.NotFoundError, match="'big' is not served here"):
            client.models.retrieve("big")


def test_sizes(server: Running) -> None:
    assert opened(post(server, size="48x32").json()["data"][0]["b64_json"]).size == (48, 32)
    assert opened(post(server, size="auto").json()["data"][0]["b64_json"]).size == (32, 32)
    answer = post(server, size="1536x1024")  # which clients send, and this model cannot draw
    assert answer.json()["size"] == "40x24" and answer.headers["x-latentdiff-mapped"] == "size=1536x1024->40x24"
    for size in ("1000x1000", "33x32", "big", "-8x8", "0x0"):
        status, error = refused(server, size=size)
        assert (status, error["param"], error["type"]) == (400, "size", "invalid_request_error")


def test_what_means_nothing_here_is_taken_and_named(server: Running) -> None:
    answer = post(server, moderation="low", style="vivid", user="ann", background="transparent")
    assert answer.status_code == 200
    assert answer.headers["x-latentdiff-ignored"] == "moderation, style, user, background"
    assert answer.json()["background"] == "opaque"


def test_every_field_of_the_client_is_taken() -> None:
    names = set(image_generate_params.ImageGenerateParamsBase.__annotations__) | {"stream"}
    assert names <= set(GenerationRequest.model_fields) | IGNORED


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown": ({"guidance_skale": 3}, "guidance_skale", "did you mean 'guidance_scale'"),
    "steps": ({"steps": 0}, "steps", "num_inference_steps must be a whole number from 1"),
    "steps in words": ({"steps": "many"}, "steps", "got 'many'"),
    "NaN": ({"guidance_scale": "nan"}, "guidance_scale", "must be a finite number"),
    "sampler": ({"sampler": "eular"}, "sampler", "did you mean 'euler'"),
    "n": ({"n": 0}, "n", "greater than or equal to 1"),
    "format": ({"output_format": "gif"}, "output_format", "got 'gif'"),
    "transparent JPEG": ({"output_format": "jpeg", "background": "transparent"}, "background", "no transparency"),
    "prompt": ({"prompt": 3}, "prompt", "valid string"),
    "NUL": ({"prompt": "a\0b"}, "prompt", "NUL"),
    "half a character": ({"p\ud800": 1}, "p\\ud800", "there is no field"),
    "prompt of half a character": ({"prompt": "\ud800"}, "prompt", "prompt"),
    "null prompt": ({"prompt": None}, "prompt", "which may be empty"),
    "no image": ({"strength": 0.5}, "strength", "got no image"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals_name_the_field(server: Running, name: str) -> None:
    fields, param, says = BAD[name]
    status, error = refused(server, **fields)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert says in error["message"] and set(error) == {"message", "type", "param", "code"}


def test_errors_are_those_of_the_client(server: Running) -> None:
    with server.openai() as client, pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="fox", size="7x7")
    assert caught.value.param == "size" and caught.value.request_id is not None
    assert caught.value.request_id.startswith("req_")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"fox"', b"\xff", b"[" * 10**5])
def test_bodies_that_are_no_object(server: Running, body: bytes) -> None:
    with server.http() as client:
        answer = client.post("/v1/images/generations", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


def test_routes_and_types_that_are_not_there(server: Running) -> None:
    with server.http() as client:
        assert client.get("/v1/nothing").json()["error"]["code"] == "no_such_route"
        assert client.get("/v1/images/generations").status_code == 405
        answer = client.post("/v1/images/generations", content=b"{}", headers={"content-type": "text/plain"})
        assert answer.status_code == 415

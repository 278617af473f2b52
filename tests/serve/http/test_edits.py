"""Pictures of pictures: edits with and without masks, and variations."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import openai
import pytest
from openai.types import image_create_variation_params, image_edit_params
from PIL import Image, PngImagePlugin

from latentdiff import Pipeline
from latentdiff.generation.result import METADATA_KEY
from latentdiff.serve.http.app import UPLOADS
from latentdiff.serve.http.fields import IGNORED, GenerationRequest
from tests.serve.http.conftest import Running
from tests.serve.http.test_generations import opened

STEPS: dict[str, Any] = {"steps": 4, "guidance_scale": 1.0, "seed": 3}
EDITS, VARIATIONS = "/v1/images/edits", "/v1/images/variations"


def picture(colour: str = "red", size: tuple[int, int] = (32, 32)) -> Image.Image:
    image = Image.new("RGBA", size, colour)
    image.paste((0, 0, 255, 255), (0, 0, size[0] // 2, size[1] // 2))
    return image


def erased(image: Image.Image) -> Image.Image:
    """Return a picture whose right half is transparent."""
    clear = image.copy()
    clear.paste((0, 0, 0, 0), (image.width // 2, 0, image.width, image.height))
    return clear


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def refused(server: Running, files: Any, path: str = EDITS, **fields: Any) -> tuple[int, dict[str, Any]]:
    with server.http() as client:
        answer = client.post(path, data={"prompt": "fox", **fields}, files=files)
    return answer.status_code, answer.json()["error"]


def test_a_picture_is_changed_as_the_pipeline_does(server: Running, pipe: Pipeline) -> None:
    with server.openai() as client:
        answer = client.images.edit(image=png(picture()), prompt="fox", extra_body={"strength": 0.5, **STEPS})
    assert answer.data is not None and answer.usage is not None
    expected = pipe("fox", image=picture(), strength=0.5, num_inference_steps=4, guidance_scale=1.0, seed=3).images[0]
    assert opened(answer.data[0].b64_json).tobytes() == expected.tobytes()
    assert answer.usage.input_tokens_details.image_tokens == 64


def test_the_mask_is_transparent_where_something_is_drawn(server: Running, pipe: Pipeline) -> None:
    mask = png(erased(picture("black")))
    with server.openai() as client:
        answer = client.images.edit(image=[png(picture())], mask=mask, prompt="fox", extra_body=STEPS)
    assert answer.data is not None
    drawn, given = (np.asarray(image.convert("RGB")) for image in (opened(answer.data[0].b64_json), picture()))
    assert (drawn[:, :16] == given[:, :16]).all() and (drawn[:, 16:] != given[:, 16:]).any()
    box = pipe("fox", image=picture(), mask=(16, 0, 32, 32), num_inference_steps=4, guidance_scale=1.0, seed=3)
    assert drawn.tobytes() == box.images[0].tobytes()


def test_without_a_mask_dall_e_2_draws_what_is_transparent(server: Running) -> None:
    with server.openai() as client:
        answer = client.images.edit(image=png(erased(picture())), prompt="fox", model="dall-e-2", extra_body=STEPS)
    assert answer.data is not None
    record = json.loads(opened(answer.data[0].b64_json).info[METADATA_KEY])
    assert record["mask"]["alpha"] is True


def test_transparency_is_kept_unless_something_else_is_asked_for(server: Running) -> None:
    image = picture()
    image.paste((0, 0, 0, 0), (0, 24, 16, 32))  # transparent, and kept
    files = {"image": png(image), "mask": png(erased(picture("black")))}
    with server.http() as client:
        answers = [
            client.post(EDITS, data={"prompt": "fox", **STEPS, **more}, files=files)
            for more in ({"background": "transparent"}, {"background": "opaque"}, {"output_format": "jpeg"})
        ]
    found = [(answer.json()["background"], opened(answer.json()["data"][0]["b64_json"]).mode) for answer in answers]
    assert found == [("transparent", "RGBA"), ("opaque", "RGB"), ("opaque", "RGB")]
    assert "x-latentdiff-ignored" not in answers[0].headers


def test_edits_are_streamed(server: Running) -> None:
    with server.openai() as client:
        stream = client.images.edit(
            image=png(picture()), prompt="fox", stream=True, partial_images=1, extra_body={**STEPS, "strength": 1.0}
        )
        types = [event.type for event in stream]
    assert types == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # of the client: OpenAI has ended variations
def test_variations(server: Running) -> None:
    with server.openai() as client:
        answer = client.images.create_variation(image=png(picture()), n=2, size="256x256", extra_body={"steps": 2})
    assert answer.data is not None
    first, second = (opened(one.b64_json) for one in answer.data)
    assert first.size == second.size == (32, 32) and first.tobytes() != second.tobytes()
    record = json.loads(first.info[METADATA_KEY])
    assert (record["prompt"], record["guidance_scale"], record["strength"]) == ("", 1.0, 0.8)


def test_options_of_a_form_are_read_as_on_the_command_line(server: Running) -> None:
    fields = {**STEPS, "outpaint": "left=8,right=8", "prompt_weights": "false", "sigmas": "8,4,2", "steps": ""}
    with server.http() as client:
        answer = client.post(EDITS, data={"prompt": "fox", **fields}, files={"image": png(picture())})
    image = opened(answer.json()["data"][0]["b64_json"])
    record = json.loads(image.info[METADATA_KEY])
    assert image.size == (48, 32)
    assert (record["outpaint"], record["prompt_weights"], record["num_inference_steps"]) == ([8, 0, 8, 0], False, 3)


def test_every_field_of_the_client_is_taken() -> None:
    names = set(image_edit_params.ImageEditParamsBase.__annotations__)
    names |= set(image_create_variation_params.ImageCreateVariationParams.__annotations__)
    assert names - {"markup"} <= set(GenerationRequest.model_fields) | IGNORED | set(UPLOADS)


def test_what_cannot_be_edited_is_refused(server: Running) -> None:
    small, opaque = png(picture("black", (16, 16))), png(picture("black"))
    cases: list[tuple[Any, str, str]] = [
        ({"image": b"no picture"}, "image", "image is not a PNG, JPEG or WebP"),
        ({"image": png(picture())[:60]}, "image", "truncated or broken"),
        ({"image": png(picture()), "mask": small}, "mask", "must have the size of the image, 32x32, got 16x16"),
        ({"image": png(picture()), "mask": opaque}, "mask", "must be transparent where something is drawn"),
        ({"mask": opaque}, "image", "image must be a picture, got none"),
        ({"image": png(picture()), "markup": opaque}, "markup", "there is no file markup"),
    ]
    for files, param, says in cases:
        status, error = refused(server, files)
        assert (status, error["param"]) == (400, param) and says in error["message"]


def test_no_address_of_a_picture_is_fetched_and_no_path_opened(server: Running) -> None:
    for name in ("image", "image[]", "mask"):
        for value in ("http://127.0.0.1:9/a.png", "file:///etc/passwd", "/etc/passwd", "data:image/png;base64,AAAA"):
            status, error = refused(server, {"other": (None, "")}, **{name: value})
            assert (status, error["param"], error["code"]) == (400, name, "no_file")


def test_what_an_uploaded_file_says_of_itself_goes_nowhere(server: Running) -> None:
    buffer, chunks = io.BytesIO(), PngImagePlugin.PngInfo()
    chunks.add_text(METADATA_KEY, json.dumps({"prompt": "a secret"}))
    picture().save(buffer, "PNG", pnginfo=chunks)
    with server.http() as client:
        answer = client.post(EDITS, data={"prompt": "fox", **STEPS}, files={"image": buffer.getvalue()})
    assert "a secret" not in json.dumps(opened(answer.json()["data"][0]["b64_json"]).info, default=str)


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # of the client: OpenAI has ended variations
def test_other_bodies_are_refused(server: Running) -> None:
    with server.http() as client:
        assert client.post(EDITS, json={"prompt": "fox"}).status_code == 415
        broken = client.post(EDITS, content=b"--x", headers={"content-type": "multipart/form-data"})
        assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_body")
        many = {f"field-{number}": "1" for number in range(200)}
        assert client.post(EDITS, data=many, files={"image": png(picture())}).status_code == 400
    with server.openai() as client, pytest.raises(openai.BadRequestError):
        client.images.create_variation(image=b"no picture")

"""Pictures of pictures by the API of the web UI: masks, fills, larger ones, and what they say of themselves."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from latentdiff import Pipeline
from latentdiff.generation.result import METADATA_KEY
from tests.serve.http.conftest import Running, Serve
from tests.serve.http.test_edits import picture
from tests.serve.http.test_generations import opened
from tests.serve.http.test_webui import STEPS, USUAL, b64, get, images, post, record


def test_a_picture_of_a_picture(server: Running, pipe: Pipeline) -> None:
    fields = {**STEPS, "steps": 4, "init_images": [f"data:image/png;base64,{b64(picture())}"]}
    (image,) = images(post(server, "img2img", **USUAL | fields | {"denoising_strength": 0.5}))
    expected = pipe("fox", image=picture(), strength=0.5, num_inference_steps=4, guidance_scale=1.0, seed=7, width=32)
    assert image.tobytes() == expected.images[0].tobytes()
    assert record(images(post(server, "img2img", **fields))[0])["strength"] == 0.75
    answer = post(server, "img2img", **fields, width=48, height=32)
    assert images(answer)[0].size == (48, 32)
    assert answer.headers["x-latentdiff-mapped"] == "resize_mode=0->1"
    assert answer.json()["parameters"]["init_images"] is None


def half_mask(size: tuple[int, int] = (32, 32)) -> Image.Image:
    mask = Image.new("RGB", size, "black")
    mask.paste("white", (size[0] // 2, 0, *size))
    return mask


def test_a_mask_is_white_where_something_is_drawn(server: Running, pipe: Pipeline) -> None:
    fields = {**STEPS, "steps": 4, "init_images": [b64(picture())], "mask_blur": 0, "inpainting_fill": 1}
    fields |= {"denoising_strength": 0.75, "inpaint_full_res": True}
    answer = post(server, "img2img", **fields, mask=b64(half_mask((64, 64))))  # of another size, as there
    assert answer.headers["x-latentdiff-ignored"] == "inpaint_full_res"
    box = {"mask": (16, 0, 32, 32), "num_inference_steps": 4, "guidance_scale": 1.0, "seed": 7, "strength": 0.75}
    expected = pipe("fox", image=picture(), **box).images[0]
    (image,) = images(answer)
    assert image.tobytes() == expected.tobytes()
    inverted = images(post(server, "img2img", **fields, mask=b64(half_mask()), inpainting_mask_invert=1))[0]
    expected = pipe("fox", image=picture(), **box | {"mask": (0, 0, 16, 32)}).images[0]
    assert inverted.tobytes() == expected.tobytes()
    clear = Image.new("RGBA", (32, 32))
    clear.paste((0, 0, 0, 255), (16, 0, 32, 32))  # a brush on nothing: what is opaque is drawn
    assert images(post(server, "img2img", **fields, mask=b64(clear)))[0].tobytes() == image.tobytes()


def test_how_a_masked_part_is_filled(server: Running, pipe: Pipeline) -> None:
    fields = {**STEPS, "steps": 4, "init_images": [b64(picture())], "mask": b64(half_mask()), "mask_blur": 3}
    filled, original, noise = (
        post(server, "img2img", **fields, denoising_strength=0.5, inpainting_fill=fill) for fill in (0, 1, 2)
    )
    assert len({images(answer)[0].tobytes() for answer in (filled, original, noise)}) == 3
    assert noise.headers["x-latentdiff-mapped"] == "inpainting_fill=2->denoising_strength=1"
    assert record(images(noise)[0])["strength"] == 1.0 and record(images(filled)[0])["feather"] == 3
    kept = images(filled)[0].crop((0, 0, 16, 32)).convert("RGB")
    assert kept.tobytes() == picture().crop((0, 0, 16, 32)).convert("RGB").tobytes()
    flat = picture()
    flat.paste(flat.crop((15, 0, 16, 32)).resize((16, 32)), (16, 0))  # the colours nearest to the mask
    box = {"mask": (16, 0, 32, 32), "strength": 0.5, "feather": 3, "num_inference_steps": 4, "guidance_scale": 1.0}
    assert images(filled)[0].tobytes() == pipe("fox", image=flat, seed=7, **box).images[0].tobytes()


def test_larger_pictures(pipe: Pipeline, serve: Serve, upscaler: Pipeline) -> None:
    server = serve(pipe, {"larger": upscaler})
    assert [one["name"] for one in get(server, "upscalers")] == ["None", "Lanczos", "Nearest", "larger"]

    def size(**fields: Any) -> tuple[int, int]:
        answer = post(server, "extra-single-image", image=b64(picture(size=(32, 16))), **fields)
        assert answer.status_code == 200, answer.text
        return opened(answer.json()["image"]).size

    assert size(upscaler_1="None") == (32, 16) and size(upscaler_1="Lanczos") == (64, 32)
    assert size(upscaler_1="Nearest", upscaling_resize=1.5) == (48, 24)
    sides = {"resize_mode": 1, "upscaling_resize_w": 80, "upscaling_resize_h": 80, "upscaler_1": "Lanczos"}
    assert size(**sides) == (80, 80) and size(**sides, upscaling_crop=False) == (80, 40)
    assert [size(upscaler_1="larger", upscaling_resize=scale) for scale in (2, 3)] == [(64, 32), (96, 48)]
    small = b64(picture(size=(16, 16)))
    drawn = post(server, "extra-single-image", image=small, upscaler_1="larger", upscaling_resize=4)
    assert opened(drawn.json()["image"]).size == (64, 64)
    assert record(opened(drawn.json()["image"]))["model_hash"] == upscaler.components.model_hash
    refused = post(server, "extra-single-image", image=b64(picture()), upscaler_1="Lanczoz")
    assert refused.status_code == 400 and "did you mean 'Lanczos'" in refused.json()["detail"]
    wide = {"image": b64(picture(size=(512, 512))), "upscaler_1": "Lanczos", "upscaling_resize": 8}
    large = post(server, "extra-single-image", **wide)
    assert large.json()["error"]["code"] == "limit_pixels"


def test_a_mark_survives_enlarging(server: Running) -> None:
    drawn = post(server, "txt2img", **STEPS).json()["images"][0]
    for upscaler in ("None", "Lanczos"):
        answer = post(server, "extra-single-image", image=drawn, upscaler_1=upscaler)
        assert b"trainedAlgorithmicMedia" in base64.b64decode(answer.json()["image"])


def test_what_a_picture_says_of_itself(server: Running) -> None:
    fields = STEPS | {"prompt": "a fox,\nNegative prompt: of two lines", "negative_prompt": "rain: (none)"}
    drawn = post(server, "txt2img", **fields).json()
    said = post(server, "png-info", image="data:image/png;base64," + drawn["images"][0]).json()
    assert said["info"] == json.loads(drawn["info"])["infotexts"][0] and METADATA_KEY in said["items"]
    parameters = said["parameters"]
    assert (parameters["Steps"], parameters["Seed"], parameters["Size-1"]) == ("2", "7", "32")
    assert parameters["Negative prompt"] == "rain: (none)"
    assert parameters["Prompt"] == "a fox,\n Negative prompt: of two lines"
    plain = post(server, "png-info", image=b64(picture())).json()
    assert plain == {"info": "", "items": {}, "parameters": {}}
    assert post(server, "png-info", image="nothing").status_code == 400
    odd = PngImagePlugin.PngInfo()
    odd.add_text("parameters", 'fox\nSteps: 2, A: "\\ud800", B: "x')
    buffer = io.BytesIO()
    picture().save(buffer, "PNG", pnginfo=odd)
    said = post(server, "png-info", image=base64.b64encode(buffer.getvalue()).decode()).json()
    assert said["parameters"] == {"Prompt": "fox", "Steps": "2", "A": "?", "B": '"x'}


@pytest.fixture(scope="module")
def upscaler(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A model that enlarges, from a folder."""
    from latentdiff.diffusion import NoiseSchedule
    from latentdiff.models.unet import UNet2DConditionModel
    from tests.models.tiny import randomize

    unet = UNet2DConditionModel(replace(pipe.unet.config, in_channels=7, num_class_embeds=1000)).requires_grad_(False)
    randomize(unet)
    low = NoiseSchedule(beta_schedule="linear", class_name="DDPMScheduler")
    place = tmp_path_factory.mktemp("upscaler") / "larger"
    quick = {"num_inference_steps": 2, "guidance_scale": 1.0}
    Pipeline(replace(pipe.components, unet=unet, low_res_schedule=low, defaults=quick)).save_pretrained(place)
    return Pipeline.from_pretrained(place, device="cpu")

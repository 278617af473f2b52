"""The web UI's API as webuiapi, its Python client, uses it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from latentdiff import Pipeline
from latentdiff.generation.result import METADATA_KEY
from tests.serve.gate import Gate
from tests.serve.http.conftest import Running, Serve
from tests.serve.http.test_edits import picture
from tests.serve.http.test_webui_pictures import half_mask

webuiapi = pytest.importorskip("webuiapi")

STEPS: dict[str, Any] = {"prompt": "fox", "steps": 2, "cfg_scale": 1.0, "seed": 7}


def client_of(server: Running, **more: Any) -> Any:
    return webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1", **more)


def test_pictures(server: Running, pipe: Pipeline) -> None:
    client = client_of(server)
    result = client.txt2img(**STEPS, sampler_name="DPM++ 2M", scheduler="Karras")
    expected = pipe("fox", seed=7, num_inference_steps=2, guidance_scale=1.0, sampler="dpmpp_2m_karras").images[0]
    assert result.image.tobytes() == expected.tobytes() and len(result.images) == 1
    assert result.info["all_seeds"] == [7] and result.info["sampler_name"] == "DPM++ 2M"
    changed = client.img2img(images=[picture()], mask_image=half_mask(), **STEPS)
    assert changed.image.size == (32, 32) and changed.parameters["mask_blur"] == 4
    larger = client.extra_single_image(result.image, upscaler_1=webuiapi.Upscaler.Lanczos, upscaling_resize=2)
    assert larger.image.size == (64, 64)
    assert METADATA_KEY in client.png_info(result.image).json["items"]


def test_lists_and_options(server: Running) -> None:
    client = client_of(server)
    assert "DPM++ 2M" in client.util_get_sampler_names() and "karras" in client.util_get_scheduler_names()
    assert client.util_get_model_names() == [client.util_get_current_model()]
    client.util_set_model("tiny")
    client.util_wait_for_ready()
    for listed in (client.get_upscalers(), client.get_latent_upscale_modes()):
        assert all(one["name"] for one in listed)
    assert client.get_loras() == client.get_sd_vae() == [] and client.get_embeddings()["loaded"] == {}


def test_interrupt_and_the_token(gate: Gate, serve: Serve) -> None:
    token = "a-token-of-sixteen-and-more"
    client = client_of(serve(gate.pipe, token=token), username="ann", password=token)
    found = list[Exception]()

    def draw() -> None:
        try:
            client.txt2img(**STEPS)
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=draw)
    thread.start()
    gate.arrive()
    assert client.get_progress()["state"]["job_count"] == 1
    assert client.interrupt() == {} and client.skip() == {}
    gate.open()
    thread.join(30)
    assert found[0].args[0] == 409

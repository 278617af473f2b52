"""What programs send that draw through a server, and what they read: requests written after their sources."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from latentdiff import Pipeline
from tests.serve.http.conftest import Running, Serve
from tests.serve.http.test_generations import opened

TOKEN = "a-token-of-sixteen-and-more"
QUICK = {"steps": 2, "guidance_scale": 1.0}  # which their users cannot send, and tests need

# Of those that speak OpenAI's API.
OPENAI: dict[str, dict[str, Any]] = {
    "Open WebUI": {"model": "gpt-image-1", "prompt": "fox", "n": 1, "size": "1024x1024"},
    "Open WebUI, other models": {"model": "tiny", "prompt": "fox", "n": 1, "response_format": "b64_json"},
    "LibreChat": {
        "model": "gpt-image-1",
        "prompt": "fox",
        "n": 1,
        "background": "auto",
        "quality": "auto",
        "size": "auto",
        "output_format": "png",
    },
    "AI SDK": {"model": "tiny", "prompt": "fox", "n": 2, "size": "512x512", "response_format": "b64_json"},
    "Newelle": {"model": "gpt-image-1", "prompt": "fox", "n": 1, "size": "1024x1024", "quality": "high"},
    "LiteLLM": {"model": "tiny", "prompt": "fox"},
}


@pytest.mark.parametrize("name", OPENAI)
def test_those_of_openais_api(server: Running, name: str) -> None:
    with server.http(headers={"authorization": "Bearer none"}) as client:
        answer = client.post("/v1/images/generations", json=OPENAI[name] | QUICK)
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert len(data) == OPENAI[name].get("n", 1)
    assert all(opened(one["b64_json"]).size == (32, 32) and "url" not in one for one in data)


def test_nextcloud_fetches_the_address_that_it_asked_for(pipe: Pipeline, serve: Serve) -> None:
    asked = {"prompt": "fox", "n": 1, "size": "1024x1024", "response_format": "url", **QUICK}
    with serve(pipe, token=TOKEN).http() as client:
        answer = client.post("/v1/images/generations", json=asked, headers={"authorization": f"Bearer {TOKEN}"})
        for headers in ({}, {"authorization": f"Bearer {TOKEN}"}):  # Open WebUI sends its key there too
            found = client.get(answer.json()["data"][0]["url"], headers=headers)
            assert found.status_code == 200 and found.headers["content-type"] == "image/png"


def test_open_webui_by_the_web_uis_api(pipe: Pipeline, serve: Serve) -> None:
    server = serve(pipe, {"other": Pipeline(pipe.components)}, token=TOKEN)
    basic = base64.b64encode(f"api:{TOKEN}".encode()).decode()
    with server.http(headers={"authorization": f"Basic {basic}"}) as client:
        options = client.get("/sdapi/v1/options").json()
        models = [(one["title"], one["model_name"]) for one in client.get("/sdapi/v1/sd-models").json()]
        assert options["sd_model_checkpoint"] == models[0][0] and models[1][1] == "other"
        options["sd_model_checkpoint"] = models[1][0]
        assert client.post("/sdapi/v1/options", json=options).status_code == 200
        asked = {"prompt": "fox", "batch_size": 1, "width": 512, "height": 512, "steps": 2, "cfg_scale": 1.0}
        asked |= {"sampler_name": "Euler a", "scheduler": "Karras", "negative_prompt": "rain"}
        answer = client.post("/sdapi/v1/txt2img", json=asked).json()
    assert opened(answer["images"][0]).size == (32, 32) and json.loads(answer["info"])["sd_model_name"] == "other"


def test_sillytavern(server: Running) -> None:
    with server.http(headers={"authorization": "Basic"}) as client:  # as its user has given no password
        options = client.get("/sdapi/v1/options")
        assert options.status_code == 200 and options.json()["sd_model_checkpoint"]
        names = {
            "samplers": "name",
            "schedulers": "name",
            "sd-models": "title",
            "upscalers": "name",
            "latent-upscale-modes": "name",
        }
        lists = {route: [one[key] for one in client.get(f"/sdapi/v1/{route}").json()] for route, key in names.items()}
        assert all(lists.values()) and all(all(isinstance(one, str) for one in found) for found in lists.values())
        assert client.get("/sdapi/v1/sd-vae").json() == client.get("/sdapi/v1/sd-modules").json() == []
        assert client.post("/sdapi/v1/options", json={"sd_model_checkpoint": lists["sd-models"][0]}).status_code == 200
        progress = client.get("/sdapi/v1/progress").json()
        assert progress["progress"] == 0.0 and progress["state"]["job_count"] == 0
        asked = {
            "prompt": "fox",
            "negative_prompt": "",
            "sampler_name": lists["samplers"][0],
            "scheduler": "automatic",
            "steps": 2,
            "cfg_scale": 1,
            "width": 32,
            "height": 32,
            "restore_faces": False,
            "enable_hr": False,
            "hr_upscaler": lists["upscalers"][0],
            "hr_scale": 1,
            "hr_additional_steps": 0,
            "seed": -1,
            "denoising_strength": 0.7,
            "hr_second_pass_steps": 0,
            "override_settings_restore_afterwards": True,
            "override_settings": {"CLIP_stop_at_last_layers": 1},
            "clip_skip": 1,
            "save_images": True,
            "send_images": True,
            "do_not_save_grid": False,
            "do_not_save_samples": False,
        }
        answer = client.post("/sdapi/v1/txt2img", json=asked)
        assert opened(answer.json()["images"][0]).size == (32, 32)
        assert answer.headers["x-latentdiff-ignored"] == "save_images"
        assert client.post("/sdapi/v1/interrupt", json={}).status_code == 200

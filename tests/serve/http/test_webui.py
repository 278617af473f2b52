"""The API of the web UI: what its clients send, and what they read, over a real socket."""

from __future__ import annotations

import base64
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from latentdiff import Pipeline
from latentdiff.checkpoints.lora import save_lora
from latentdiff.generation.infotext import infotext
from latentdiff.generation.result import METADATA_KEY
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.loras import Loras
from latentdiff.serve.http.models import Models
from latentdiff.serve.http.webui.options import MOST_CLIENTS, Choices, Options
from tests.checkpoints.test_lora import lora_of
from tests.serve.gate import Gate, eventually
from tests.serve.http.conftest import Running, Serve
from tests.serve.http.test_edits import picture, png
from tests.serve.http.test_generations import opened

ROOT = "/sdapi/v1"
STEPS: dict[str, Any] = {"prompt": "fox", "steps": 2, "cfg_scale": 1.0, "seed": 7}
# What webuiapi sends besides, whatever its user asks for.
USUAL: dict[str, Any] = {
    "enable_hr": False,
    "hr_scale": 2,
    "hr_upscaler": "Latent",
    "hr_second_pass_steps": 0,
    "hr_resize_x": 0,
    "hr_resize_y": 0,
    "hr_checkpoint_name": None,
    "hr_sampler_name": None,
    "hr_prompt": "",
    "styles": [],
    "denoising_strength": 0.7,
    "firstphase_width": 0,
    "subseed": -1,
    "subseed_strength": 0.0,
    "batch_size": 1,
    "n_iter": 1,
    "width": 512,
    "height": 512,
    "restore_faces": False,
    "tiling": False,
    "eta": 1.0,
    "s_churn": 0,
    "do_not_save_samples": False,
    "s_tmax": 0,
    "s_tmin": 0,
    "s_noise": 1,
    "override_settings": {},
    "override_settings_restore_afterwards": True,
    "sampler_name": "Euler a",
    "sampler_index": "Euler a",
    "scheduler": "automatic",
    "script_name": None,
    "script_args": [],
    "send_images": True,
    "save_images": False,
    "alwayson_scripts": {},
    "seed_resize_from_h": 0,
    "negative_prompt": "",
}


def post(server: Running, route: str, **fields: Any) -> httpx.Response:
    with server.http() as client:
        body = json.dumps(fields)  # which httpx refuses to make of half a character
        return client.post(f"{ROOT}/{route}", content=body, headers={"content-type": "application/json"})


def get(server: Running, route: str, **query: Any) -> Any:
    with server.http() as client:
        return client.get(f"{ROOT}/{route}", params=query).json()


def images(answer: httpx.Response) -> list[Image.Image]:
    assert answer.status_code == 200, answer.text
    return [opened(one) for one in answer.json()["images"]]


def record(image: Image.Image) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(image.info[METADATA_KEY])
    return found


def b64(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()


def test_the_picture_is_that_of_the_pipeline(server: Running, pipe: Pipeline) -> None:
    answer = post(server, "txt2img", **USUAL | STEPS)
    (image,) = images(answer)
    expected = pipe("fox", seed=7, num_inference_steps=2, guidance_scale=1.0, sampler="euler_a").images[0]
    assert image.tobytes() == expected.tobytes()
    assert answer.headers["x-latentdiff-mapped"] == "size=512x512->32x32"  # which this model cannot draw
    assert "x-latentdiff-ignored" not in answer.headers
    info = json.loads(answer.json()["info"])
    assert info["infotexts"] == [infotext(record(image))] and info["all_seeds"] == [7] and info["seed"] == 7
    assert (info["width"], info["steps"], info["sampler_name"], info["sd_model_name"]) == (32, 2, "Euler a", "tiny")
    assert answer.json()["parameters"]["prompt"] == "fox" and answer.json()["parameters"]["s_noise"] == 1


def test_several_pictures_and_variations(server: Running, pipe: Pipeline) -> None:
    answer = post(server, "txt2img", **STEPS, batch_size=2, n_iter=2)
    assert json.loads(answer.json()["info"])["all_seeds"] == [7, 8, 9, 10] and len(images(answer)) == 4
    answer = post(server, "txt2img", **STEPS, batch_size=2, subseed=3, subseed_strength=0.5)
    info = json.loads(answer.json()["info"])
    assert (info["all_seeds"], info["all_subseeds"], info["subseed_strength"]) == ([7, 7], [3, 4], 0.5)
    again = pipe("fox", seed=7, variation_seed=4, variation_strength=0.5, num_inference_steps=2, guidance_scale=1.0)
    assert images(answer)[1].tobytes() == again.images[0].tobytes()


def test_without_a_seed_pictures_differ(server: Running) -> None:
    seeds = {json.loads(post(server, "txt2img", **STEPS | {"seed": -1}).json()["info"])["seed"] for _ in range(2)}
    assert len(seeds) == 2


def test_a_second_pass(server: Running) -> None:
    hr = {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.6, "hr_upscaler": "R-ESRGAN 4x+"}
    answer = post(server, "txt2img", **STEPS, **hr, hr_second_pass_steps=9)
    (image,) = images(answer)
    assert image.size == (48, 48) and record(image)["hires_strength"] == 0.6
    assert answer.headers["x-latentdiff-mapped"] == "hr_upscaler=R-ESRGAN 4x+->Latent (bicubic)"
    assert answer.headers["x-latentdiff-ignored"] == "hr_second_pass_steps"
    by_size = post(server, "txt2img", **STEPS, enable_hr=True, width=32, height=32, hr_resize_x=64)
    assert images(by_size)[0].size == (64, 64)


def test_what_means_nothing_here_is_taken_and_named(server: Running) -> None:
    more = {"alwayson_scripts": {"ADetailer": {"args": [True]}, "ControlNet": {}}, "tiling": True, "s_churn": 2.0}
    answer = post(server, "txt2img", **STEPS, **more, override_settings={"eta_noise_seed_delta": 31337}, eta=0.5)
    assert answer.status_code == 200
    assert answer.headers["x-latentdiff-ignored"] == (
        "alwayson_scripts.ADetailer, alwayson_scripts.ControlNet, tiling, s_churn, "
        "override_settings.eta_noise_seed_delta, eta"
    )


def test_names_that_no_header_can_hold_are_escaped(server: Running) -> None:
    answer = post(server, "txt2img", **STEPS, **{"a\r\nset-cookie: b": 1, "\u2603" * 2000: 1})
    assert answer.status_code == 200 and "set-cookie" not in answer.headers
    assert answer.headers["x-latentdiff-ignored"].startswith("a\\r\\nset-cookie: b, \\u2603")
    for names, said in (((" a ", "b", ""), "a , b,"), (("",), ""), ((" ",), "")):
        answer = post(server, "txt2img", **STEPS, **dict.fromkeys(names, 1))
        assert (answer.status_code, answer.headers["x-latentdiff-ignored"]) == (200, said)


def test_what_json_cannot_hold_is_not_sent_back(server: Running) -> None:
    deep = "[" * 500 + "]" * 500
    more = f'"a": NaN, "b": -Infinity, "c": "\\ud800", "d": {deep}, "override_settings": {{"e": NaN}}'
    body = f"{json.dumps(STEPS)[:-1]}, {more}}}"
    with server.http() as client:
        answer = client.post(f"{ROOT}/txt2img", content=body, headers={"content-type": "application/json"})
    parameters = answer.json()["parameters"]
    assert images(answer) and (parameters["a"], parameters["b"], parameters["c"]) == (None, None, "?")
    assert "d" not in parameters and "override_settings" not in parameters
    half = post(server, "txt2img", **STEPS, **{"\udfff": 1})
    assert half.status_code == 400 and "the name of a field" in half.json()["detail"]


def test_options_of_a_request(pipe: Pipeline, serve: Serve) -> None:
    server = serve(pipe, {"other": Pipeline(pipe.components)})
    chosen = {"sd_model_checkpoint": "other", "samples_format": "webp"}
    answer = post(server, "txt2img", **STEPS, override_settings=chosen)
    assert images(answer)[0].format == "WEBP" and json.loads(answer.json()["info"])["sd_model_name"] == "other"
    assert get(server, "options")["samples_format"] == "png"
    post(server, "txt2img", **STEPS, override_settings=chosen, override_settings_restore_afterwards=False)
    assert get(server, "options")["sd_model_checkpoint"].startswith("other [")
    hidden = post(server, "txt2img", **STEPS, send_images=False).json()
    assert hidden["images"] == [] and json.loads(hidden["info"])["infotexts"]


def test_the_model_is_switched_as_open_webui_and_sillytavern_do(pipe: Pipeline, serve: Serve) -> None:
    server = serve(pipe, {"other": Pipeline(pipe.components)})
    options, models = get(server, "options"), get(server, "sd-models")
    assert options["sd_model_checkpoint"] == models[0]["title"] and [one["model_name"] for one in models] == [
        "tiny",
        "other",
    ]
    whole = {**options, "sd_model_checkpoint": models[1]["title"]}
    assert post(server, "options", **whole).json() == {}
    assert get(server, "options")["sd_model_checkpoint"] == models[1]["title"]
    progress = get(server, "progress")
    assert progress["progress"] == 0 and progress["state"]["job_count"] == 0
    assert json.loads(post(server, "txt2img", **STEPS).json()["info"])["sd_model_name"] == "other"
    answer = post(server, "options", sd_vae="other.safetensors", sd_lora="None", sd_model_checkpoint="tiny.safetensors")
    assert answer.headers["x-latentdiff-ignored"] == "sd_vae, sd_lora"
    assert get(server, "options")["sd_model_checkpoint"] == models[0]["title"]


def test_options_that_cannot_be_used(server: Running) -> None:
    cases = {
        "sd_model_checkpoint": (["/etc/passwd", "tinny", 7], 404),
        "samples_format": (["gif", 3, ["png"]], 400),
        "CLIP_stop_at_last_layers": ([0, 13, "2", 1.5], 400),
    }
    for name, (values, status) in cases.items():
        for value in values:
            answer = post(server, "options", **{name: value})
            assert answer.status_code == status, (name, value)
            assert answer.json()["detail"] == answer.json()["error"]["message"]


def test_a_client_does_not_change_the_model_of_another(pipe: Pipeline) -> None:
    choices = Choices(Models({"first": pipe, "second": pipe}, Loras(None, Limits())))
    choices.keep("ann", Options("second"))
    assert (choices.of("ann").model, choices.of("ben").model) == ("second", "first")
    for number in range(MOST_CLIENTS + 5):
        choices.keep(str(number), Options("second"))
    assert len(choices._of) == MOST_CLIENTS and choices.of("ann").model == "first"


def test_lists(pipe: Pipeline, serve: Serve, tmp_path: Path) -> None:
    save_lora(lora_of(pipe.components), tmp_path / "style.safetensors", pipe.components)
    (tmp_path / "broken.safetensors").write_bytes(b"no LoRA")
    server = serve(pipe, lora_dir=tmp_path)
    loras = {one["name"]: one for one in get(server, "loras")}
    assert set(loras) == {"style", "broken"} and loras["style"]["path"] == "style.safetensors"
    styled = post(server, "txt2img", **STEPS | {"prompt": "fox <lora:style:0.2>"})
    assert record(images(styled)[0])["loras"] and record(images(styled)[0])["prompt"] == "fox"
    assert get(server, "embeddings") == {"loaded": {}, "skipped": {}}
    assert get(server, "latent-upscale-modes")[0]["name"].startswith("Latent")
    assert get(server, "sd-vae") == get(server, "sd-modules") == []
    assert get(server, "scripts") == {"txt2img": [], "img2img": []}
    assert get(server, "progress", skip_current_image="perhaps")["error"]["param"] == "skip_current_image"


def ask_beside(server: Running, **fields: Any) -> tuple[threading.Thread, list[httpx.Response]]:
    found = list[httpx.Response]()
    thread = threading.Thread(target=lambda: found.append(post(server, "txt2img", **STEPS, **fields)))
    thread.start()
    return thread, found


def test_progress(gate: Gate, serve: Serve) -> None:
    server = serve(gate.pipe)
    thread, found = ask_beside(server, force_task_id="task(1)")
    gate.arrive()
    gate.let(1)
    eventually(lambda: get(server, "progress")["state"]["sampling_step"] == 1)
    now = get(server, "progress")
    assert now["progress"] == 0.5 and now["eta_relative"] > 0
    assert now["state"]["job_count"] == 1 and now["state"]["sampling_steps"] == 2
    assert now["state"]["job"] == now["current_task"] == "task(1)"
    assert opened(now["current_image"]).size == (8, 8)  # a pixel for each latent
    assert get(server, "progress", skip_current_image=True)["current_image"] is None
    gate.open()
    thread.join(30)
    assert images(found[0])
    idle = get(server, "progress")
    assert (idle["progress"], idle["state"]["job_count"], idle["current_image"]) == (0, 0, None)


@pytest.mark.parametrize("route", ["interrupt", "skip"])
def test_an_interrupted_job_ends_after_its_step(gate: Gate, serve: Serve, route: str) -> None:
    server = serve(gate.pipe)
    thread, found = ask_beside(server)
    gate.arrive()
    with server.http() as client:
        assert client.post(f"{ROOT}/{route}").json() == {}
    gate.open()
    thread.join(30)
    assert (found[0].status_code, found[0].json()["error"]["code"]) == (409, "cancelled")
    eventually(lambda: server.server.scheduler.stats().running == 0)
    assert len(gate.rows) == 1 and not get(server, "progress")["state"]["job_count"]
    with server.http() as client:
        assert client.post(f"{ROOT}/{route}").json() == {}  # there is nothing to end


def test_of_an_interrupted_job_the_pictures_that_are_drawn_are_answered(gate: Gate, serve: Serve) -> None:
    server = serve(gate.pipe, batch=1)
    thread, found = ask_beside(server, batch_size=3)
    gate.arrive()
    gate.let(2)
    eventually(lambda: server.server.scheduler.stats().pictures == 1)
    post(server, "interrupt")
    gate.open()
    thread.join(30)
    assert len(images(found[0])) == 1 and json.loads(found[0].json()["info"])["all_seeds"] == [7]


def test_jobs_of_other_doors_are_not_interrupted(gate: Gate, serve: Serve) -> None:
    server, found = serve(gate.pipe), list[httpx.Response]()

    def draw() -> None:
        with server.http() as client:
            found.append(client.post("/v1/images/generations", json={"prompt": "fox", "steps": 2}))

    thread = threading.Thread(target=draw)
    thread.start()
    gate.arrive()
    assert get(server, "progress")["state"]["job_count"] == 0
    post(server, "interrupt")
    gate.open()
    thread.join(30)
    assert found[0].status_code == 200


def test_a_client_that_leaves_ends_its_job(gate: Gate, serve: Serve) -> None:
    server = serve(gate.pipe)
    with server.http() as client, pytest.raises(httpx.ReadTimeout):
        client.post(f"{ROOT}/txt2img", json=STEPS, timeout=0.5)
    eventually(lambda: server.server.scheduler.stats().cancelled == 1)
    gate.open()
    eventually(lambda: not server.server.desk.busy)


def test_the_token_is_a_password_too(pipe: Pipeline, serve: Serve) -> None:
    token = "a-token-of-sixteen-and-more"
    server = serve(pipe, token=token)
    with server.http() as client:
        for auth, status in ((("ann", token), 200), (("", token), 200), (("ann", "wrong"), 401), ((token, ""), 401)):
            assert client.get(f"{ROOT}/options", auth=auth).status_code == status
        for header in (
            "Basic",
            "Basic x",
            "Basic \u00ff\u00ff",
            f"Basic {token}",
            "Bearer",
            f"Digest {token}",
        ):
            headers = {b"authorization": header.encode("latin-1")}
            assert client.get(f"{ROOT}/options", headers=headers).status_code == 401
        assert client.get(f"{ROOT}/options", headers={"authorization": f"bearer {token}"}).status_code == 200


BAD: dict[str, tuple[str, dict[str, Any], int]] = {
    "steps": ("txt2img", {"steps": 0}, 400),
    "many steps": ("txt2img", {"steps": 10**9}, 400),
    "NaN": ("txt2img", {"cfg_scale": float("nan")}, 400),
    "guidance": ("txt2img", {"cfg_scale": 1e9}, 400),
    "types": ("txt2img", {"prompt": ["fox"]}, 400),
    "seed": ("txt2img", {"seed": 2**70}, 400),
    "sampler": ("txt2img", {"sampler_name": "Euler b"}, 400),
    "many": ("txt2img", {"batch_size": 100, "n_iter": 100}, 400),
    "hires": ("txt2img", {"enable_hr": True, "hr_scale": float("inf")}, 400),
    "hires to nothing": ("txt2img", {"enable_hr": True, "hr_resize_x": 1, "width": 32, "height": 32}, 400),
    "no image": ("img2img", {}, 400),
    "two images": ("img2img", {"init_images": ["", ""]}, 400),
    "address": ("img2img", {"init_images": ["http://127.0.0.1:9/a.png"]}, 400),
    "path": ("img2img", {"init_images": ["/etc/passwd"]}, 400),
    "no base64": ("img2img", {"init_images": ["data:image/png;base64,***"]}, 400),
    "no picture": ("img2img", {"init_images": [base64.b64encode(b"no picture").decode()]}, 400),
    "strength": ("img2img", {"init_images": ["P"], "denoising_strength": float("nan")}, 400),
    "strength 0": ("img2img", {"init_images": ["P"], "denoising_strength": 0}, 400),
    "fill": ("img2img", {"init_images": ["P"], "mask": "P", "inpainting_fill": 7}, 400),
    "blur": ("img2img", {"init_images": ["P"], "mask": "P", "mask_blur": 10**6}, 400),
    "mask": ("img2img", {"init_images": ["P"], "mask": "UE5H"}, 400),
    "clip_skip": ("txt2img", {"clip_skip": 99}, 400),
    "scale": ("extra-single-image", {"image": "P", "upscaler_1": "Lanczos", "upscaling_resize": float("nan")}, 400),
    "sides": ("extra-single-image", {"image": "P", "resize_mode": 1, "upscaling_resize_w": 10**9}, 400),
    "nothing": ("extra-single-image", {}, 400),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_refused(server: Running, name: str) -> None:
    route, fields, status = BAD[name]
    body = json.dumps(STEPS | fields if route != "extra-single-image" else fields).replace('"P"', f'"{b64(picture())}"')
    with server.http() as client:
        answer = client.post(f"{ROOT}/{route}", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.json()["detail"] == answer.json()["error"]["message"]


def test_bodies_with_pictures_may_be_larger_and_others_not(pipe: Pipeline, serve: Serve) -> None:
    server = serve(pipe, limits=Limits(json_bytes=1000, upload_bytes=5000))
    filled = {"x": "y" * 2000}
    assert post(server, "txt2img", **filled).json()["error"]["code"] == "limit_json_bytes"
    assert post(server, "img2img", **filled).json()["error"]["code"] == "missing_image"
    assert post(server, "img2img", x="y" * 6000).json()["error"]["code"] == "limit_upload_bytes"
    with server.http() as client:
        assert client.post(f"{ROOT}/txt2img", content=b"{}").status_code == 415


def test_librechat_reads_what_it_needs(server: Running) -> None:
    fields = {"prompt": "a fox", "negative_prompt": "rain", "cfg_scale": 4.5, "steps": 2, "width": 1024, "height": 1024}
    answer = post(server, "txt2img", **fields).json()
    assert opened(answer["images"][0]) and json.loads(answer["info"])["infotexts"][0].startswith("a fox\n")

"""LoRAs that prompts name: from the folder of the server, into the weights, and a bounded number of them."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from latentdiff import Pipeline
from latentdiff.checkpoints.lora import save_lora
from latentdiff.errors import InputError
from latentdiff.generation.result import METADATA_KEY
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.loras import Loras
from tests.checkpoints.test_lora import lora_of
from tests.serve.gate import Gate
from tests.serve.http.conftest import Running, Serve
from tests.serve.http.test_generations import opened

GENERATIONS = "/v1/images/generations"
STEPS: dict[str, Any] = {"steps": 2, "guidance_scale": 1.0, "seed": 3}


@pytest.fixture
def folder(pipe: Pipeline, tmp_path: Path) -> Path:
    """A folder of two LoRAs, and of a file that is none."""
    for seed, name in enumerate(("style", "fox")):
        save_lora(lora_of(pipe.components, seed=seed), tmp_path / f"{name}.safetensors", pipe.components)
    (tmp_path / "broken.safetensors").write_bytes(b"no LoRA")
    return tmp_path


def ask(server: Running, prompt: str) -> httpx.Response:
    with server.http() as client:
        return client.post("/v1/images/generations", json={"prompt": prompt, **STEPS})


def test_a_prompt_names_a_lora(pipe: Pipeline, serve: Serve, folder: Path) -> None:
    server = serve(pipe, lora_dir=folder)
    image = opened(ask(server, "cat <lora:style:0.2>").json()["data"][0]["b64_json"])
    styled = pipe.with_loras({folder / "style.safetensors": 0.2})
    expected = styled("cat", seed=3, num_inference_steps=2, guidance_scale=1.0).images[0]
    assert image.tobytes() == expected.tobytes()
    record = json.loads(image.info[METADATA_KEY])
    assert record["prompt"] == "cat" and record["loras"][0]["path"] == "style.safetensors"


def test_a_field_names_loras_as_a_prompt_does(pipe: Pipeline, serve: Serve, folder: Path) -> None:
    server = serve(pipe, lora_dir=folder)
    expected = opened(ask(server, "cat <lora:style:0.2> <lora:fox>").json()["data"][0]["b64_json"]).tobytes()
    ways: list[Any] = [{"style": 0.2, "fox": 1}, ["style:0.2", "fox"], "style:0.2, fox"]
    with server.http() as client:
        for lora in ways:
            answer = client.post(GENERATIONS, json={"prompt": "cat", "lora": lora, **STEPS})
            assert opened(answer.json()["data"][0]["b64_json"]).tobytes() == expected
        both = client.post(GENERATIONS, json={"prompt": "cat <lora:fox>", "lora": {"style": 0.2}, **STEPS})
        assert opened(both.json()["data"][0]["b64_json"]).tobytes() == expected
        none = client.post(GENERATIONS, json={"prompt": "cat", "lora": [], **STEPS})
        job = client.post("/v1/jobs", json={"prompt": "cat", "lora": ["stile"], **STEPS})
        twice = client.post(GENERATIONS, json={"prompt": "cat <lora:fox>", "lora": "fox", **STEPS})
    assert none.status_code == 200
    assert (job.status_code, job.json()["error"]["param"]) == (400, "lora")
    assert "did you mean 'style'" in job.json()["error"]["message"]
    assert twice.status_code == 400 and "once" in twice.json()["error"]["message"]


def test_a_field_where_there_are_no_loras(pipe: Pipeline, serve: Serve) -> None:
    with serve(pipe).http() as client:
        refused = client.post(GENERATIONS, json={"prompt": "cat", "lora": {"style": 1}, **STEPS}).json()["error"]
    assert refused["param"] == "lora" and "--lora-dir" in refused["message"]


def test_those_that_cannot_be_used(pipe: Pipeline, serve: Serve, folder: Path) -> None:
    server = serve(pipe, lora_dir=folder)
    cases = {
        "<lora:stile:1>": ("did you mean 'style'", "invalid_value"),
        "<lora:broken:1>": ("broken.safetensors", "lora_refused"),
        "<lora:style:nan>": ("finite number", "invalid_value"),
        "<lora:../style:1>": ("there is no LoRA", "invalid_value"),
    }
    for prompt, (says, code) in cases.items():
        answer = ask(server, prompt)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, code) and says in error["message"]
        assert str(folder) not in error["message"]


def test_without_a_folder_it_is_text(server: Running) -> None:
    image = opened(ask(server, "cat <lora:style:1>").json()["data"][0]["b64_json"])
    assert json.loads(image.info[METADATA_KEY])["prompt"] == "cat <lora:style:1>"


def test_a_file_that_changes_is_read_anew(pipe: Pipeline, folder: Path) -> None:
    loras = Loras(folder, Limits())
    first, again = (loras.applied(pipe, "<lora:style:1>")[1] for _ in range(2))
    assert first is again
    save_lora(lora_of(pipe.components, seed=7), folder / "style.safetensors", pipe.components)
    assert loras.applied(pipe, "<lora:style:1>")[1].components.loras[0].lora.hash != first.components.loras[0].lora.hash


def test_sets_that_nobody_uses_make_room(pipe: Pipeline, folder: Path) -> None:
    loras = Loras(folder, Limits(lora_sets=2))
    for weight in range(4):
        loras.applied(pipe, f"<lora:style:{weight}>")
        assert len(loras._alive) <= 2


def test_more_sets_than_there_is_room_for_are_refused(gate: Gate, serve: Serve, folder: Path) -> None:
    """The set of a job is let go of when that has ended, though a repeat of it could still be answered."""
    server = serve(gate.pipe, lora_dir=folder, limits=Limits(lora_sets=1))
    asked = {"prompt": "<lora:style:0.1>", **STEPS}
    found = list[httpx.Response]()

    def draw() -> None:
        with server.http(headers={"idempotency-key": "one"}) as client:
            found.append(client.post("/v1/images/generations", json=asked))

    thread = threading.Thread(target=draw)
    thread.start()
    gate.arrive()
    refused = ask(server, "<lora:style:0.2>")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "limit_lora_sets")
    gate.open()
    thread.join(30)
    assert found[0].status_code == 200
    assert ask(server, "<lora:style:0.2>").status_code == 200


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be in a folder"):
        Loras(tmp_path / "none", Limits())

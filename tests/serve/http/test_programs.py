"""Clients that are programs of their own, or in an environment of their own: OpenAI's for JavaScript, LiteLLM, curl."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentdiff import Pipeline
from tests.needs import leave_out
from tests.serve.http.conftest import Running
from tests.serve.http.test_edits import picture, png
from tests.serve.http.test_generations import opened

STEPS: dict[str, Any] = {"steps": 4, "guidance_scale": 1.0, "seed": 5}


@pytest.fixture(scope="module")
def expected(pipe: Pipeline) -> bytes:
    """The pixels of the picture that is asked for."""
    return pipe("fox", num_inference_steps=4, guidance_scale=1.0, seed=5).images[0].tobytes()


@pytest.fixture(scope="module")
def changed(pipe: Pipeline) -> bytes:
    """The pixels of the picture that is made of another."""
    drawn = pipe("fox", image=picture(), strength=0.5, num_inference_steps=4, guidance_scale=1.0, seed=5)
    return drawn.images[0].tobytes()


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    """The file of that other picture."""
    (tmp_path / "sent.png").write_bytes(png(picture()))
    return tmp_path / "sent.png"


@pytest.fixture(scope="module")
def node() -> str:
    """Node.js, which finds the client in `NODE_PATH`."""
    found = shutil.which("node")
    if found is None or subprocess.run([found, "-e", "require('openai')"], capture_output=True, check=False).returncode:
        leave_out("needs Node.js and, where NODE_PATH says, its package openai (`npm install openai`)")
    return found


@pytest.fixture(scope="module")
def litellm() -> str:
    """A Python that has LiteLLM."""
    found = os.environ.get("LITELLM_PYTHON", sys.executable)
    if subprocess.run([found, "-c", "import importlib.util as u; u.find_spec('litellm') or exit(1)"]).returncode:
        leave_out("needs LiteLLM in the Python of LITELLM_PYTHON (`pip install litellm`)")
    return found


@pytest.fixture(scope="module")
def curl() -> str:
    """The program."""
    return shutil.which("curl") or leave_out("needs curl")


def apart(picture: str, pixels: bytes) -> int:
    """Return by how many of 255 levels a picture in base 64 differs from pixels at most."""
    return int(np.abs(np.asarray(opened(picture), int).ravel() - np.frombuffer(pixels, np.uint8)).max())


def test_openais_client_for_javascript(server: Running, node: str, sent: Path, expected: bytes, changed: bytes) -> None:
    script = Path(__file__).with_name("openai_client.cjs")
    command = [node, str(script), f"{server.url}/v1", str(sent)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    got = json.loads(ran.stdout)
    assert got["names"] == ["tiny"]
    assert apart(got["generated"]["data"][0]["b64_json"], expected) <= 1  # in calls that it shares with the second
    assert [one["seed"] for one in got["generated"]["data"]] == [5, 6]
    assert opened(got["edited"]["data"][0]["b64_json"]).tobytes() == changed
    *partial, last = got["events"]
    assert 1 <= len(partial) <= 2 and {one["type"] for one in partial} == {"image_generation.partial_image"}
    assert last["type"] == "image_generation.completed" and last["usage"]["output_tokens"] == 64
    assert opened(last["b64_json"]).tobytes() == expected
    refused = got["refused"]
    assert refused.pop("requestID").startswith("req_")
    assert refused == {"name": "BadRequestError", "status": 400, "param": "size", "code": "invalid_value"}


def test_litellm(server: Running, litellm: str, sent: Path, expected: bytes, changed: bytes) -> None:
    script = Path(__file__).with_name("litellm_client.py")
    command = [litellm, str(script), f"{server.url}/v1", str(sent)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    got = json.loads(ran.stdout.splitlines()[-1])
    assert [opened(one).tobytes() for one in got["generated"] + got["edited"]] == [expected, changed]
    for together in (got["two"], got["both"]):  # in calls that they may share
        assert apart(together[0], expected) <= 1 < apart(together[1], expected)
    status, message = got["refused"]
    assert status == 400 and "a multiple of 8" in message


def curled(curl: str, *arguments: str) -> tuple[int, str]:
    """Run curl; return the status and the body of the answer."""
    command = [curl, "--disable", "--no-progress-meter", "--write-out", "\n%{http_code}", *arguments]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    body, _, status = said.rpartition("\n")
    return int(status), body


def as_json(**fields: Any) -> tuple[str, ...]:
    return "-H", "content-type: application/json", "--data", json.dumps({"prompt": "fox", **STEPS, **fields})


def test_curl_asks_for_a_picture(server: Running, curl: str, expected: bytes) -> None:
    status, body = curled(curl, f"{server.url}/v1/images/generations", *as_json())
    assert status == 200 and opened(json.loads(body)["data"][0]["b64_json"]).tobytes() == expected


def test_curl_sends_a_picture(server: Running, curl: str, sent: Path, changed: bytes) -> None:
    fields = {"prompt": "fox", "strength": "0.5", **STEPS}
    form = [part for name, value in fields.items() for part in ("-F", f"{name}={value}")]
    status, body = curled(curl, f"{server.url}/v1/images/edits", "-F", f"image=@{sent}", *form)
    assert status == 200 and opened(json.loads(body)["data"][0]["b64_json"]).tobytes() == changed


def test_curl_prints_events_as_they_come(server: Running, curl: str, expected: bytes) -> None:
    status, body = curled(
        curl, "--no-buffer", f"{server.url}/v1/images/generations", *as_json(stream=True, partial_images=1)
    )
    assert status == 200
    events = [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.startswith("data: ")]
    assert [one["type"] for one in events] == ["image_generation.partial_image", "image_generation.completed"]
    assert opened(events[1]["b64_json"]).tobytes() == expected


def test_curl_follows_a_job(server: Running, curl: str, tmp_path: Path, expected: bytes) -> None:
    """As docs/serving.md shows it, up to the picture in a file."""
    status, body = curled(curl, f"{server.url}/v1/jobs", *as_json())
    assert status == 202
    name = json.loads(body)["id"]
    _, told = curled(curl, "--no-buffer", f"{server.url}/v1/jobs/{name}/events")
    assert told.rstrip().rpartition("event: ")[2].startswith("done\n")
    status, _ = curled(curl, "--output", str(tmp_path / "fox.png"), f"{server.url}/v1/jobs/{name}/images/0")
    data = (tmp_path / "fox.png").read_bytes()
    assert status == 200 and opened(base64.b64encode(data).decode()).tobytes() == expected


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (as_json(size="big"), 400, "invalid_value"),
        (as_json(model="other"), 404, "model_not_found"),
        (("--data", "prompt=fox"), 415, "wrong_content_type"),
        (("--request", "PUT"), 405, "no_such_route"),
    ],
)
def test_curl_is_refused(server: Running, curl: str, arguments: tuple[str, ...], status: int, code: str) -> None:
    got, body = curled(curl, f"{server.url}/v1/images/generations", *arguments)
    assert (got, json.loads(body)["error"]["code"]) == (status, code)

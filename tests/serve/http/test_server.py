"""The process: its command, health and figures, and its end by SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from latentdiff import Pipeline
from latentdiff.cli import main
from latentdiff.errors import InputError
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.loras import Loras
from latentdiff.serve.http.models import Models, served_name
from latentdiff.serve.http.server import Server
from tests.serve.gate import Gate, eventually
from tests.serve.http.conftest import Running, Serve

ROOT = Path(__file__).parents[3]
GENERATIONS = "/v1/images/generations"
NO_LORAS = Loras(None, Limits())
BODY: dict[str, Any] = {"prompt": "fox", "steps": 2, "guidance_scale": 1.0}


def ask_beside(server: Running) -> tuple[threading.Thread, list[httpx.Response]]:
    """Ask for a picture in a thread of its own."""
    found = list[httpx.Response]()

    def ask() -> None:
        with server.http() as client:
            found.append(client.post(GENERATIONS, json=BODY))

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, found


def test_the_first_signal_lets_jobs_end_and_takes_no_more(gate: Gate, serve: Serve) -> None:
    server = serve(gate.pipe)
    thread, found = ask_beside(server)
    gate.arrive()
    server.server.handle_exit(signal.SIGTERM, None)
    with server.http() as client:
        eventually(lambda: client.get("/readyz").status_code == 503)
        refused = client.post(GENERATIONS, json=BODY)
        assert client.get("/healthz").status_code == 200
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert int(refused.headers["retry-after"]) > 0
    gate.open()
    thread.join(30)
    assert found[0].status_code == 200
    eventually(lambda: server.server.should_exit)
    assert not server.server.hurried


def test_jobs_that_do_not_end_in_time_are_answered(gate: Gate, serve: Serve) -> None:
    server = serve(gate.pipe, limits=Limits(drain_seconds=1))
    thread, found = ask_beside(server)
    gate.arrive()
    server.server.handle_exit(signal.SIGTERM, None)
    eventually(lambda: server.server.should_exit)
    gate.open()  # the step that is under way ends, and the job with it
    thread.join(30)
    assert (found[0].status_code, found[0].json()["error"]["code"]) == (503, "shutting_down")


def test_the_second_signal_ends_jobs_at_once(gate: Gate, serve: Serve) -> None:
    server = serve(gate.pipe)
    thread, found = ask_beside(server)
    gate.arrive()
    server.server.handle_exit(signal.SIGTERM, None)
    server.server.handle_exit(signal.SIGTERM, None)
    eventually(lambda: server.server.should_exit)
    gate.open()
    thread.join(30)
    assert server.server.hurried and found[0].status_code == 503 and len(gate.rows) == 1


def test_health_and_figures(pipe: Pipeline, serve: Serve) -> None:
    with serve(pipe).http() as client:
        assert client.get("/readyz").json() == {"status": "ready"}
        assert client.post(GENERATIONS, json=BODY).status_code == 200
        figures = client.get("/metrics").text
    assert "latentdiff_pictures_total 1.0" in figures and "latentdiff_done_total 1.0" in figures
    assert 'latentdiff_admission_seconds{quantile="0.5"}' in figures
    assert "latentdiff_admission_seconds_count 1.0" in figures


def test_a_server_whose_loop_has_ended_is_not_ready(pipe: Pipeline, serve: Serve) -> None:
    server = serve(pipe)
    server.server.scheduler.close()
    with server.http() as client:
        assert client.get("/readyz").status_code == 503
        assert client.post(GENERATIONS, json=BODY).status_code == 503


def test_several_models(pipe: Pipeline) -> None:
    models = Models({"first": pipe, "second": pipe}, NO_LORAS)
    assert models.find(None)[0] == models.find("gpt-image-1")[0] == "first" and models.find("second")[0] == "second"
    assert [served_name(model) for model in (None, "a/fox", "a/fox.safetensors", "owner/fox")] == ["embedded"] + [
        "fox"
    ] * 3
    for name in ("dall-e-2", ""):
        with pytest.raises(InputError, match="cannot be served as"):
            Models({name: pipe}, NO_LORAS)
    with pytest.raises(InputError, match="needs a model"):
        Models({}, NO_LORAS)


def test_the_openapi_file_is_what_the_server_says(pipe: Pipeline, serve: Serve) -> None:
    """`UPDATE=1 pytest tests/serve/http/test_server.py -k openapi` writes it."""
    server = serve(pipe)
    with server.http() as client:
        said = client.get("/openapi.json").json()
    del said["info"]["version"]
    file = ROOT / "docs" / "openapi.json"
    if os.environ.get("UPDATE"):
        file.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    assert json.loads(file.read_text(encoding="utf-8")) == said


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start `latentdiff serve`; yield it, and the address that it prints."""
    command = [sys.executable, "-m", "latentdiff", "serve", "--port", "0", "--device", "cpu", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as started:
        try:
            assert started.stdout is not None
            yield started, started.stdout.readline().strip()
        finally:
            started.kill()


def test_the_command(built_model: Path) -> None:
    token = "a-token-of-sixteen-and-more"
    with process("--model", str(built_model), "--token", token, "--queue", "3", "--batch", "2") as (started, url):
        with openai.OpenAI(base_url=url, api_key=token, max_retries=3) as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
            assert client.images.generate(prompt="fox", extra_body={"steps": 2}).data
        started.send_signal(signal.SIGTERM)
        _, said = started.communicate(timeout=60)
    assert started.returncode == 0
    assert said == "latentdiff: serving tiny; Ctrl-C ends it when all jobs are done\n"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--port", "70000"], 2, "--port must be a whole number from 0 to 65535"),
        (["--batch", "0"], 2, "--batch must be"),
        (["--queue", "0"], 2, "queue must be"),
        (["--host", "0.0.0.0"], 2, "needs a token"),
        (["--token", "short"], 2, "16 to 512 printable"),
        (["--token-file", "none"], 2, "none"),
        (["--token-file", "LICENSE"], 2, "must be at most 0 MiB"),
        (["--token-file", "a", "--token", "b"], 2, "not allowed with"),
        (["--proxy", "127.0.0.1"], 2, "needs a token, got a proxy without one"),
        (["--proxy", "nginx", "--token", "a-token-of-sixteen-and-more"], 2, "a proxy must be an address"),
        (["--model", "a/fox", "b/fox"], 2, "names of their own, got fox, fox"),
        (["--lora-dir", "none"], 2, "LoRAs must be in a folder, got 'none'"),
        (["--model", "none"], 2, "is no folder or file here"),
        (["--host", "203.0.113.7", "--token", "a-token-of-sixteen-and-more"], 4, "cannot listen at '203.0.113.7'"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, says: str
) -> None:
    assert main(["serve", "--port", "0", *arguments]) == code
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_the_token_of_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LATENTDIFF_TOKEN", "short")
    assert main(["serve", "--port", "0"]) == 2
    assert "16 to 512 printable" in capsys.readouterr().err


def test_the_token_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "token"
    for text, says in (("short\n", "16 to 512 printable"), (" a-token-of-sixteen-and-more\n", "is no folder or file")):
        place.write_text(text)
        assert main(["serve", "--host", "0.0.0.0", "--port", "0", "--token-file", str(place), "--model", "none"]) != 0
        assert says in capsys.readouterr().err


def test_a_number_that_cannot_be_used_starts_nothing(pipe: Pipeline) -> None:
    before = threading.active_count()
    for options in ({"token": "short"}, {"host": "0.0.0.0"}, {"proxies": ["::1"]}, {"batch": 0}):
        with pytest.raises(InputError):
            Server({"tiny": pipe}, **options)  # type: ignore[arg-type]
    assert threading.active_count() == before

"""Gradio's own client draws by the page's server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentdiff import Pipeline
from latentdiff.generation.result import read_record
from latentdiff.images import open_image
from tests.serve.page.conftest import Open, Opened

TOKEN = "a-token-of-sixteen-and-more"
FEW: dict[str, Any] = {"num_inference_steps": 3, "seed": 5}


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Make clients, which end with the test; they report to their makers unless asked not to."""
    import gradio_client

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    made = list[Any]()

    def make(server: Opened, **options: Any) -> Any:
        how = {"download_files": tmp_path / "files", "verbose": False, "analytics_enabled": False, "ssl_verify": False}
        made.append(gradio_client.Client(f"{server.url}/ui/", **how, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_pictures_come_as_files(server: Opened, client: Callable[..., Any], pipe: Pipeline) -> None:
    drawing = client(server)
    files = drawing.predict("the red fox", {**FEW, "num_images": 2}, api_name="/draw")
    expected = pipe("the red fox", num_images=2, batch_size=1, **FEW).images
    assert len(files) == 2
    for file, picture in zip(files, expected):
        assert np.abs(np.asarray(open_image(file), int) - np.asarray(picture, int)).max() <= 1
        assert read_record(Path(file))["prompt"] == "the red fox"
    jobs = [drawing.submit("cat", {**FEW, "seed": seed}, api_name="/draw") for seed in (7, 8)]  # at the same time
    assert [read_record(Path(job.result()[0]))["seed"] for job in jobs] == [7, 8]


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("fox", {"seeed": 1}, "settings have no 'seeed'; did you mean 'seed'"),
        ("fox", {"image": "/etc/hostname"}, "settings have no 'image'"),
        ("fox", {"num_inference_steps": 10**9}, "steps"),
        ("fox", {"model": "none"}, "none"),
        ("", {}, "a prompt says what to draw, got none"),
        (None, None, "a prompt says what to draw, got none"),
    ],
)
def test_what_cannot_be_drawn_is_said(
    server: Opened, client: Callable[..., Any], prompt: Any, settings: Any, message: str
) -> None:
    with pytest.raises(Exception, match=message):
        client(server).predict(prompt, settings, api_name="/draw")


def test_a_token_opens_the_door(open_page: Open, client: Callable[..., Any], pipe: Pipeline) -> None:
    server = open_page({"tiny": pipe}, token=TOKEN)
    with pytest.raises(Exception, match=r"401|Could not"):
        client(server)
    files = client(server, headers={"authorization": f"Bearer {TOKEN}"}).predict("cat", FEW, api_name="/draw")
    assert read_record(Path(files[0]))["seed"] == 5

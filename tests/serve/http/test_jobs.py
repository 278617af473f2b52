"""Jobs that outlive the request that hands them in: states, events that go on where they were cut off, their end."""

from __future__ import annotations

import base64
import io
import json
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

import latentdiff.serve.http.jobs.shelf
from latentdiff import Pipeline
from latentdiff.cli import main
from latentdiff.errors import InputError
from latentdiff.serve.http.limits import Limits
from tests.serve.gate import Gate, eventually
from tests.serve.http.conftest import Running, Serve
from tests.serve.http.test_edits import picture, png
from tests.serve.http.test_generations import opened

JOBS = "/v1/jobs"
STEPS: dict[str, Any] = {"prompt": "fox", "steps": 2, "guidance_scale": 1.0, "seed": 7}


def hand_in(client: httpx.Client, **fields: Any) -> str:
    answer = client.post(JOBS, json=STEPS | fields)
    assert answer.status_code == 202, answer.text
    place = answer.headers["location"]
    assert place == f"{JOBS}/{answer.json()['id']}"
    return place


def state(client: httpx.Client, place: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(place).json()
    return found


def ended(client: httpx.Client, place: str) -> dict[str, Any]:
    """Wait for the end of a job and return its state."""
    eventually(lambda: state(client, place)["status"] in ("done", "failed", "cancelled"))
    return state(client, place)


def events(text: str) -> list[tuple[int, str, dict[str, Any]]]:
    """Return number, name and data of server-sent events."""
    found = []
    for block in text.removeprefix(": listening\n\n").strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n")) if block else {}
        if fields:
            found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return found


def names(found: list[tuple[int, str, dict[str, Any]]]) -> list[str]:
    return [name for _, name, _ in found]


def fetched(client: httpx.Client, url: str) -> Image.Image:
    answer = client.get(url)
    assert answer.status_code == 200
    image = Image.open(io.BytesIO(answer.content))
    image.load()
    assert answer.headers["content-type"] == f"image/{str(image.format).lower()}"
    return image


def test_a_job_is_drawn_when_its_client_does_not_wait(server: Running, pipe: Pipeline) -> None:
    with server.http() as client:
        place = hand_in(client, n=2)
        said = ended(client, place)
        assert (said["status"], said["model"], said["size"], said["error"]) == ("done", "tiny", "32x32", None)
        assert [(one["status"], one["step"], one["seed"]) for one in said["images"]] == [
            ("drawn", 2, 7),
            ("drawn", 2, 8),
        ]
        image = fetched(client, said["images"][1]["url"])
        assert client.get(f"{place}/images/2").json()["error"]["code"] == "not_drawn"
        refused = client.get(f"{place}/images/first")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "index")
    expected = pipe("fox", seed=8, num_inference_steps=2, guidance_scale=1.0).images[0]
    assert max(abs(a - b) for a, b in zip(image.tobytes(), expected.tobytes())) <= 1


def test_other_formats(server: Running) -> None:
    with server.http() as client:
        said = ended(client, hand_in(client, output_format="webp", output_compression=50, size="48x32"))
        image = fetched(client, said["images"][0]["url"])
    assert (image.format, image.size, said["size"]) == ("WEBP", (48, 32), "48x32")


def test_events(server: Running) -> None:
    with server.http() as client:
        place = hand_in(client, steps=4, previews=1)
        answer = client.get(f"{place}/events")
        found = events(answer.text)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert [name for name in names(found) if name != "preview"] == ["admitted", *["step"] * 4, "picture", "done"]
        assert all(data["type"] == name and data["job"] == place[len(JOBS) + 1 :] for _, name, data in found)
        ((preview,), (drawn,)) = ([data for _, name, data in found if name == kind] for kind in ("preview", "picture"))
        assert opened(preview["b64_json"]).size == (8, 8) and (preview["step"], preview["steps"]) == (2, 4)
        assert opened(drawn["b64_json"]).tobytes() == fetched(client, drawn["url"]).tobytes()
        assert drawn["seed"] == 7
        assert fetched(client, state(client, place)["images"][0]["preview_url"]).size == (8, 8)


def test_a_stream_goes_on_where_it_was_cut_off(gate: Gate, serve: Serve) -> None:
    with serve(gate.pipe).http() as client:
        place = hand_in(client, steps=4)
        gate.arrive()
        gate.let(2)
        seen = list[str]()
        with client.stream("GET", f"{place}/events") as answer:  # which is cut off after three events
            for line in answer.iter_lines():
                seen.append(line)
                if sum(one.startswith("id") for one in seen) == 3 and not line:
                    break
        assert seen[0] == ": listening" and names(events("\n".join(seen) + "\n")) == ["admitted", "step", "step"]
        gate.open()
        assert ended(client, place)["status"] == "done"
        rest = events(client.get(f"{place}/events", headers={"last-event-id": "3"}).text)
        assert names(rest) == ["step", "step", "picture", "done"] and [number for number, _, _ in rest] == [4, 5, 6, 7]
        assert events(client.get(f"{place}/events?after=6").text)[0][1] == "done"
        for known in ("7", "999999999"):  # nothing comes after that
            assert events(client.get(f"{place}/events", headers={"last-event-id": known}).text) == []
        for broken in ("-1", "x", "9" * 50):
            assert len(events(client.get(f"{place}/events", headers={"last-event-id": broken}).text)) == 7


def test_cancelled_and_forgotten(gate: Gate, serve: Serve) -> None:
    server = serve(gate.pipe)
    with server.http() as client:
        place = hand_in(client)
        gate.arrive()
        said = client.delete(place)
        assert (said.status_code, said.json()["status"]) == (200, "cancelled")
        gate.open()
        assert names(events(client.get(f"{place}/events").text)) == ["admitted", "cancelled"]
        assert state(client, place)["error"]["code"] == "cancelled"
        eventually(lambda: server.server.scheduler.stats().running == 0)
        assert len(gate.rows) == 1
        assert client.delete(place).status_code == 200
        for path in ("", "/events", "/images/0", "/previews/0"):
            assert client.get(place + path).json()["error"]["code"] == "job_not_found"
        assert client.delete(place).status_code == 404


def test_a_job_that_fails_says_why(gate: Gate, serve: Serve) -> None:
    def refuse(sample: object) -> None:
        raise InputError("the network failed")

    gate.refuse = refuse
    gate.open()
    with serve(gate.pipe).http() as client:
        place = hand_in(client)
        said = ended(client, place)
        assert said["status"] == "failed" and "the network failed" in said["error"]["message"]
        last = events(client.get(f"{place}/events").text)[-1]
        assert last[1] == "failed" and last[2]["error"] == said["error"]


def test_a_job_that_nobody_asks_for_is_dropped_or_kept(
    gate: Gate, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latentdiff.serve.http.jobs.shelf, "GONE_SECONDS", 0.3)
    server = serve(gate.pipe)
    with server.http() as client:
        dropped, kept = hand_in(client, when_gone="drop"), hand_in(client)
        eventually(lambda: server.server.scheduler.stats().cancelled == 1)
        gate.open()
        assert ended(client, kept)["status"] == "done" and state(client, dropped)["status"] == "cancelled"


def test_a_job_that_somebody_listens_to_is_not_dropped(
    gate: Gate, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latentdiff.serve.http.jobs.shelf, "GONE_SECONDS", 0.3)
    server = serve(gate.pipe)
    with server.http() as client:
        place = hand_in(client, when_gone="drop")
        with client.stream("GET", f"{place}/events") as answer:
            gate.arrive()
            kept = server.server.shelf.find(place[len(JOBS) + 1 :])
            kept.asked -= 60
            eventually(lambda: kept.streams == 1)
            gate.let(1)
            assert not kept.job.ended
            gate.open()
            assert names(events(answer.read().decode()))[-1] == "done"


def test_a_repeat_is_the_same_job(server: Running) -> None:
    with server.http(headers={"idempotency-key": "one"}) as client:
        assert hand_in(client) == hand_in(client)
        refused = client.post(JOBS, json=STEPS | {"prompt": "cat"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "idempotency_key_reused")
    with server.http() as client:
        assert hand_in(client) != hand_in(client)


def test_kept_jobs_go_after_some_time_and_for_newer_ones(pipe: Pipeline, serve: Serve) -> None:
    def gone(limits: Limits, fewer: int) -> list[bool]:
        with serve(pipe, limits=limits).http() as client:
            places = list[str]()
            for number in range(3):
                places.append(hand_in(client, seed=number))
                eventually(lambda: client.get(places[-1]).json().get("status") == "done")
            eventually(lambda: sum(client.get(place).status_code == 404 for place in places) == fewer)
            return [client.get(place).status_code == 404 for place in places]

    assert gone(Limits(kept_jobs=2), 1) == [True, False, False]
    assert gone(Limits(job_bytes=32 * 32 * 3), 2) == [True, True, False]


def test_kept_jobs_go_after_some_time(pipe: Pipeline, serve: Serve) -> None:
    with serve(pipe, limits=Limits(job_seconds=1)).http() as client:
        place = hand_in(client)
        eventually(lambda: client.get(place).status_code == 404)


def test_the_end_waits_for_those_who_have_yet_to_fetch_their_pictures(gate: Gate, serve: Serve) -> None:
    server = serve(gate.pipe)
    with server.http() as client:
        place = hand_in(client)
        gate.arrive()
        server.server.handle_exit(signal.SIGTERM, None)
        eventually(lambda: client.get("/readyz").status_code == 503)
        assert client.post(JOBS, json=STEPS).json()["error"]["code"] == "shutting_down"
        gate.open()
        said = ended(client, place)
        assert server.server.shelf.untold and not server.server.should_exit
        fetched(client, said["images"][0]["url"])
        eventually(lambda: server.server.should_exit)


def test_pictures_replay(
    server: Running,
    built_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    sent = {name: png(image) for name, image in {"image": picture(), "mask": mask}.items()}
    for name, data in sent.items():
        Path(f"{name}.png").write_bytes(data)
    encoded = {name: base64.b64encode(data).decode() for name, data in sent.items()}
    ways: list[tuple[dict[str, Any], list[str]]] = [
        ({}, []),
        ({"image": encoded["image"], "strength": 0.5}, ["--image", "image.png"]),
        ({**encoded, "feather": 2}, ["--image", "image.png", "--mask", "mask.png"]),
        ({"image": encoded["image"], "mask": [0, 0, 16, 32]}, ["--image", "image.png"]),
    ]
    with server.http() as client:
        places = [ended(client, hand_in(client, **fields))["images"][0]["url"] for fields, _ in ways]
        for number, (place, (_, given)) in enumerate(zip(places, ways)):
            Path(f"{number}.png").write_bytes(client.get(place).content)
            capsys.readouterr()
            assert main(["replay", f"{number}.png", "--model", str(built_model), "--json", *given]) == 0
            assert json.loads(capsys.readouterr().out)["identical"], number
    assert main(["replay", "1.png", "--model", str(built_model)]) == 2
    assert "in memory" in capsys.readouterr().err
    assert main(["replay", "1.png", "--model", str(built_model), "--image", "mask.png"]) == 2
    assert "is no longer the image" in capsys.readouterr().err


BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown": ({"guidance_skale": 1}, 400, "unknown_parameter"),
    "model": ({"model": "/etc/passwd"}, 404, "model_not_found"),
    "size": ({"size": "33x32"}, 400, "invalid_value"),
    "large": ({"n": 1000}, 400, "limit_n"),
    "steps": ({"steps": 1000}, 400, "limit_steps"),
    "policy": ({"when_gone": "explode"}, 400, "invalid_value"),
    "address": ({"image": "http://127.0.0.1:9/a.png"}, 400, "no_file"),
    "path": ({"image": "/etc/passwd"}, 400, "no_file"),
    "mask alone": ({"mask": "alpha"}, 400, "invalid_value"),
    "mask": ({"image": "P", "mask": "Q"}, 400, "invalid_value"),
    "box": ({"image": "P", "mask": [0, 0, 99, 99]}, 400, "invalid_value"),
    "short box": ({"image": "P", "mask": [1]}, 400, "invalid_value"),
    "previews": ({"previews": 10**9}, 400, "invalid_value"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_refused(server: Running, name: str) -> None:
    fields, status, code = BAD[name]
    pictures = {
        "P": base64.b64encode(png(picture())).decode(),
        "Q": base64.b64encode(png(picture(size=(8, 8)))).decode(),
    }
    sent = {key: pictures.get(value, value) if isinstance(value, str) else value for key, value in fields.items()}
    with server.http() as client:
        answer = client.post(JOBS, json=STEPS | sent)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert client.post(JOBS, content=b"{}").status_code == 415
    assert not server.server.shelf._kept.get(name)


def test_a_client_may_have_so_many_jobs(gate: Gate, serve: Serve) -> None:
    with serve(gate.pipe, limits=Limits(client_jobs=1)).http() as client:
        place = hand_in(client)
        refused = client.post(JOBS, json=STEPS)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "limit_client_jobs")
        gate.open()
        ended(client, place)


def test_names_of_jobs_cannot_be_guessed(server: Running) -> None:
    with server.http() as client:
        found = {hand_in(client).rpartition("/")[2] for _ in range(3)}
        assert len(found) == 3 and all(name.startswith("job_") and len(name) >= 26 for name in found)
        for name in ("job_", "..", "x" * 10**4, "%00"):
            assert client.get(f"{JOBS}/{name}").status_code in (404, 405)

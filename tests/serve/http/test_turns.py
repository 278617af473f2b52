"""Priority and deadline over HTTP: a client may let others go first, and never itself before them."""

from __future__ import annotations

import time
from typing import Any

import pytest

from latentdiff import Pipeline
from latentdiff.serve.http.limits import Limits
from tests.serve.gate import Gate, eventually
from tests.serve.http.conftest import Serve
from tests.serve.http.test_jobs import ended, hand_in, state

STEPS: dict[str, Any] = {"prompt": "fox", "steps": 2, "guidance_scale": 1.0}
DOORS = ("/v1/images/generations", "/v1/jobs")


def test_a_job_of_low_priority_lets_later_ones_go_first(gate: Gate, serve: Serve) -> None:
    server = serve(gate.pipe, batch=1)
    with server.http() as client:
        first = hand_in(client, steps=2)
        gate.arrive()
        low, soon, usual = hand_in(client, priority=-5), hand_in(client, deadline=500), hand_in(client)
        waiting = [state(client, place)["status"] for place in (low, soon, usual)]
        gate.let(4)  # the first one and the next
        eventually(lambda: state(client, soon)["status"] == "done")
        assert [state(client, place)["status"] for place in (low, usual)] == ["waiting", "running"]
        gate.open()
        assert waiting == ["waiting"] * 3 and ended(client, low)["status"] == ended(client, first)["status"] == "done"


def test_a_deadline_that_passes(gate: Gate, serve: Serve) -> None:
    server = serve(gate.pipe, batch=1)
    with server.http() as client:
        hand_in(client)
        gate.arrive()
        late = hand_in(client, deadline=0.2)
        time.sleep(0.3)
        gate.open()
        said = ended(client, late)
    assert (said["status"], said["error"]["code"]) == ("failed", "time_limit")


@pytest.mark.parametrize("door", DOORS)
def test_no_client_goes_before_others(pipe: Pipeline, serve: Serve, door: str) -> None:
    cases: dict[str, list[Any]] = {"priority": [1, 1000, -1001, 0.5, "high"], "deadline": [0, -1, 61, 1e-9, "soon"]}
    with serve(pipe, limits=Limits(seconds=60)).http() as client:
        for name, values in cases.items():
            for value in values:
                refused = client.post(door, json=STEPS | {name: value})
                assert (refused.status_code, refused.json()["error"]["param"]) == (400, name), value
        assert client.post(door, json=STEPS | {"priority": -1000, "deadline": 60}).status_code in (200, 202)

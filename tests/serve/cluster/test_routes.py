"""Which replica has a request: that of its job, that of its repeat, that of its client, or the least busy one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from latentdiff.serve.cluster.door import asked_of
from latentdiff.serve.cluster.routes import Asked, Routes

FREE = {"a": 0, "b": 0, "c": 0}


def test_the_least_busy_one_is_first_and_equal_ones_take_turns() -> None:
    routes = Routes()
    assert routes.choose(Asked(), {"a": 2, "b": 1, "c": 3}) == ["b", "a", "c"]
    order = list[str]()
    for _ in range(6):
        order.append(routes.choose(Asked(), FREE)[0])
        routes.went(Asked(), order[-1])
    assert sorted(order[:3]) == sorted(order[3:]) == ["a", "b", "c"]


def test_what_one_replica_has_goes_there_while_it_lives() -> None:
    routes, asked = Routes(), Asked(replica="b")
    assert routes.choose(asked, {"a": 0, "b": 9}) == ["b"]
    assert routes.choose(asked, {"a": 0}) == ["a"]  # which says that it knows nothing of it


def test_a_repeat_goes_where_the_first_went() -> None:
    routes, asked = Routes(), Asked(key="k")
    routes.went(asked, "c")
    assert routes.choose(asked, FREE) == ["c"]
    assert routes.choose(asked, {"a": 1, "b": 0}) == ["b", "a"]


def test_a_client_stays_and_few_move_when_replicas_come() -> None:
    routes = Routes()
    clients = [Asked(client=f"10.0.0.{number}") for number in range(200)]
    before = [routes.choose(client, FREE) for client in clients]
    assert before == [Routes().choose(client, FREE) for client in clients]  # of another door
    assert {one for (one,) in before} == set(FREE)
    after = [routes.choose(client, {**FREE, "d": 0}) for client in clients]
    assert sum(one != other for one, other in zip(before, after)) < 100


def test_weights_stay_where_they_are_unless_others_are_much_less_busy() -> None:
    routes, asked = Routes(), Asked(weights="fox")
    routes.went(asked, "b")
    assert routes.choose(asked, {"a": 0, "b": 1, "c": 0})[0] == "b"
    assert routes.choose(asked, {"a": 0, "b": 2, "c": 1})[0] == "a"
    assert routes.choose(Asked(weights="cat"), {"a": 0, "b": 1, "c": 1})[0] == "a"


def scope(path: str, method: str = "POST", **headers: str) -> dict[str, Any]:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "method": method, "path": path, "headers": pairs, "client": ("10.0.0.1", 5)}


JSON = {"content_type": "application/json"}


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (scope("/v1/jobs/job_r1.x/events", "GET"), Asked(replica="r1")),
        (scope("/v1/images/files/r2.y.png", "GET"), Asked(replica="r2")),
        (scope("/v1/jobs/job_without", "GET"), Asked()),
        (scope("/sdapi/v1/options"), Asked(client="10.0.0.1")),
        (scope("/v1/jobs", idempotency_key="k"), Asked(client="10.0.0.1\0k")),
        (scope("/v1/models", "GET"), Asked()),
    ],
)
def test_what_a_request_is_routed_by(request_: dict[str, Any], expected: Asked) -> None:
    assert asked_of(request_, b"", weighs=False) == expected


def test_repeats_are_alike_in_json_and_in_forms() -> None:
    def key(body: bytes, kind: str, count: str) -> str | None:
        asked = asked_of(scope("/v1/x", content_type=kind, x_stainless_retry_count=count), body, weighs=False)
        return asked.key

    assert key(b"{}", "application/json", "0") == key(b"{}", "application/json", "1") is not None
    assert key(b"{}", "application/json", "0") != key(b"{ }", "application/json", "0")
    one, two = (
        key(b"--%s\r\nfox" % name, f"multipart/form-data; boundary={name.decode()}", "0") for name in (b"p", b"q")
    )
    assert one == two is not None


def test_weights_are_the_model_and_its_loras() -> None:
    def weights(**fields: Any) -> str | None:
        return asked_of(scope("/v1/images/generations", **JSON), json.dumps(fields).encode(), weighs=True).weights

    assert weights(model="fox", prompt="a") == weights(model="fox", prompt="b") != weights(model="cat", prompt="a")
    assert weights(prompt="a <lora:style:0.8>") == weights(prompt="b", lora={"style": 1}) != weights(prompt="a")
    for body in (b"", b"[]", b"{", b"null"):
        assert asked_of(scope("/v1/images/generations", **JSON), body, weighs=True).weights is None

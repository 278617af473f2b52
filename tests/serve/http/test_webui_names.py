"""Samplers and schedulers by the names of the web UI."""

from __future__ import annotations

import pytest

from latentdiff.diffusion import SAMPLERS
from latentdiff.generation.infotext import SCHEDULES
from latentdiff.serve.http.errors import ApiError
from latentdiff.serve.http.webui.names import own_sampler
from tests.serve.http.conftest import Running
from tests.serve.http.test_webui import STEPS, get, images, post, record


@pytest.mark.parametrize(
    ("name", "scheduler", "own"),
    [
        ("DPM++ 2M Karras", None, "dpmpp_2m_karras"),
        ("DPM++ 2M", "Karras", "dpmpp_2m_karras"),
        ("dpm++ 2m", "karras", "dpmpp_2m_karras"),
        ("DPM++ 2M Karras", "Exponential", "dpmpp_2m_karras"),  # as in the web UI the name goes before
        ("DPM++ 2M", "Automatic", "dpmpp_2m"),
        ("DPM++ 2M", "Uniform", "dpmpp_2m"),
        ("DPM++ 2M Automatic", None, "dpmpp_2m"),
        ("DPM++ 2M SDE", "Exponential", "dpmpp_2m_sde_exponential"),
        ("Euler a", None, "euler_a"),
        ("k_euler_a", None, "euler_a"),
        ("k_dpm_2_a", "Polyexponential", "dpm2_a_polyexponential"),
        ("dpmpp_3m_sde_karras", "automatic", "dpmpp_3m_sde_karras"),
        (None, "automatic", None),
        ("", None, None),
    ],
)
def test_names_of_samplers(name: str | None, scheduler: str | None, own: str | None) -> None:
    assert own_sampler(name, scheduler) == own


@pytest.mark.parametrize(
    ("name", "scheduler", "says"),
    [
        ("DPM++ 2N", None, "unknown"),
        ("Euler", "Karas", "choose one of Automatic, Karras"),
        ("Euler Simple", None, "unknown"),
        (None, "Karras", "is of a sampler"),
        ("x" * 10**5, None, "unknown"),
    ],
)
def test_samplers_that_are_not_there(name: str | None, scheduler: str | None, says: str) -> None:
    with pytest.raises(ApiError, match=says) as caught:
        own_sampler(name, scheduler)
    assert caught.value.status == 400 and len(str(caught.value)) < 600


def test_every_listed_sampler_and_scheduler_is_taken(server: Running) -> None:
    listed = get(server, "samplers")
    for one in listed:
        assert {own_sampler(name, None) for name in (one["name"], *one["aliases"])} == {one["aliases"][0]}
    assert {one["aliases"][0] for one in listed} == set(SAMPLERS)
    schedulers = get(server, "schedulers")
    assert [one["name"] for one in schedulers] == ["automatic", *SCHEDULES]
    for one in schedulers:
        assert own_sampler("Euler", one["name"]) == own_sampler("Euler", one["label"])
    answer = post(server, "txt2img", **STEPS, sampler_name="DPM++ 2M Karras")
    assert record(images(answer)[0])["sampler"] == "dpmpp_2m_karras"

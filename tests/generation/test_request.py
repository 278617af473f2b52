"""The one validator: every value that cannot be drawn is refused with what was expected, what came and what to do."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from latentdiff.errors import InputError
from latentdiff.generation.infotext import infotext
from latentdiff.generation.options import check_size, options_of
from latentdiff.generation.request import Settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance_scale": math.nan}, "guidance_scale must be a finite number from 0 to 50, got nan; try 7.5"),
        ({"guidance_scale": math.inf}, "got inf"),
        ({"guidance_scale": -1}, "got -1"),
        ({"guidance_scale": 51}, "got 51"),
        ({"guidance_scale": "7"}, "got '7'"),
        ({"guidance_rescale": 1.5}, "from 0 to 1, got 1.5"),
        ({"guidance_interval": (0, math.nan)}, "guidance_interval must be a finite number"),
        ({"guidance_interval": 3}, "two noise levels"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1 to 1000, got 0; try 25"),
        ({"num_inference_steps": 1001}, "got 1001"),
        ({"num_inference_steps": 2.5}, "got 2.5"),
        ({"num_inference_steps": True}, "got True"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 2**63}, "got 9223372036854775808"),
        ({"seed": 2**63 - 1, "num_images": 2}, "seed must be"),
        ({"seed": None}, "got None"),
        ({"num_images": 0}, "num_images must be"),
        ({"num_images": 10**9}, "num_images must be"),
        ({"height": 500}, "height must be a multiple of 8, got 500; try 496 or 504"),
        ({"width": 63}, "width must be a multiple of 8, got 63; try 56 or 64"),
        ({"width": 0}, "got 0"),
        ({"height": 10**7}, "got 10000000"),
        ({"strength": 1.01}, "strength must be"),
        ({"strength": math.nan}, "strength must be"),
        ({"sampler": "dimm"}, "sampler 'dimm' is unknown; did you mean 'ddim'"),
        ({"sampler": None}, "sampler"),
        ({"negative_prompt": "a\0"}, "negative_prompt must not hold NUL"),
        ({"negative_prompt": None}, "negative_prompt must be text"),
        ({"prompts": ()}, "prompt must not be empty, got an empty list"),
        ({"feather": 513}, "feather must be a whole number from 0 to 512"),
        ({"scale": 3}, "scale must be 2 or 4, got 3"),
        ({"scale": True}, "scale must be 2 or 4, got True"),
        ({"hires": 0.5}, "hires must be a finite number from 1 to 4, got 0.5; try 2"),
        ({"hires": math.nan}, "hires must be"),
        ({"hires_strength": 1.1}, "hires_strength must be a finite number from 0 to 1"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        Settings(**{"prompts": ("a fox",), **change})


@pytest.mark.parametrize(
    "change",
    [
        {"guidance_scale": 0},
        {"guidance_scale": 50.0, "num_inference_steps": 1000},
        {"seed": 2**63 - 1, "num_images": 1},
        {"height": 8, "width": 16384},
        {"sampler": "dpmpp_2m_karras", "negative_prompt": ""},
        {"guidance_interval": (0.3, 5)},
    ],
)
def test_record_makes_the_same_settings_again(change: dict[str, Any]) -> None:
    settings = Settings(**{"prompts": ("a fox",), **change})
    record = json.loads(json.dumps(settings.record(0)))
    assert Settings.from_record(record) == settings


def test_images_are_counted_over_all_prompts() -> None:
    settings = Settings(prompts=("a", "b"), num_images=3, seed=10)
    records = [settings.record(index) for index in range(settings.count)]
    assert [record["prompt"] for record in records] == ["a", "a", "a", "b", "b", "b"]
    assert [record["seed"] for record in records] == [10, 11, 12, 13, 14, 15]


def test_odd_records_are_refused() -> None:
    record = Settings(prompts=("a",)).record(0)
    for change in ({"prompt": 3}, {"seed": "1"}, {"height": [8]}, {"guidance_interval": "ab"}, {"sampler": {}}):
        with pytest.raises(InputError):
            Settings.from_record({**record, **change})
    for key in record.keys() - {name for name, declared in options_of(Settings).items() if declared.since > 1}:
        with pytest.raises(InputError, match=key):
            Settings.from_record({name: value for name, value in record.items() if name != key})


def test_size_names_only_sizes_that_fit() -> None:
    with pytest.raises(InputError, match=r"try 248$"):
        check_size("width", 249, 8, 250)
    with pytest.raises(InputError, match="up to 256"):
        check_size("width", 264, 8, 256)


def test_parameters_text_reads_like_other_tools() -> None:
    record = {**Settings(prompts=("a fox",), negative_prompt="a cat", height=64, width=64).record(0)}
    text = infotext({**record, "model": "embedded", "model_hash": "0123456789abcdef", "version": "1"})
    numbers = "Steps: 25, Sampler: Euler a, CFG scale: 7.5, Seed: 0, Size: 64x64"
    model = "Model: embedded, Model hash: 0123456789, Version: latentdiff 1"
    assert text.splitlines() == ["a fox", "Negative prompt: a cat", f"{numbers}, {model}"]

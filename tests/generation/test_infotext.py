"""The text that other tools read: values they cannot take apart are quoted, and numbers mean what they mean there."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from latentdiff import Settings
from latentdiff.generation.infotext import infotext, parse_infotext

# As the web UIs take the last line apart.
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def read(prompt: str = "a fox", more: dict[str, Any] | None = None, **options: Any) -> tuple[list[str], dict[str, str]]:
    """Return the lines of a prompt, and the pairs of the last one."""
    settings = Settings(prompts=(prompt,), height=64, width=32, **options)
    record = {
        "model": "embedded",
        "model_hash": "0123456789abcdef",
        "version": "1",
        **settings.record(0),
        **(more or {}),
    }
    *lines, last = infotext(record).split("\n")
    pairs = {key: json.loads(value) if value.startswith('"') else value for key, value in PAIR.findall(last)}
    return lines, pairs


@pytest.mark.parametrize("model", ["my models, v1: final", 'a "b" c', "a: b", "\\\\share\\x, y"])
def test_names_with_signs_of_the_format_come_back(model: str) -> None:
    _, pairs = read(more={"model": model})
    assert pairs["Model"] == model and list(pairs) == [
        *("Steps", "Sampler", "CFG scale", "Seed", "Size", "Model", "Model hash", "Version")
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"hires": 2, "hires_strength": 0.4}, {"Size": "32x64", "Hires upscale": "2", "Denoising strength": "0.4"}),
        ({"outpaint": {"left": 16, "top": 8}}, {"Size": "48x72"}),
        ({"clip_skip": 1}, {"Clip skip": "2"}),
        ({"sampler": "ddim", "eta": 0.5}, {"Sampler": "DDIM", "Eta DDIM": "0.5"}),
        ({"sampler": "dpmpp_2m_karras"}, {"Sampler": "DPM++ 2M", "Schedule type": "Karras"}),
        ({"sampler": "dpmpp_sde"}, {"Sampler": "DPM++ SDE"}),
        ({"timesteps": (999, 500)}, {"Steps": "2"}),
        ({"guidance_rescale": 0.7}, {"CFG Rescale phi": "0.7"}),
        ({"variation_strength": 0.3, "variation_seed": 7}, {"Variation seed": "7", "Variation seed strength": "0.3"}),
    ],
)
def test_options_are_called_and_counted_as_there(options: dict[str, Any], expected: dict[str, str]) -> None:
    _, pairs = read(**options)
    assert expected.items() <= pairs.items()


@pytest.mark.parametrize("line", ["Negative prompt: no", "Steps: 3, Seed: 5"])
def test_a_line_of_a_prompt_is_taken_for_no_other(line: str) -> None:
    lines, pairs = read(f"a fox\n{line}", negative_prompt="a cat")
    assert lines == ["a fox", f" {line}", "Negative prompt: a cat"] and pairs["Seed"] == "0"


def test_what_is_written_is_read() -> None:
    lines, pairs = read("a fox,\na cat", {"model": 'a "b", c: d'}, negative_prompt="rain\nsnow", clip_skip=1)
    found = parse_infotext(
        "\n".join([*lines, ", ".join(f"{key}: {json.dumps(value)}" for key, value in pairs.items())])
    )
    assert found == {"Prompt": "a fox,\na cat", "Negative prompt": "rain\nsnow", **pairs}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ("a fox", {"Prompt": "a fox"}),
        ("a fox: red, big", {"Prompt": "a fox: red, big"}),
        ("Negative prompt: rain", {"Negative prompt": "rain"}),
        ("fox\nSteps: 2, Sampler: Euler, Seed: 7", {"Prompt": "fox", "Steps": "2", "Sampler": "Euler", "Seed": "7"}),
        ('Steps: 2, A: "\\q", B: "x', {"Steps": "2", "A": '"\\q"', "B": '"x'}),
        ('Steps: 2, A: "\\ud800", B: 1', {"Steps": "2", "A": "?", "B": "1"}),
    ],
)
def test_texts_of_other_tools(text: str, found: dict[str, str]) -> None:
    assert parse_infotext(text) == found


def test_a_long_text_is_read_at_once() -> None:
    for text in ("a" * 10**6, "a:" * 10**5, 'a: "' + "\\" * 10**5, ("a " * 100 + ": ,") * 1000):
        assert parse_infotext(text) == {"Prompt": text}

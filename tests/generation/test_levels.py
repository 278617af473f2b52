"""Steps by hand: `timesteps` and `sigmas` of a call, what contradicts them, and that pictures say and replay them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler
from PIL import Image

from latentdiff import Pipeline, Settings
from latentdiff.checkpoints import load_pipeline
from latentdiff.cli import main
from latentdiff.errors import InputError
from latentdiff.generation.result import read_record
from latentdiff.images import open_image, read_texts

TIMESTEPS = (999, 850, 545, 233, 24)
SIGMAS = (14.6, 6.4, 2.0, 0.6, 0.05, 0.0)


def drawn(pipe: Pipeline, **options: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few steps
        return pipe("the red fox", output_type="latent", guidance_scale=3, **options).images  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("sampler", "scheduler", "levels"),
    [
        ("euler", EulerDiscreteScheduler, {"timesteps": TIMESTEPS}),
        ("lcm", LCMScheduler, {"timesteps": (999, 499)}),
        ("euler", EulerDiscreteScheduler, {"sigmas": SIGMAS}),
        ("euler", EulerDiscreteScheduler, {"sigmas": SIGMAS[:-1]}),
    ],
)
def test_scheduler_objects_take_the_same_steps_as_the_tables(
    pipe: Pipeline, sampler: str, scheduler: Any, levels: dict[str, Any]
) -> None:
    theirs = scheduler.from_config(pipe.components.schedule.to_dict())
    options: dict[str, Any] = {"num_images": 2, "seed": 3, **levels}
    torch.testing.assert_close(
        drawn(pipe, sampler=theirs, **options), drawn(pipe, sampler=sampler, **options), atol=1e-2, rtol=0
    )


def test_even_steps_written_out_are_the_even_steps(pipe: Pipeline) -> None:
    even = pipe.components.schedule.discretize(6, "ddim")
    expected = drawn(pipe, sampler="ddim", num_inference_steps=6)
    by_timesteps = drawn(pipe, sampler="ddim", timesteps=even.timesteps.tolist())
    torch.testing.assert_close(by_timesteps, expected, atol=0, rtol=0)
    by_sigmas = drawn(pipe, sampler="ddim", sigmas=even.sigmas.tolist())
    torch.testing.assert_close(by_sigmas, expected, atol=1e-3, rtol=0)


def test_strength_and_two_passes_leave_out_the_first_of_them(pipe: Pipeline) -> None:
    picture, calls = Image.new("RGB", (32, 32), "red"), list[tuple[int, int]]()
    for options in ({"image": picture, "strength": 0.6}, {"hires": 2, "hires_strength": 0.4}):
        drawn(pipe, timesteps=TIMESTEPS, callback=lambda done, total, _: calls.append((done, total)), **options)
    assert (calls[2], len(calls)) == ((3, 3), 3 + 5 + 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": (5, 9)}, "timesteps must fall, got 5 and then 9; sort them"),
        ({"timesteps": (5, 5)}, "timesteps must fall, got 5 and then 5"),
        ({"timesteps": ()}, "timesteps must be 1 to 1001 numbers that fall, got 0 of them"),
        ({"timesteps": "999"}, "timesteps must be 1 to 1001 numbers that fall, got '999'"),
        ({"timesteps": range(10**9)}, "timesteps must be 1 to 1001 numbers that fall"),
        ({"sigmas": [1] * 5000}, "sigmas must be 1 to 1001 numbers that fall, got 5000 of them"),
        ({"sigmas": (3, float("nan"))}, "sigmas must be a finite number of at least 0, got nan"),
        ({"sigmas": (3, -1)}, "sigmas must be a finite number of at least 0, got -1"),
        ({"sigmas": (0,)}, "sigmas must start above 0, got 0 alone"),
        ({"sigmas": (3,), "timesteps": (9,)}, "timesteps and sigmas both say where the steps are, got both"),
        ({"timesteps": (9, 5), "num_inference_steps": 3}, "timesteps are 2 steps, got num_inference_steps 3 besides"),
        (
            {"sigmas": (9, 5), "sampler": "euler_karras"},
            "sigmas are given, so euler_karras cannot space them; leave _k",
        ),
        ({"timesteps": (9, 5), "strength": 0.3}, "strength must leave at least one of 2 steps, got 0.3"),
        ({"timesteps": (9, 5), "eta": 0.3}, "eta is an option of ddim"),
        (
            {"timesteps": (9, 5), "sampler": "heun", "resampling": 3},
            "resampling needs a sampler that calls the network",
        ),
    ],
)
def test_what_no_model_could_draw_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Settings(prompts=("a fox",), **options)
    assert len(str(caught.value)) <= 300


def test_the_model_says_how_high_they_start(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="timesteps must fall from at most 999 to at least 0, got 1000, 3"):
        drawn(pipe, timesteps=(1000, 3))
    with pytest.raises(InputError, match=r"sigmas must fall from at most .* got 1e\+09, 1"):
        drawn(pipe, sigmas=(1e9, 1))
    ddim, euler = (
        kind.from_config(pipe.components.schedule.to_dict()) for kind in (DDIMScheduler, EulerDiscreteScheduler)
    )
    with pytest.raises(InputError, match="DDIMScheduler takes no timesteps by hand; leave them out"):
        drawn(pipe, sampler=ddim, timesteps=TIMESTEPS)
    spaced = EulerDiscreteScheduler.from_config(euler.config, use_karras_sigmas=True)
    with pytest.raises(InputError, match="EulerDiscreteScheduler cannot take these timesteps: Cannot set `timesteps`"):
        drawn(pipe, sampler=spaced, timesteps=TIMESTEPS)


def test_they_stand_in_for_the_number_of_steps(built_model: Path) -> None:
    """That of the model too; the record has how many there are."""
    components = replace(load_pipeline(built_model), defaults={"num_inference_steps": 7})
    result = Pipeline(components)("the red fox", timesteps=TIMESTEPS, sampler="ddim")
    assert (result.settings["num_inference_steps"], result.settings["sigmas"]) == (5, None)
    settings = Settings.from_record(result.record(0))
    assert (settings.timesteps, settings.num_inference_steps) == (TIMESTEPS, 5)


@pytest.mark.parametrize("flag", ["--timesteps=999,850,545,233,24", "--sigmas=14.6,6.4,2.0,0.6"])
def test_the_command_line_draws_and_replays_them(built_model: Path, tmp_path: Path, flag: str) -> None:
    out, again = tmp_path / "a.png", tmp_path / "b.png"
    call = ["generate", "the red fox", "--model", str(built_model), "--sampler", "dpmpp_2m", "-o", str(out)]
    assert main([*call, flag]) == 0
    name, _, values = flag.removeprefix("--").partition("=")
    record = read_record(out)
    assert record[name] == [float(value) for value in values.split(",")] and record["num_inference_steps"] in (4, 5)
    assert f"Steps: {record['num_inference_steps']}," in read_texts(out)["parameters"]
    assert main(["replay", str(out), "--model", str(built_model), "-o", str(again)]) == 0
    assert np.array_equal(np.asarray(open_image(out)), np.asarray(open_image(again)))


def test_odd_lists_on_the_command_line_are_one_line(built_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--timesteps=9;5", "--sigmas=", "--timesteps=5,9", "--steps=4 --timesteps=9,5"):
        assert main(["generate", "a fox", "--model", str(built_model), *flag.split()]) == 2
        assert capsys.readouterr().err.count("\n") == 1

"""Every generation option is declared once, and every door has it from there."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentdiff import Pipeline, Settings
from latentdiff.cli import main
from latentdiff.commands import generate, upscale
from latentdiff.errors import InputError
from latentdiff.generation.options import BOTH, options_of
from latentdiff.generation.result import read_record
from latentdiff.generation.rules import check_inputs

# Options that the command line has in another form: --size.
NO_FLAG = {"height", "width"}


def test_the_pipeline_documents_every_option_with_its_default() -> None:
    parameters = inspect.signature(Pipeline.__call__).parameters
    for item in fields(Settings):
        if "option" in item.metadata:
            assert parameters[item.name].default == item.default
            assert f"    {item.name}: {item.metadata['option'].help}." in (Pipeline.__call__.__doc__ or "")


def test_the_command_line_has_every_option_for_the_models_that_take_it() -> None:
    for command, tasks in ((generate, {"text_to_image", "inpaint"}), (upscale, {"upscale"})):
        parser = argparse.ArgumentParser()
        command.add_options(parser)
        offered = {action.dest: action for action in parser._actions}
        for name, declared in options_of(Settings).items():
            if name not in NO_FLAG and tasks & set(declared.tasks) and (command, name) != (upscale, "num_images"):
                assert declared.help.replace("%", "%%") in str(offered[name].help), name


def test_help_texts_are_one_or_two_lines() -> None:
    for name, declared in options_of(Settings).items():
        assert 10 < len(declared.help) <= 120 and not declared.help.endswith("."), name
        assert set(declared.tasks) <= set(BOTH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_interval": (5, 0.3)}, r"guidance_interval must rise, got \(5, 0.3\); try \(0.3, 5\)"),
        ({"eta": 0.5}, "eta is an option of ddim"),
        ({"resampling": 2, "sampler": "unipc"}, "resampling needs a sampler that calls the network once a step"),
        ({"sampler": "lcm", "num_inference_steps": 200}, "lcm"),
        ({"strength": 0.001}, "strength must leave at least one of 25 steps"),
        ({"hires": 2, "hires_strength": 0.001}, "strength must leave at least one of 25 steps"),
        ({"guidance_scale": 10**400}, "guidance_scale must be a finite number from 0 to 50"),
        ({"seed": 10**5000}, "seed must be a whole number"),
        ({"num_inference_steps": np.arange(2)}, "num_inference_steps must be a whole number"),
        ({"sampler": "x" * 10**5}, "sampler 'x"),
        ({"guidance_schedule": [1]}, "guidance_schedule"),
    ],
)
def test_what_no_model_could_draw_is_refused_without_one(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Settings(prompts=("a fox",), **options)
    assert len(str(caught.value)) <= 600


def test_numbers_of_numpy_are_numbers() -> None:
    settings = Settings(prompts=("a",), guidance_scale=np.float32(7.5), seed=np.int64(3))  # type: ignore[arg-type]
    assert (type(settings.guidance_scale), type(settings.seed)) == (float, int)


def test_what_an_option_needs_is_said_in_the_words_of_the_door() -> None:
    names = {"feather": "--feather", "image": "--image", "mask": "--mask", "outpaint": "--outpaint"}
    with pytest.raises(InputError, match=r"--feather .* got no --image; add it"):
        check_inputs({"feather": 3}, image=False, mask=False, names=names)
    with pytest.raises(InputError, match=r"feather softens the edge .*, got no mask and no outpaint"):
        check_inputs({"feather": 3}, image=True, mask=False)
    check_inputs({"feather": 0, "strength": 1.0, "outpaint": None}, image=False, mask=False)  # the defaults


def test_options_of_other_tasks_are_refused(pipe: Pipeline) -> None:
    for options in ({"noise_level": 3}, {"scale": 2}, {"correction": "full"}):
        with pytest.raises(InputError, match=f"{next(iter(options))} is for models that enlarge a picture"):
            pipe("a fox", **options)
    with pytest.raises(TypeError, match="no option 'guidance'; did you mean"):
        pipe("a fox", guidance=3)


def test_settings_left_to_the_command_line_reach_the_picture(built_model: Path, tmp_path: Path) -> None:
    flags = [
        "--guidance-interval",
        "0.1,5",
        "--guidance-schedule",
        "cosine",
        "--guidance-parallel",
        "0.5",
        "--clip-skip",
    ]
    more = ["0", "--variation-strength", "0.3", "--variation-seed", "7", "--blend-prompt", "cat", "--blend", "0.25"]
    out = tmp_path / "a.png"
    call = ["generate", "(fox", "--model", str(built_model), "--steps", "2", "--no-prompt-weights", "-o", str(out)]
    assert main([*call, *flags, *more, "--guidance-limit", "9", "--guidance-rescale", "0.2"]) == 0
    record = read_record(out)
    assert (record["guidance_interval"], record["guidance_schedule"], record["blend"]) == ([0.1, 5], "cosine", 0.25)
    assert (record["variation_strength"], record["prompt_weights"], record["guidance_limit"]) == (0.3, False, 9)


def test_notations_of_other_tools_are_said_to_be_plain_text(
    built_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["generate", "a fox BREAK <lora:style:0.8>", "--model", str(built_model), "--steps", "1"]
    assert main([*call, "-n", "2", "-o", str(tmp_path / "a.png")]) == 0
    said = capsys.readouterr().err
    assert said.count("BREAK") == 1 and said.count("<lora:style:0.8>") == 1
    assert main([*call, "--no-prompt-weights", "-o", str(tmp_path / "b.png")]) == 0
    assert capsys.readouterr().err == ""


def test_a_sampler_that_is_unstable_on_a_schedule_is_told_of(pipe: Pipeline) -> None:
    (note,) = pipe("a fox", sampler="heun", num_inference_steps=8).notes
    assert note.startswith("heun in 15 calls leaves noise or is unstable: Gaussian data would come out with ")
    assert pipe("a fox", sampler="dpmpp_2m", num_inference_steps=8).notes == []

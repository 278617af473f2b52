"""What diffusers' classes take where a config is silent, and what its pipelines change: the same noise levels."""

from __future__ import annotations

import ast
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from latentdiff import Pipeline
from latentdiff.checkpoints import load_schedule
from latentdiff.diffusion import NoiseSchedule, make_plan
from latentdiff.diffusion.scheduler_classes import CLASS_DEFAULTS, VP_SCHEDULERS
from tests.checkpoints.test_single_file import components_of, tiny

PROCESS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type", "steps_offset")
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
OFFSET_WARNING = "ignore:.*steps_offset:FutureWarning"
# diffusers takes numpy's functions of tensors.
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")]


def class_defaults() -> dict[str, dict[str, Any]]:
    """Read the defaults of every scheduler from its source, because some cannot be imported without more packages."""
    origin = importlib.util.find_spec("diffusers").origin  # type: ignore[union-attr]
    assert origin is not None
    found = {}
    for path in (Path(origin).parent / "schedulers").glob("scheduling_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef) or node.name not in VP_SCHEDULERS:
                continue
            (init,) = (part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__")
            names = [argument.arg for argument in init.args.args][-len(init.args.defaults) :]
            found[node.name] = {
                name: ast.literal_eval(value) for name, value in zip(names, init.args.defaults) if name in PROCESS
            }
    return found


def test_the_table_of_class_defaults_is_that_of_diffusers() -> None:
    found, plain = class_defaults(), NoiseSchedule()
    assert set(found) == set(VP_SCHEDULERS)
    for name, defaults in found.items():
        different = {key: value for key, value in defaults.items() if value != getattr(plain, key)}
        assert different == CLASS_DEFAULTS.get(name, {}), name


@pytest.fixture(scope="module", params=["Stable Diffusion 1.x", "Stable Diffusion XL"])
def ours(request: pytest.FixtureRequest) -> Pipeline:
    return Pipeline(components_of(tiny(request.param)))


@pytest.mark.parametrize("name", [name for name in VP_SCHEDULERS if name != "DPMSolverSDEScheduler"])
def test_a_config_of_defaults_keeps_its_noise_process(name: str) -> None:
    """Read, and written again: the tables of diffusers' own class."""
    schedule, scheduler = NoiseSchedule.from_dict({"_class_name": name}), getattr(diffusers, name)()
    again = getattr(diffusers, name).from_config(schedule.to_dict())
    for table in (schedule.alphas_cumprod, again.alphas_cumprod):
        np.testing.assert_allclose(table, scheduler.alphas_cumprod, rtol=3e-5)
    assert again.config.get("set_alpha_to_one") == scheduler.config.get("set_alpha_to_one")


@pytest.mark.parametrize("scheduler", [diffusers.LCMScheduler(), diffusers.HeunDiscreteScheduler()])
def test_an_object_of_defaults_keeps_its_noise_process(ours: Pipeline, scheduler: Any, tmp_path: Path) -> None:
    peer = ours.to_diffusers()
    peer.scheduler = scheduler
    pipe = Pipeline.from_diffusers(peer)
    pipe.save_pretrained(tmp_path / "model")
    for schedule in (pipe.components.schedule, load_schedule(tmp_path / "model")):
        np.testing.assert_allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod, rtol=3e-5)


@pytest.mark.filterwarnings(OFFSET_WARNING)
def test_the_offset_that_pipelines_force(ours: Pipeline, tmp_path: Path) -> None:
    """Pipelines of Stable Diffusion make it 1 whatever the config says, those of XL leave it: objects and folders."""
    components, folder = ours.to_diffusers().components, tmp_path / "scheduler"
    large = "text_encoder_2" in components
    folder.mkdir()
    ours.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    kinds = ("StableDiffusionXLPipeline",) if large else ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline")
    for kind in kinds:
        (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": kind}))
        for options in ({}, {"steps_offset": 0}, {"timestep_spacing": "leading"}, {"steps_offset": 1}):
            scheduler = diffusers.DDIMScheduler(**STABLE, **options)  # type: ignore[arg-type]
            config = {"_class_name": "DDIMScheduler", **STABLE, **options}
            (folder / "scheduler_config.json").write_text(json.dumps(config))
            more = {} if large else {"requires_safety_checker": False}
            peer = getattr(diffusers, kind)(**{**components, "scheduler": scheduler}, **more)
            peer.scheduler.set_timesteps(10)
            for schedule in (load_schedule(tmp_path), Pipeline.from_diffusers(peer).components.schedule):
                assert make_plan(schedule, "ddim", 10).timesteps.tolist() == peer.scheduler.timesteps.tolist()
                leading = "timestep_spacing" in options
                assert make_plan(schedule, "euler", 10).timesteps[-1] == (leading and not large)


@pytest.mark.filterwarnings(OFFSET_WARNING)
def test_a_model_without_offset_is_bridged_without_one(ours: Pipeline) -> None:
    """What diffusers draws of our model is what we draw, though its pipelines would add an offset."""
    schedule = NoiseSchedule(timestep_spacing="leading")
    peer = Pipeline(replace(ours.components, schedule=schedule)).to_diffusers()
    peer.scheduler.set_timesteps(10)
    assert peer.scheduler.timesteps.tolist() == make_plan(schedule, "ddim", 10).timesteps.tolist()
    assert Pipeline.from_diffusers(peer).components.schedule.steps_offset == 0

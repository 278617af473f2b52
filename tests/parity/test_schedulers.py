"""Our tables against diffusers' schedulers: same timesteps, same trajectories, same seeds.

Trajectories are compared after every step in VP coordinates, with a fixed nonlinear network. diffusers computes tables
in float32, and Euler and DPM++ 2M x too; the fixture `float64` lifts that, so that the mathematics is compared.
Where diffusers is not reproduced, the tests named `test_quirk_*` show what it does and say why.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from latentdiff.diffusion import (
    SAMPLERS,
    NoiseSchedule,
    Plan,
    as_denoiser,
    draw_noise,
    image_generator,
    make_plan,
    sample,
    start,
)
from latentdiff.diffusion.discretization import DISCRETIZATION_RULES

PEERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "dpm2": KDPM2DiscreteScheduler,
    "dpm2_a": KDPM2AncestralDiscreteScheduler,
    "lms": LMSDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "dpmpp_2m_sde": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "deis": DEISMultistepScheduler,
    "plms": PNDMScheduler,
    "lcm": LCMScheduler,
}
BETAS: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
# Peers that keep x in sigma coordinates; the others keep it in VP coordinates.
IN_SIGMA_COORDINATES = ("euler", "euler_a", "heun", "dpm2", "dpm2_a", "lms")
SPACINGS = ("leading", "linspace", "trailing")
SHAPE = (2, 4, 4)
SEEDS = (3, 4)
TOLERANCE = 1e-6
TOLERANCES = {"lcm": 1e-4}  # diffusers computes its boundary scalings in float32
# diffusers takes numpy's functions of tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")


def network(x: Tensor, timesteps: Tensor) -> Tensor:
    """A nonlinear network in VP coordinates whose output has values of order 1."""
    time = torch.as_tensor(timesteps, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return 0.8 * torch.sin(1.3 * x + 0.003 * time) + 0.2 * x.roll(1, -1)


def config(betas: str, prediction_type: str = "epsilon", **more: Any) -> dict[str, Any]:
    return {**BETAS[betas], "prediction_type": prediction_type, **more}


def peer(sampler: str, values: dict[str, Any], **more: Any) -> Any:
    if sampler in ("ddim", "ddpm"):
        more["clip_sample"] = False
    if sampler == "dpmpp_2m_sde":
        more["algorithm_type"] = "sde-dpmsolver++"
    if sampler == "plms":
        more |= {"skip_prk_steps": True, "set_alpha_to_one": values.get("set_alpha_to_one", True)}
    accepted = inspect.signature(PEERS[sampler]).parameters
    return PEERS[sampler](**{key: value for key, value in values.items() if key in accepted}, **more)


def peer_run(
    scheduler: Any,
    steps: int,
    noise: Tensor,
    generators: list[torch.Generator],
    *,
    eta: float = 0.0,
    image_latents: Tensor | None = None,
    strength: float = 1.0,
) -> list[Tensor]:
    """Run a scheduler as diffusers' text-to-image and image-to-image pipelines do; x after every step."""
    scheduler.set_timesteps(steps)
    first = max(steps - min(int(steps * strength), steps), 0) * scheduler.order
    timesteps = scheduler.timesteps[first:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    if image_latents is None:
        x = noise * scheduler.init_noise_sigma
    else:
        x = scheduler.add_noise(image_latents, noise, timesteps[:1].repeat(len(noise)))
    offered = {"eta": eta, "generator": generators}
    options = {key: offered[key] for key in inspect.signature(scheduler.step).parameters if key in offered}
    states = []
    for timestep in timesteps:
        output = network(scheduler.scale_model_input(x, timestep), timestep)
        x = scheduler.step(output, timestep, x, **options).prev_sample
        states.append(x)
    return states


def our_run(
    schedule: NoiseSchedule,
    plan: Plan,
    noise: Tensor,
    generators: list[torch.Generator],
    image_latents: Tensor | None = None,
) -> list[Tensor]:
    """Run a plan; x in VP coordinates after every step."""
    denoise = as_denoiser(lambda x, call: network(x, call.timesteps), schedule.prediction_type)
    states = [step.x for step in sample(denoise, plan, start(plan, noise, image_latents), generators)]
    return [x / (1 + sigma**2) ** 0.5 for x, sigma in zip(states, [*plan.sigmas[1:].tolist(), 0.0])]


def largest_difference(
    sampler: str,
    values: dict[str, Any],
    steps: int,
    *,
    eta: float = 0.0,
    from_image: bool = False,
    strength: float = 1.0,
    dtype: torch.dtype = torch.float64,
    **peer_values: Any,
) -> float:
    """Run both with the same seeds and return the largest difference of x in VP coordinates, relative above 1."""
    name = sampler.removesuffix("_karras").removesuffix("_exponential").removesuffix("_beta")
    schedule = NoiseSchedule(**values)
    plan = make_plan(schedule, sampler, steps, eta=eta, strength=strength)
    runs = []
    for ours in (True, False):
        generators = [image_generator(seed) for seed in SEEDS]
        noise = draw_noise(generators, SHAPE).to(dtype)
        image_latents = torch.sin(torch.arange(noise.numel(), dtype=dtype)).reshape(noise.shape) if from_image else None
        if ours:
            runs.append(our_run(schedule, plan, noise, generators, image_latents))
        else:
            scheduler = peer(name, values, **peer_values)
            states = peer_run(
                scheduler, steps, noise, generators, eta=eta, image_latents=image_latents, strength=strength
            )
            if name in IN_SIGMA_COORDINATES:
                sigmas = [*plan.sigmas[1:].tolist(), 0.0]
                states = [x / (1 + sigma**2) ** 0.5 for x, sigma in zip(states, sigmas)]
            runs.append(states)
    assert len(runs[0]) == len(runs[1])
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(*runs))


class Double:
    """A module (torch or numpy) in which float32 means float64."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, "float64" if name == "float32" else name)


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let diffusers keep tables and x in float64, and draw noise in float32 as we do: dtypes have different streams."""

    def draw(shape: Any, generator: Any = None, dtype: Any = None, **_: Any) -> Tensor:
        return draw_noise(generator, shape[1:]).to(dtype)

    for scheduler in PEERS.values():
        module = sys.modules[scheduler.__module__]
        monkeypatch.setattr(module, "torch", Double(torch))
        monkeypatch.setattr(module, "np", Double(np))
        monkeypatch.setattr(module, "randn_tensor", draw, raising=False)  # not all draw noise


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("betas", list(BETAS))
@pytest.mark.parametrize("steps", [8, 1000])
@pytest.mark.usefixtures("float64")
def test_variances_of_ddpm(variance: str, betas: str, steps: int) -> None:
    """A network that learns its variance has twice the channels; with fixed ones diffusers takes no such network."""
    values = config(betas, timestep_spacing="leading", variance_type=variance)
    schedule, scheduler = NoiseSchedule.from_dict({**values, "_class_name": "DDPMScheduler"}), peer("ddpm", values)

    def outputs(x: Tensor, timesteps: Any) -> Tensor:
        prediction = network(x, timesteps)
        return torch.cat([prediction, prediction.roll(1, 1).tanh()], dim=1) if "learned" in variance else prediction

    plan, runs = make_plan(schedule, "ddpm", steps), []
    for ours in (True, False):
        generators = [image_generator(seed) for seed in SEEDS]
        noise = draw_noise(generators, SHAPE).double()
        if ours:
            denoise = as_denoiser(lambda x, call: outputs(x, call.timesteps), "epsilon")
            *_, final = sample(denoise, plan, start(plan, noise), generators)
            runs.append(final.x)
        else:
            scheduler.set_timesteps(steps)
            x = noise
            for timestep in scheduler.timesteps:
                x = scheduler.step(outputs(x, timestep), timestep, x, generator=generators).prev_sample
            runs.append(x)
    assert float((runs[0] - runs[1]).abs().max() / runs[1].abs().max().clamp(min=1)) < TOLERANCE


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("betas", list(BETAS))
@pytest.mark.usefixtures("float64")
def test_estimates_of_pixels_are_clamped(sampler: str, betas: str) -> None:
    """What diffusers calls clip_sample."""
    values = config(betas, timestep_spacing="leading")
    schedule, scheduler = NoiseSchedule(**values), PEERS[sampler](**values, clip_sample=True)
    plan, generators = make_plan(schedule, sampler, 20), [image_generator(seed) for seed in SEEDS]
    noise = draw_noise(generators, SHAPE).double()
    denoise = as_denoiser(lambda x, call: network(x, call.timesteps), "epsilon", limit=1.0)
    *_, final = sample(denoise, plan, start(plan, noise), generators)
    assert final.x.abs().max() <= 1 + 1e-9
    generators = [image_generator(seed) for seed in SEEDS]
    x = draw_noise(generators, SHAPE).double()
    # Unless told, its DDIM clamps the estimate but keeps the noise that goes with the other one.
    options: dict[str, Any] = {"generator": generators} if sampler == "ddpm" else {"use_clipped_model_output": True}
    scheduler.set_timesteps(20)
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, timestep), timestep, x, **options).prev_sample
    torch.testing.assert_close(final.x, x, atol=TOLERANCE, rtol=0)


def cases() -> list[Any]:
    """sampler x schedule x prediction x spacing x steps, where both are defined (exceptions: the quirks below)."""
    chosen = []
    for sampler in PEERS:
        for betas in BETAS:
            for prediction_type in ("epsilon", "v_prediction", "sample"):
                for spacing in SPACINGS:
                    for steps in (1, 8, 25) if sampler != "lcm" else (1, 4, 8):
                        if prediction_type == "sample" and sampler in ("euler_a", "dpm2", "dpm2_a", "plms"):
                            continue  # diffusers: not implemented
                        if sampler == "plms" and (spacing != "leading" or prediction_type != "epsilon"):
                            continue  # test_quirk_ddim_previous_timestep, test_quirk_plms_of_velocities
                        if sampler == "lcm" and spacing != "trailing":
                            continue  # it has a spacing of its own
                        rounds = DISCRETIZATION_RULES[SAMPLERS[sampler].rule].one_more_point
                        if spacing == "linspace" and (sampler == "ddim" or (steps == 1 and not rounds)):
                            continue  # test_quirk_ddim_previous_timestep, test_quirk_linspace_of_one_step
                        chosen.append((sampler, betas, prediction_type, spacing, steps))
    return chosen


@pytest.mark.long
@pytest.mark.parametrize(("sampler", "betas", "prediction_type", "spacing", "steps"), cases())
def test_trajectory(float64: None, sampler: str, betas: str, prediction_type: str, spacing: str, steps: int) -> None:
    values = config(betas, prediction_type, timestep_spacing=spacing, steps_offset=1)
    assert largest_difference(sampler, values, steps) < (
        1e-4 if sampler == "lcm" else TOLERANCE
    )  # its boundary scalings are float32 there


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_ddim_of_stable_diffusion(float64: None, eta: float, set_alpha_to_one: bool) -> None:
    values = config("scaled_linear", timestep_spacing="leading", steps_offset=1, set_alpha_to_one=set_alpha_to_one)
    assert largest_difference("ddim", values, 30, eta=eta) < TOLERANCE


@pytest.mark.parametrize("betas", list(BETAS))
def test_ddpm_on_all_timesteps(float64: None, betas: str) -> None:
    assert largest_difference("ddpm", config(betas, "v_prediction"), 1000) < TOLERANCE


@pytest.mark.parametrize("sampler", ["euler_karras", "dpmpp_2m_karras"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [2, 15])
def test_karras_spacing(float64: None, sampler: str, spacing: str, steps: int) -> None:
    values = config("scaled_linear", "v_prediction", timestep_spacing=spacing, steps_offset=1)
    assert largest_difference(sampler, values, steps, use_karras_sigmas=True) < TOLERANCE
    scheduler = peer(sampler.removesuffix("_karras"), values, use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    expected = make_plan(NoiseSchedule(**values), sampler, steps)
    np.testing.assert_allclose(scheduler.timesteps.double(), expected.timesteps, atol=1e-2)
    np.testing.assert_allclose(scheduler.sigmas[:-1], expected.sigmas, rtol=1e-4)


@pytest.mark.parametrize("spacing", ["exponential", "beta"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "lms", "dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_sigma_spacings(float64: None, sampler: str, spacing: str) -> None:
    values = config("scaled_linear", "v_prediction", timestep_spacing="leading", steps_offset=1)
    options: dict[str, Any] = {f"use_{spacing}_sigmas": True}
    # diffusers cuts the timesteps of DPM++ and UniPC to integers, Karras apart; we round them to the nearest.
    rounds = DISCRETIZATION_RULES[SAMPLERS[sampler].rule].whole_timesteps
    assert largest_difference(f"{sampler}_{spacing}", values, 12, **options) < (0.01 if rounds else TOLERANCE)


def test_flow_matching(float64: None) -> None:
    """Euler in sigma coordinates is Euler along the straight lines of flow matching."""
    schedule = NoiseSchedule(beta_schedule="flow", prediction_type="flow_prediction", timestep_spacing="trailing")
    plan = make_plan(schedule, "euler", 10)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=(plan.sigmas / (1 + plan.sigmas)).tolist())  # noise rates
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoise = as_denoiser(lambda x, call: network(x, call.timesteps), schedule.prediction_type)
    *_, ours = sample(denoise, plan, start(plan, noise))
    x = noise * float(plan.sigmas[0] / (1 + plan.sigmas[0]))  # 4096 stands for infinity
    for theirs, told in zip(scheduler.timesteps, plan.timesteps):
        assert float(theirs) == pytest.approx(float(told) + 1, abs=0.3)  # diffusers counts from 1
        x = scheduler.step(network(x, told), theirs, x).prev_sample
    torch.testing.assert_close(ours.x, x, atol=1e-5, rtol=0)


def test_stochastic_two_stage_solver(float64: None) -> None:
    """Without its noise, which diffusers draws from a Brownian tree of its own."""
    pytest.importorskip("torchsde")
    values = config("scaled_linear", "epsilon", timestep_spacing="trailing")
    schedule, scheduler = NoiseSchedule(**values), DPMSolverSDEScheduler(**values)
    plan = make_plan(schedule, "dpmpp_sde", 10)
    plan = replace(plan, noise=torch.zeros_like(plan.noise))
    noise = draw_noise([image_generator(0)], SHAPE).double()
    ours = our_run(schedule, plan, noise, [])
    scheduler.set_timesteps(10)
    x = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, timestep), timestep)
        x = scheduler.step(output, timestep, x, s_noise=0.0).prev_sample
    torch.testing.assert_close(ours[-1], x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampler", [name for name in PEERS if name not in ("plms", "lcm")])  # quirks, both
@pytest.mark.parametrize("strength", [0.04, 0.3, 0.58, 0.999, 1.0])
def test_image_to_image(float64: None, sampler: str, strength: float) -> None:
    values = config("scaled_linear", timestep_spacing="leading", steps_offset=1)
    difference = largest_difference(sampler, values, 50, from_image=True, strength=strength)
    if strength < 1 and (sampler == "lms" or (sampler == "deis" and strength == 0.04)):
        assert (
            difference > 1e-3
        )  # quirks: both count steps that were skipped, LMS to pick weights for slopes it has not
    else:
        assert difference < TOLERANCE


@pytest.mark.parametrize(
    "sampler", [name for name in PEERS if "rescale_betas_zero_snr" in inspect.signature(PEERS[name]).parameters]
)
def test_zero_terminal_snr(float64: None, sampler: str) -> None:
    values = config("scaled_linear", "v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    assert largest_difference(sampler, values, 20) < 1e-6  # DDIM and DDPM: 2^30 stands for infinity


@pytest.mark.parametrize("sampler", list(PEERS))
def test_seed_means_what_it_means_in_diffusers(sampler: str) -> None:
    """Nothing patched: a list of CPU generators and float32, as a user of diffusers would have it."""
    prediction = "epsilon" if sampler == "plms" else "v_prediction"
    spacing = "leading" if sampler == "plms" else "trailing"
    values = config("scaled_linear", prediction, timestep_spacing=spacing)
    assert largest_difference(sampler, values, 20, eta=1.0 if sampler == "ddim" else 0.0, dtype=torch.float32) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("sampler", list(PEERS))
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps(sampler: str, spacing: str, offset: int) -> None:
    """The same timesteps at the step counts that people use, and at odd ones."""
    values = config("scaled_linear", timestep_spacing=spacing, steps_offset=offset)
    scheduler, schedule = peer(sampler, values), NoiseSchedule(**values)
    odd = [23, 28, 35, 37, 47, 64, 75, 83, 97, 119, 333, 700]  # of which 1,000 is no multiple
    for steps in range(2, 51) if sampler == "lcm" else [*range(2, 21), 25, 30, 40, 50, 100, 120, 250, 500, *odd]:
        scheduler.set_timesteps(steps)
        expected = scheduler.timesteps.double()
        ours = make_plan(schedule, sampler, steps).timesteps
        if spacing == "trailing" and expected[-1] == -1:
            expected, ours = expected[:steps], ours[:steps]  # test_quirk_trailing_makes_one_step_too_many
        # DPM2's timesteps between those of the grid are computed in float32 there.
        atol = 0.02 if sampler.startswith("dpm2") else 1e-3
        torch.testing.assert_close(ours, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("sampler", list(PEERS))
def test_spacing_left_open_is_that_of_the_peer(sampler: str) -> None:
    """A config without timestep_spacing means what it means to the scheduler class that diffusers would swap in."""
    pndm = PNDMScheduler(**BETAS["scaled_linear"], skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    scheduler = PEERS[sampler].from_config(pndm.config)
    scheduler.set_timesteps(20)
    saved = {key: value for key, value in pndm.config.items() if key not in pndm.config["_use_default_values"]}
    schedule = NoiseSchedule.from_dict({**saved, "_class_name": "PNDMScheduler"})
    plan = make_plan(schedule, sampler, 20)
    np.testing.assert_allclose(scheduler.timesteps.double(), plan.timesteps, atol=1e-2)
    unit = 1.0 if sampler in IN_SIGMA_COORDINATES else float((1 + plan.sigmas[0] ** 2).sqrt())
    assert plan.init_noise_sigma / unit == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-4)


@pytest.mark.parametrize("betas", list(BETAS))
@pytest.mark.parametrize("zero_snr", [False, True])
def test_training_tables(float64: None, betas: str, zero_snr: bool) -> None:
    values = config(betas, "v_prediction", rescale_betas_zero_snr=zero_snr)
    scheduler, schedule = DDPMScheduler(**values), NoiseSchedule(**values)
    np.testing.assert_allclose(scheduler.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-9, atol=1e-15)
    x0, noise = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    timesteps = torch.tensor([0, 500, 999])
    torch.testing.assert_close(schedule.add_noise(x0, noise, timesteps), scheduler.add_noise(x0, noise, timesteps))
    torch.testing.assert_close(schedule.target(x0, noise, timesteps), scheduler.get_velocity(x0, noise, timesteps))


@pytest.mark.parametrize("name", list(PEERS))
def test_saved_config_loads_in_diffusers(name: str) -> None:
    schedule = NoiseSchedule(
        **config("cosine", "v_prediction", timestep_spacing="trailing"), class_name=PEERS[name].__name__
    )
    saved = schedule.to_dict()
    assert NoiseSchedule.from_dict(saved).to_dict() == saved
    scheduler = PEERS[name].from_config(saved)
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.timestep_spacing == "trailing"
    np.testing.assert_allclose(scheduler.alphas_cumprod, schedule.alphas_cumprod, rtol=3e-5)


def test_quirk_ddim_previous_timestep(float64: None) -> None:
    """diffusers' DDIM steps to t - T // N, not to the next timestep at which it calls the network.

    The two differ under linspace, and under trailing where N does not divide T: x then has another noise level than
    the network is told. We step to the next timestep. The trajectories part by more than rounding.
    """
    values = config("scaled_linear", "v_prediction", timestep_spacing="trailing")
    assert largest_difference("ddim", values, 25) < TOLERANCE
    assert 1e-3 < largest_difference("ddim", values, 30) < 0.1
    assert 1e-3 < largest_difference("ddim", {**values, "timestep_spacing": "linspace"}, 25) < 0.1


def test_quirk_plms_of_velocities(float64: None) -> None:
    """diffusers' PNDM extrapolates what the network gives, and takes it for a velocity at the newest x only then.

    The paper extrapolates noise estimates, as we do whatever the network predicts.
    """
    values = config("scaled_linear", "v_prediction", timestep_spacing="leading")
    assert 1e-3 < largest_difference("plms", values, 25) < 2


def test_quirk_third_order_sde() -> None:
    """The curvature factor of diffusers' third-order SDE solver does not vanish with the step h; ours is the integral.

    The integral of the squared time, 2h exp(-2h (1 - s)) s^2 over s from 0 to 1, goes to 0 as 2h / 3.
    """
    step = 1e-3
    theirs = (1 - np.exp(-2 * step) - 2 * step) / (2 * step) ** 2 - 0.5
    ours = 1 - (1 + np.expm1(-2 * step) / (2 * step)) / step
    assert ours == pytest.approx(2 * step / 3, rel=1e-2) and theirs == pytest.approx(-1, rel=1e-2)


def test_quirk_linspace_of_one_step() -> None:
    """diffusers starts one step of linspace at timestep 0 and so returns noise; we start at the last timestep."""
    values = config("scaled_linear", timestep_spacing="linspace")
    for sampler in ("ddim", "ddpm", "euler", "euler_a"):
        scheduler = peer(sampler, values)
        scheduler.set_timesteps(1)
        assert scheduler.timesteps.tolist() == [0]
        assert make_plan(NoiseSchedule(**values), sampler, 1).timesteps.tolist() == [999]


def test_quirk_trailing_makes_one_step_too_many() -> None:
    """For 62 step counts diffusers' arange runs one past the end, to timestep -1; we keep the count asked for."""
    values = config("scaled_linear", timestep_spacing="trailing")
    for sampler in ("ddim", "ddpm", "euler", "euler_a", "lms", "dpmpp_2m", "unipc", "deis"):
        scheduler = peer(sampler, values)
        scheduler.set_timesteps(61)
        assert len(scheduler.timesteps) == 62 and scheduler.timesteps[-1] == -1
        assert len(make_plan(NoiseSchedule(**values), sampler, 61)) == 61


def test_quirk_leading_past_the_last_timestep() -> None:
    """All timesteps and an offset of 1 lead diffusers to timestep 1000 of 0..999; we let the offset shrink."""
    values = config("scaled_linear", timestep_spacing="leading", steps_offset=1)
    scheduler = peer("ddpm", values)
    scheduler.set_timesteps(1000)
    assert scheduler.timesteps[0] == 1000
    assert make_plan(NoiseSchedule(**values), "ddpm", 1000).timesteps[0] == 999


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_quirk_dpm_on_all_timesteps(spacing: str) -> None:
    """DPM++ spaces N + 1 points, which do not fit when N is T: diffusers repeats timesteps, we visit each once."""
    values = config("scaled_linear", timestep_spacing=spacing)
    scheduler = peer("dpmpp_2m", values)
    scheduler.set_timesteps(1000)
    assert len(scheduler.timesteps.unique()) < 1000
    assert make_plan(NoiseSchedule(**values), "dpmpp_2m", 1000).timesteps.tolist() == list(range(999, -1, -1))


def test_quirk_dpm_karras_under_cosine() -> None:
    """diffusers means to keep fractional timesteps here and then cuts them to integers; we round to the nearest."""
    values = config("cosine", "v_prediction")
    scheduler = peer("dpmpp_2m", values, use_karras_sigmas=True)
    scheduler.set_timesteps(12)
    difference = make_plan(NoiseSchedule(**values), "dpmpp_2m_karras", 12).timesteps - scheduler.timesteps
    assert difference.min() >= 0 and difference.max() == 1

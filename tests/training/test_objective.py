"""The losses of diffusion training, the drawing of timesteps, and runs that use each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from latentdiff.training.config import DiffusionTraining, load_config
from latentdiff.training.data.batches import Batch
from latentdiff.training.data.timesteps import HISTORY, ImportanceSampler, logit_normal_timesteps, stratified_timesteps
from latentdiff.training.datasets.digits import build
from latentdiff.training.losses.diffusion import diffusion_losses, loss_weight
from latentdiff.training.train_diffusion import draw_noises
from PIL import Image
from torch import Tensor

from latentdiff import Pipeline
from latentdiff.checkpoints import Components
from latentdiff.commands.train import train as cli_train
from latentdiff.diffusion.likelihood import bound_term
from latentdiff.diffusion.prediction import as_denoiser
from latentdiff.errors import InputError
from tests.models.test_pixels import UNET, components
from tests.training.test_stages import check_interrupted, pictures

ROOT = Path(__file__).parents[2]
SIZE = 16


def recipe(tmp_path: Path, **changes: Any) -> str:
    """Write a tiny config of diffusion in pixels over tmp_path/pictures."""
    model = {key: value for key, value in UNET.items() if key != "sample_size"}
    tree: dict[str, Any] = {
        "stage": "diffusion",
        "data": {"folder": str(tmp_path / "pictures"), "size": SIZE},
        "run": {"out": str(tmp_path / "run"), "steps": 4, "batch_size": 4, "precision": "no", "save_every": 2},
        "optimizer": {"learning_rate": 0.003, "warmup_steps": 5},
        "autoencoder": None,
        "text_encoder": "labels",
        "model": model,
        "schedule": {"beta_schedule": "linear", "num_train_timesteps": 20, "beta_end": 0.4},
        "prompts": ["a", "b"],
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree | changes))
    return str(file)


LEARNED = {"beta_schedule": "linear", "num_train_timesteps": 20, "beta_end": 0.4, "variance_type": "learned_range"}


def losses(given: Components, loss: str, unet: Any, timesteps: Tensor) -> Tensor:
    config: Any = load_config(ROOT / "configs/digits-ddpm.yaml", [f"objective.loss={loss}", "objective.vlb_weight=1"])
    latents = torch.linspace(-1, 1, 3 * 64).reshape(3, 1, 8, 8)
    batch = Batch(latents, torch.zeros(3, 1, 3), torch.zeros(3, dtype=torch.bool))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    return diffusion_losses(unet, given, config.objective, batch, timesteps, noise)


def test_the_bound_in_training_is_the_bound_in_evaluation() -> None:
    given = components()
    assert given.unet is not None
    unet, timesteps = given.unet, torch.tensor([0, 300, 999])
    ours = losses(given, "vlb", unet, timesteps) / 1000
    latents = torch.linspace(-1, 1, 3 * 64).reshape(3, 1, 8, 8)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    denoise = as_denoiser(lambda x, call: unet(x, call.timesteps, torch.zeros(3, 1, 3)), "epsilon")
    theirs = bound_term(denoise, given.schedule, latents, noise, timesteps, "learned_range")
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)  # L_0 amplifies how x_t was rounded


def test_hybrid_loss_trains_the_variance_by_the_bound_and_the_rest_by_the_error() -> None:
    given = components()
    assert given.unet is not None
    timesteps, gradients = torch.tensor([5, 300, 999]), {}
    last = given.unet.conv_out.requires_grad_(True)
    for loss in ("simple", "hybrid"):
        last.zero_grad()
        losses(given, loss, given.unet, timesteps).mean().backward()
        assert last.weight.grad is not None
        gradients[loss] = last.weight.grad.clone()
    torch.testing.assert_close(gradients["hybrid"][:1], gradients["simple"][:1])
    assert not gradients["simple"][1:].any() and gradients["hybrid"][1:].any()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_min_snr_weighs_the_error_of_x0_alike_for_every_prediction(prediction_type: str) -> None:
    """A given error of the x0 estimate costs the same whatever is predicted."""
    from latentdiff.diffusion import NoiseSchedule
    from latentdiff.diffusion.prediction import preconditioning

    schedule, timesteps = NoiseSchedule(prediction_type=prediction_type), torch.tensor([10, 400, 900])
    sigmas = schedule.sigmas[timesteps].float()
    error_of_output = 1 / preconditioning(prediction_type, sigmas).c_out ** 2  # for an x0 error of 1
    expected = schedule.snr(timesteps).clamp_max(5.0)
    torch.testing.assert_close(
        loss_weight(schedule, timesteps, gamma=5.0) * error_of_output, expected, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("weighting", ["p2", "debiased"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_other_weights_of_the_error_of_x0(weighting: str, prediction_type: str) -> None:
    """P2 weighs an error of the noise by 1 / (1 + SNR), debiased estimation by 1 / sqrt(SNR)."""
    from latentdiff.diffusion import NoiseSchedule
    from latentdiff.diffusion.prediction import preconditioning

    schedule, timesteps = NoiseSchedule(prediction_type=prediction_type), torch.tensor([10, 400, 900])
    snr = schedule.snr(timesteps)
    of_noise = {"p2": 1 / (1 + snr), "debiased": 1 / snr.sqrt()}[weighting]
    error_of_output = 1 / preconditioning(prediction_type, schedule.sigmas[timesteps].float()).c_out ** 2
    found = loss_weight(schedule, timesteps, weighting) * error_of_output
    torch.testing.assert_close(
        found, of_noise * snr, rtol=1e-4, atol=0
    )  # an x0 error of 1 is one of sqrt(SNR) of noise


def test_timesteps_with_a_normal_logit_lie_in_the_middle() -> None:
    drawn = logit_normal_timesteps(100_000, 1000, torch.Generator().manual_seed(0)).double()
    places = (drawn + 0.5) / 1000
    logits = (places / (1 - places)).log()
    assert abs(float(logits.mean())) < 0.01 and abs(float(logits.std()) - 1) < 0.01
    assert drawn.min() >= 0 and drawn.max() <= 999


def test_offset_and_perturbation_are_drawn_for_each_sample(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", 4)
    shape, whole = (4, 32, 32), slice(0, 64)
    plain, offset, perturbed = (
        load_config(recipe(tmp_path), ["run.batch_size=64", *changes])
        for changes in ([], ["objective.offset_noise=0.5"], ["objective.input_perturbation=0.3"])
    )
    assert isinstance(plain, DiffusionTraining) and isinstance(offset, DiffusionTraining)
    assert isinstance(perturbed, DiffusionTraining)
    noise, shown = draw_noises(plain.objective, plain.run, 7, whole, shape)
    assert torch.equal(noise, shown)
    shifted, also = draw_noises(offset.objective, offset.run, 7, whole, shape)
    shifts = shifted - noise
    assert torch.equal(shifted, also) and float(shifts.std(dim=(2, 3)).max()) < 1e-6
    assert abs(float(shifts[:, :, 0, 0].std()) - 0.5) < 0.06
    asked, seen = draw_noises(perturbed.objective, perturbed.run, 7, whole, shape)
    assert torch.equal(asked, noise) and abs(float((seen - asked).std()) - 0.3) < 0.01
    part = draw_noises(offset.objective, offset.run, 7, slice(16, 32), shape)[0]
    assert torch.equal(part, shifted[16:32])


def test_importance_sampling_is_unbiased_and_prefers_large_losses() -> None:
    sampler, generator = ImportanceSampler(10), torch.Generator().manual_seed(0)
    assert torch.equal(sampler.probabilities(), torch.full((10,), 0.1))
    true = torch.arange(1.0, 11.0) ** 2
    for _ in range(HISTORY):
        sampler.update(torch.arange(10), true)
    probabilities = sampler.probabilities()
    torch.testing.assert_close(probabilities, true / true.sum(), atol=2e-3, rtol=0)
    timesteps, weights = sampler.draw(200_000, generator)
    torch.testing.assert_close((true[timesteps] * weights).mean(), true.mean(), rtol=0.01, atol=0)
    sampler.update(torch.tensor([3]), torch.tensor([torch.nan]))
    assert torch.equal(sampler.probabilities(), probabilities)


def test_timesteps_are_stratified() -> None:
    drawn = stratified_timesteps(10, 1000, torch.Generator().manual_seed(0))
    assert sorted(int(t) // 100 for t in drawn) == list(range(10))


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "hybrid", "schedule": LEARNED},
        {"loss": "vlb", "timesteps": "importance", "text_encoder": "none", "channels": 1},
        {"self_conditioning": True},
        {"timesteps": "logit_normal", "weighting": "p2", "offset_noise": 0.1, "input_perturbation": 0.1},
    ],
    ids=["hybrid", "vlb", "self-conditioned", "noises"],
)
def test_runs_in_pixels_resume_to_the_bit_and_show_what_they_learnt(
    tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "pictures", 6)
    check_interrupted(recipe(tmp_path, **changes), tmp_path)
    output = capsys.readouterr().out
    assert "bits per dimension: latentdiff evaluate " in output and "bits/dim" not in output  # which takes minutes
    with Image.open(tmp_path / "unbroken/samples/denoising.gif") as animation:
        assert getattr(animation, "n_frames", 1) > 10
    with Image.open(tmp_path / "unbroken/samples/process.png") as strip:
        assert strip.size[0] > 9 * 128
    drawn = Pipeline.from_pretrained(tmp_path / "unbroken/model")("a", num_inference_steps=3).images[0]
    assert drawn.size == (SIZE, SIZE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "hybrid"}, "loss: hybrid trains the variance, which needs schedule.variance_type learned_range"),
        ({"schedule": LEARNED}, "variance_type learned_range is not trained by loss: simple; choose loss: hybrid"),
        ({"loss": "vlb", "offset_noise": 0.1}, "loss: vlb bounds the likelihood of plain noise"),
        (
            {"loss": "vlb", "schedule": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}},
            "loss: vlb needs some signal at the last timestep",
        ),
    ],
)
def test_configs_that_do_not_fit_together(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    pictures(tmp_path / "pictures", 4)
    with pytest.raises(InputError, match=message):
        cli_train(recipe(tmp_path, **changes), [], False, None)


def test_digits_are_a_captioned_folder(tmp_path: Path) -> None:
    assert build(str(tmp_path / "digits")) == {"train": 1437, "test": 360}
    from latentdiff.training.config import DataConfig
    from latentdiff.training.data.dataset import load_images

    data = load_images(DataConfig(folder=str(tmp_path / "digits"), size=8), "test")
    assert data.images.shape == (360, 8, 8, 4) and data.rows[0]["captions"] == ["0"]
    with pytest.raises(InputError, match="is not empty; choose another folder"):
        build(str(tmp_path / "digits"))

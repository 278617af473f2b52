"""Each term of the loss moves the weights it is for, and no others; the discriminator learns, and is kept from more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from latentdiff.training.config import AutoencoderTraining, load_config
from latentdiff.training.loop.checkpointing import load_latest
from latentdiff.training.losses import autoencoder as terms
from latentdiff.training.losses.autoencoder import References, adversarial_term, discriminator_terms, loss_terms
from latentdiff.training.losses.equivariance import equivariance
from latentdiff.training.losses.image import PatchDiscriminator, r1_penalty
from latentdiff.training.train_autoencoder import assemble
from torch import Tensor, nn

from latentdiff.checkpoints import save_model
from latentdiff.commands.train import train as cli_train
from latentdiff.errors import InputError
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.lpips import Lpips
from tests.models.tiny import randomize
from tests.training.test_distributed import logged
from tests.training.test_lpips import network  # noqa: F401  (a fixture)
from tests.training.test_stages import SIZE, check_interrupted, pictures, recipe

TRAINED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("l1", "l2", "gradient", "ssim", "lpips", "equivariance", "adversarial"), ("encoder", "decoder")),
    **dict.fromkeys(("kl", "latents"), ("encoder",)),
    **dict.fromkeys(("discriminator", "r1"), ("discriminator",)),
}
# No slope depends on the first two; in the hinge loss both halves pull alike at the last while no score is beyond 1.
STILL = {"r1": {"layers.3.bias", "layers.5.bias"}, "discriminator": {"layers.5.bias"}}
ALL = "{l1: 1, l2: 1, gradient: 1, ssim: 1, kl: 1, lpips: 1, lpips_weights: x, adversarial: 1, r1: 1, latents: 1}"


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Let accelerate, which knows one precision a process, forget the one of this test and of those before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def part_of(name: str) -> str:
    """Return which part of what is trained a weight belongs to."""
    owner = name.split(".")[0]
    return {"quant_conv": "encoder", "post_quant_conv": "decoder", "layers": "discriminator"}.get(owner, owner)


def all_terms(
    config: AutoencoderTraining, model: Any, judge: PatchDiscriminator, references: References
) -> dict[str, Any]:
    """Return every term there is, of random pictures."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, SIZE, SIZE, generator=generator) * 2 - 1
    reconstruction, posterior = model(images, generator)
    found = loss_terms(reconstruction, images, posterior, config, references)
    loss = torch.stack(list(found.values())).sum()
    found["equivariance"] = equivariance(model, posterior.sample(generator), images, generator)
    found["adversarial"], _ = adversarial_term(loss, reconstruction, model, judge, Accelerator(cpu=True))
    return found | discriminator_terms(judge, judge, images, reconstruction.detach(), config)


@pytest.mark.parametrize("term", TRAINED)
def test_a_term_alone_moves_what_it_is_for_and_nothing_else(tmp_path: Path, network: Lpips, term: str) -> None:  # noqa: F811
    changes = [f"loss={ALL}", "model.mid_block_add_attention=false", f"start_from={tmp_path / 'started'}"]
    config = load_config(recipe(tmp_path, "autoencoder"), changes)
    assert isinstance(config, AutoencoderTraining)
    started = AutoencoderKL(AutoencoderConfig.from_dict(config.model))
    save_model(started, tmp_path / "started")
    randomize(started)  # what training starts from has these latents itself
    model, state = assemble(config)
    judge = state.modules["discriminator"]
    assert isinstance(judge, PatchDiscriminator)
    found = all_terms(config, model, judge, References(network, started))
    assert found.keys() == TRAINED.keys()
    weights = {name: weight for module in (model, judge, network) for name, weight in module.named_parameters()}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    found[term].backward()
    assert all(weight.grad is None for weight in started.parameters())
    for optimizer in state.optimizers.values():
        optimizer.step()
    moved = {name for name, weight in weights.items() if not torch.equal(weight, before[name])}
    meant = {name for name in weights if part_of(name) in TRAINED[term]}
    assert moved == meant - STILL.get(term, set())


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., dict[int, dict[str, dict[str, Tensor]]]]:
    """A function that trains for four steps, with a discriminator from the third on; returns what each step saved."""
    pictures(tmp_path / "pictures", 4)
    file = recipe(tmp_path, "autoencoder", run__save_every=1, run__keep_checkpoints=9)

    def train(*overrides: str, name: str) -> dict[int, dict[str, dict[str, Tensor]]]:
        from safetensors.torch import load_file

        cli_train(file, ["loss.adversarial=0.5", "loss.adversarial_start=2", *overrides], False, str(tmp_path / name))
        steps = {step: tmp_path / name / f"checkpoints/step-{step:08d}" for step in range(1, 5)}
        parts = ("model", "discriminator")
        return {
            step: {part: load_file(folder / f"{part}.safetensors") for part in parts} for step, folder in steps.items()
        }

    return train


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> set[bool]:
    """Say of all tensors whether they are equal."""
    return {torch.equal(tensor, theirs[name]) for name, tensor in ours.items()}


def test_the_discriminator_is_updated_whenever_it_judges(saved: Callable[..., Any]) -> None:
    steps = [found["discriminator"] for found in saved(name="run").values()]
    for weights in steps:
        del weights["layers.5.bias"]
    assert [same(*pair) for pair in pairwise(steps)] == [{True}, {False}, {False}]


@pytest.mark.parametrize("change", ["r1", "hinge"])
def test_the_loss_of_the_discriminator_reaches_the_autoencoder_through_its_judgement_alone(
    saved: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """In the step in which that loss is another for the first time, the autoencoder is what it would have been."""
    plain = saved(name="plain")
    if change == "hinge":
        monkeypatch.setattr(terms, "discriminator_loss", lambda real, fake: (real - 2 * fake).mean())
    other = saved(*(["loss.r1=10"] if change == "r1" else []), name="other")
    assert same(plain[3]["model"], other[3]["model"]) == {True}
    assert False in same(plain[3]["discriminator"], other[3]["discriminator"])
    assert same(plain[4]["model"], other[4]["model"]) != {True}


def test_penalty_of_a_known_slope() -> None:
    """Each score of a filter that does not overlap has the filter's weights as its slope, to float32 precision."""
    layer: Any = nn.Conv2d(3, 1, 4, stride=4)
    judge: Any = SimpleNamespace(layers=layer)
    with torch.autocast("cpu", torch.bfloat16):
        found = r1_penalty(judge, torch.rand(5, 3, 8, 8))
    assert found.item() == pytest.approx(0.5 * layer.weight.square().sum().item(), rel=1e-5)
    found.backward()
    torch.testing.assert_close(layer.weight.grad, layer.weight.detach())


def test_penalty_keeps_the_slope_down() -> None:
    torch.manual_seed(0)
    real, fake = torch.rand(4, 3, 16, 16), -torch.rand(4, 3, 16, 16)
    slopes = []
    for gamma in (0.0, 10.0):
        torch.manual_seed(1)
        judge = PatchDiscriminator(channels=8)
        optimizer = torch.optim.Adam(judge.parameters(), lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            (terms.discriminator_loss(judge(real), judge(fake)) + gamma * r1_penalty(judge, real)).backward()
            optimizer.step()
        slopes.append(r1_penalty(judge, real).item())
    assert slopes[1] < 0.1 * slopes[0]


@pytest.mark.usefixtures("forgetful")
def test_penalty_is_float32_in_a_run_that_is_not(saved: Callable[..., Any], tmp_path: Path) -> None:
    found = {}
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        options = ["loss.adversarial_start=0", "loss.r1=3", f"run.precision='{precision}'", "run.log_every=1"]
        saved(*options, name=precision)
        found[precision] = {name: values[0] for name, values in logged(tmp_path / precision).items()}
    assert found["bf16"]["discriminator"] != found["no"]["discriminator"]
    for name in ("r1", "grad_norm/r1"):
        assert found["bf16"][name] == pytest.approx(found["no"][name], rel=1e-6)
    checkpoint = load_latest(tmp_path / "bf16")
    assert checkpoint is not None and {t.dtype for t in checkpoint.tensors["discriminator"].values()} == {torch.float32}


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("{l1: 0, gradient: 0, ssim: 0, kl: 0}", "the loss has no term: set loss.l1 above 0"),
        ("{r1: 1}", "loss.r1 is of the discriminator: set loss.adversarial above 0, or loss.r1 to 0"),
    ],
)
def test_losses_that_cannot_be_are_refused(tmp_path: Path, loss: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cli_train(recipe(tmp_path, "autoencoder"), [f"loss={loss}"], False, None)


def test_equivariance_asks_for_the_smaller_and_turned_picture() -> None:
    """A decoder that repeats pixels is equivariant but for the blur at edges; one that also mirrors them is not."""
    images = torch.zeros(1, 3, 64, 64)
    images[..., :32, :32] = 1
    latents = images[..., ::4, ::4]

    def error(decode: Callable[[Tensor], Tensor], seed: int, given: Tensor = latents) -> float:
        model: Any = SimpleNamespace(config=SimpleNamespace(downsample_factor=4), decode=decode)
        return equivariance(model, given, images, torch.Generator().manual_seed(seed)).item()

    def repeated(latents: Tensor) -> Tensor:
        return nn.functional.interpolate(latents, scale_factor=4)

    plain = [error(repeated, seed) for seed in range(8)]
    mirrored = [error(lambda latents: repeated(latents).flip(-1), seed) for seed in range(8)]
    assert max(plain) < 0.15 < 0.4 < min(mirrored)
    assert plain == [error(repeated, seed) for seed in range(8)]
    assert error(repeated, 0, latents.bfloat16()) == plain[0]


def test_equivariance_is_trained_by_and_does_not_depend_on_interruptions(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", 4)
    file = recipe(tmp_path, "autoencoder")
    with open(file, "a") as config:
        config.write("loss: {equivariance: 0.5}\n")
    check_interrupted(file, tmp_path)
    assert min(logged(tmp_path / "unbroken")["equivariance"]) > 0

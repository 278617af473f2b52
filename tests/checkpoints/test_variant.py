"""Variants: folders that lack what another has, and U-Nets given by what they differ by."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentdiff import Pipeline
from latentdiff.checkpoints import (
    Components,
    load_autoencoder,
    load_pipeline,
    load_schedule,
    load_text_encoder,
    save_pipeline,
)
from latentdiff.checkpoints.difference import DOWN, UP, apply_difference, difference
from latentdiff.checkpoints.folder import DIFFERENCE
from latentdiff.checkpoints.header import read_header
from latentdiff.checkpoints.inspect import describe_folder
from latentdiff.checkpoints.variant import save_variant
from latentdiff.cli import main
from latentdiff.diffusion import NoiseSchedule
from latentdiff.errors import InputError, ModelConfigError, ModelLoadError, ModelMismatchError, ModelPathError
from latentdiff.models.lora import layers_of
from latentdiff.models.unet import UNet2DConditionModel
from tests.checkpoints.small_models import weights_of
from tests.checkpoints.test_folder import edit, reweigh
from tests.models.tiny import randomize

FILE = f"unet/{DIFFERENCE}"
RANK = 2


def inpainting(components: Components, rank: int | None = None) -> Components:
    """Return the same model with an inpainting U-Net, whose weights differ by random changes (of that rank)."""
    assert components.unet is not None
    unet = UNet2DConditionModel(replace(components.unet.config, in_channels=9)).requires_grad_(False)
    randomize(unet, seed=1)
    weights = unet.state_dict()
    for name in {name.removesuffix(".weight") for name in layers_of(unet)} - {"conv_in"}:
        weight = components.unet.state_dict()[f"{name}.weight"]
        change = weights[f"{name}.weight"].flatten(1)
        if rank is not None:
            change = change[:, :rank] @ torch.randn(rank, change.shape[1])
        weights[f"{name}.weight"] = weight + change.view_as(weight)
    unet.load_state_dict(weights)
    return replace(components, unet=unet)


@pytest.fixture(scope="module")
def made(built_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model, and inpainting variants of it: its U-Net whole, and as a difference of a low rank."""
    place = tmp_path_factory.mktemp("variants")
    base = shutil.copytree(built_model, place / "base")
    components = load_pipeline(base)
    save_variant(inpainting(components), place / "variant", base, dtype=None)
    save_variant(inpainting(components, RANK), place / "lowered", base, dtype=None, rank=RANK)
    return place


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Path:
    """The whole one of the models, of which a test may damage each."""
    return shutil.copytree(made, tmp_path / "models") / "base"


@pytest.fixture
def variant(base: Path) -> Path:
    """The inpainting model with a whole U-Net."""
    return base.with_name("variant")


@pytest.fixture
def lowered(base: Path) -> Path:
    """The inpainting model with the difference."""
    return base.with_name("lowered")


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_variant_takes_what_it_lacks_from_the_model_beside_it(base: Path, variant: Path, tmp_path: Path) -> None:
    assert names(variant) == ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    assert json.loads((variant / "model_index.json").read_text())["_base"] == "base"
    expected, found = inpainting(load_pipeline(base)), load_pipeline(variant)
    assert found.inpaints and found.schedule == expected.schedule
    theirs, ours = weights_of(expected), weights_of(found)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.startswith("unet."))
    assert load_autoencoder(variant).config == found.autoencoder.config
    assert load_text_encoder(variant)[0].config == found.text_encoder.config
    assert load_schedule(variant) == found.schedule
    described = describe_folder(variant)
    assert described["kind"] == "variant of the model base beside it" and described["components"]["vae"]["of"] == "base"
    assert described["bytes"] == 4 * described["parameters"]
    Pipeline(found).save_pretrained(tmp_path / "elsewhere" / "whole")  # needs no other
    whole = weights_of(load_pipeline(tmp_path / "elsewhere" / "whole"))
    assert all(torch.equal(whole[name], tensor) for name, tensor in ours.items())


def test_a_variant_may_have_a_schedule_of_its_own(base: Path) -> None:
    components, own = load_pipeline(base), base.with_name("own")
    schedule = NoiseSchedule(beta_schedule="linear", class_name="DDPMScheduler", timestep_spacing="trailing")
    save_variant(replace(components, schedule=schedule), own, base, dtype=None)
    assert names(own) == ["model_index.json", "scheduler/scheduler_config.json"]
    assert load_pipeline(own).schedule.to_dict() == schedule.to_dict()


def test_the_hash_of_a_variant_covers_its_base(base: Path, variant: Path, lowered: Path) -> None:
    for folder in (variant, lowered):
        before = load_pipeline(folder).model_hash
        assert before not in ("", load_pipeline(base).model_hash)
        settings = json.loads((base / "vae" / "config.json").read_text())
        edit(base / "vae" / "config.json", scaling_factor=settings["scaling_factor"] / 2)
        assert load_pipeline(folder).model_hash != before
    before = [load_pipeline(folder).model_hash for folder in (variant, lowered)]
    reweigh(base / "unet/diffusion_pytorch_model.safetensors", lambda w: w["conv_in.bias"].add_(1))
    after = [load_pipeline(folder).model_hash for folder in (variant, lowered)]
    assert before[0] == after[0] and before[1] != after[1]  # only the second needs those weights


def test_a_link_to_a_variant_finds_the_base_beside_the_real_one(variant: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "mine").symlink_to(variant)
    assert load_pipeline(tmp_path / "links" / "mine").inpaints


@pytest.mark.parametrize(
    "name",
    ["../base", "/etc", "..", ".", "", "base/", "./base", "a\\base", "c:base", "\0", "x" * 5000, 3, None, ["base"], {}],
)
def test_a_base_is_the_plain_name_of_a_folder(variant: Path, name: Any) -> None:
    tree = json.loads((variant / "model_index.json").read_text())
    (variant / "model_index.json").write_text(json.dumps({**tree, "_base": name}))
    with pytest.raises(ModelPathError, match="expected the plain name of a folder as _base") as caught:
        load_pipeline(variant)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)


DAMAGE: dict[str, tuple[Callable[[Path, Path], Any], type[Exception], str]] = {
    "base missing": (lambda v, b: shutil.rmtree(b), ModelPathError, "variant of this model, but it is missing"),
    "base is a file": (lambda v, b: (shutil.rmtree(b), b.write_text("{}")), ModelPathError, "but it is missing"),
    "base leads out": (
        lambda v, b: ((v.parent / "away").mkdir(), b.rename(v.parent / "away/base"), _link_out(b)),
        ModelPathError,
        "leads out of",
    ),
    "base is a variant": (
        lambda v, b: edit(b / "model_index.json", _base="base"),
        ModelPathError,
        "got another variant",
    ),
    "its own base": (lambda v, b: edit(v / "model_index.json", _base=v.name), ModelPathError, "got another variant"),
    "base of another kind": (lambda v, b: edit(b / "model_index.json", vae=["x", "Y"]), ModelConfigError, "for vae"),
    "base lacks it too": (lambda v, b: edit(b / "model_index.json", vae=None), ModelConfigError, "for vae"),
    "own component missing": (lambda v, b: shutil.rmtree(v / "unet"), ModelPathError, "unet"),
    "named, but not there": (
        lambda v, b: edit(v / "model_index.json", vae=["diffusers", "AutoencoderKL"]),
        ModelPathError,
        "vae",
    ),
}


def _link_out(place: Path) -> None:
    outside = place.parent.parent / f"{place.parent.name}-outside"
    (place.parent / "away").rename(outside)
    place.symlink_to(outside / "base")


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_variants_are_refused(variant: Path, base: Path, name: str) -> None:
    damage, error, message = DAMAGE[name]
    damage(variant, base)
    with pytest.raises(error, match=message) as caught:
        load_pipeline(variant)
    assert isinstance(caught.value, ModelLoadError) and "\n" not in str(caught.value)


def test_a_difference_of_its_rank_is_the_network(base: Path, lowered: Path) -> None:
    assert names(lowered) == ["model_index.json", "unet/config.json", FILE]
    header = read_header(lowered / FILE).tensors
    assert header["conv_in.weight"].shape[1] == 9
    pairs = [name.removesuffix(DOWN) for name in header if name.endswith(DOWN)]
    assert len(pairs) > 20 and all(header[f"{name}{UP}"].shape[1] == RANK for name in pairs)
    torch.manual_seed(0)
    components, found = load_pipeline(base), load_pipeline(lowered)
    assert found.unet is not None and components.unet is not None
    again = difference(components.unet, found.unet, RANK)
    whole = load_file(lowered / FILE)
    assert again.keys() == whole.keys()
    before, after = components.unet.state_dict(), found.unet.state_dict()
    for name, tensor in after.items():
        layer = name.removesuffix(".weight")
        if layer in pairs:
            change = whole[layer + UP].flatten(1) @ whole[layer + DOWN].flatten(1)
            assert torch.allclose(tensor, before[name] + change.view_as(tensor), atol=1e-6)
        else:
            assert torch.equal(tensor, whole.get(name, before.get(name)))
    assert describe_folder(lowered)["components"]["unet"]["difference from"] == "base"
    assert not found.unet.training and not any(weight.requires_grad for weight in found.unet.parameters())


def test_a_difference_of_full_rank_gives_the_weights_to_rounding(base: Path, tmp_path: Path) -> None:
    """Those of layers by factors too, where these are no shorter than the weights, which `difference` then keeps."""
    components = load_pipeline(base)
    variant = inpainting(components)
    assert components.unet is not None and variant.unet is not None
    for rank in (1, 4, 8, 1000):
        save_file(difference(components.unet, variant.unet, rank), tmp_path / "d.safetensors")
        with torch.device("meta"):
            empty = UNet2DConditionModel(variant.unet.config)
        tensors = read_header(tmp_path / "d.safetensors").tensors
        merged = apply_difference(tmp_path / "d.safetensors", tensors, components.unet, empty).state_dict()
        errors = {
            name: float((merged[name] - tensor).abs().max()) for name, tensor in variant.unet.state_dict().items()
        }
        assert any(name.endswith(DOWN) for name in tensors) == (rank < 1000)
        assert (max(errors.values()) < 1e-6) == (rank == 1000)
        full = [
            name
            for name in tensors
            if name.endswith(DOWN) and min(merged[name.removesuffix(DOWN) + ".weight"].flatten(1).shape) <= rank
        ]
        assert all(errors[name.removesuffix(DOWN) + ".weight"] < 1e-6 for name in full)


def test_the_nearest_of_a_rank_is_found(base: Path) -> None:
    """The error of a truncation is the rest of the singular values, and falls with the rank."""
    components = load_pipeline(base)
    variant = inpainting(components)
    assert components.unet is not None and variant.unet is not None
    name = "mid_block.resnets.0.conv1"
    before, after = (unet.state_dict()[f"{name}.weight"].flatten(1) for unet in (components.unet, variant.unet))
    values = torch.linalg.svdvals(after - before)
    for rank in (1, 5, 20):
        tensors = difference(components.unet, variant.unet, rank)
        rest = before + tensors[name + UP].flatten(1) @ tensors[name + DOWN].flatten(1) - after
        assert float(rest.norm()) == pytest.approx(float(values[rank:].norm()), rel=1e-4)


def test_equal_networks_do_not_differ(pipe: Pipeline) -> None:
    assert difference(pipe.unet, pipe.unet, 4) == {}


WRONG: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], type[Exception], str]] = {
    "unknown name": (lambda w: w.update(x=torch.zeros(1)), ModelMismatchError, r"x is F32 \[1\] instead of absent"),
    "other shape": (
        lambda w: w.update({"conv_in.weight": torch.zeros(16, 4, 3, 3)}),
        ModelMismatchError,
        "conv_in.weight is",
    ),
    "missing": (lambda w: w.pop("conv_in.weight"), ModelMismatchError, "conv_in.weight is missing"),
    "integers": (
        lambda w: w.update({"conv_in.bias": torch.zeros(16, dtype=torch.int32)}),
        ModelMismatchError,
        "is I32",
    ),
    "one factor": (lambda w: w.pop(f"conv_out{UP}"), ModelMismatchError, "conv_out has one of its two factors"),
    "no layer": (
        lambda w: w.update({f"time{DOWN}": torch.zeros(2, 2)}),
        ModelMismatchError,
        "time is no layer that both",
    ),
    "factors of what changed": (
        lambda w: w.update({f"conv_in{DOWN}": torch.zeros(1, 9, 3, 3), f"conv_in{UP}": torch.zeros(16, 1, 1, 1)}),
        ModelMismatchError,
        "conv_in is no layer that both",
    ),
    "both": (lambda w: w.update({"conv_out.weight": torch.zeros(4, 16, 3, 3)}), ModelMismatchError, "there whole too"),
    "ranks": (lambda w: w.update({f"conv_out{UP}": torch.zeros(4, 7, 1, 1)}), ModelMismatchError, "make no change of"),
    "whole numbers": (
        lambda w: w.update({f"conv_out{DOWN}": torch.zeros(2, 16, 3, 3, dtype=torch.int64)}),
        ModelMismatchError,
        "the factors of conv_out, I64",
    ),
    "NaN": (lambda w: w[f"conv_out{UP}"].fill_(torch.nan), ModelLoadError, "NaN or infinite"),
    "overflow": (
        lambda w: (w[f"conv_out{UP}"].fill_(3e38), w[f"conv_out{DOWN}"].fill_(3e38)),
        ModelLoadError,
        "not finite",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_differences_that_do_not_fit_are_refused(lowered: Path, name: str) -> None:
    change, error, message = WRONG[name]
    reweigh(lowered / FILE, change)
    with pytest.raises(error, match=message) as caught:
        load_pipeline(lowered)
    assert "\n" not in str(caught.value)


def test_a_difference_needs_a_base(lowered: Path, base: Path) -> None:
    for component in ("vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(base / component, lowered / component)
    tree = json.loads((base / "model_index.json").read_text())
    (lowered / "model_index.json").write_text(json.dumps(tree))
    with pytest.raises(ModelPathError, match="got neither"):
        load_pipeline(lowered)


def test_a_difference_in_half_precision_is_small_and_loads_in_any(base: Path) -> None:
    folder = base.with_name("half")
    save_variant(inpainting(load_pipeline(base), RANK), folder, base, rank=RANK)
    assert os.stat(folder / FILE).st_size < os.stat(base / "unet/diffusion_pytorch_model.safetensors").st_size / 2
    for dtype in (torch.float32, torch.bfloat16):
        unet = load_pipeline(folder, dtype).unet
        assert unet is not None and {weight.dtype for weight in unet.parameters()} == {dtype}


def test_a_variant_is_written_beside_its_base(base: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="a variant must be beside its base"):
        save_variant(load_pipeline(base), tmp_path / "other" / "variant", base)


def test_convert_writes_variants(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = shutil.copytree(made / "base", tmp_path / "base")
    save_pipeline(load_pipeline(made / "lowered"), tmp_path / "whole", dtype=None)
    call = [
        "convert",
        str(tmp_path / "whole"),
        str(tmp_path / "small"),
        "--variant-of",
        str(base),
        "--dtype",
        "float32",
    ]
    assert main([*call, "--rank", str(RANK)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'small'}\n"
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["model_index.json", "unet"]
    whole, small = (weights_of(load_pipeline(tmp_path / name)) for name in ("whole", "small"))
    for name, weight in whole.items():
        torch.testing.assert_close(small[name], weight, atol=1e-5, rtol=1e-5)
    assert main(call) == 0 and (tmp_path / "small/unet/diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["new", "--rank", "4"], "--rank is of a difference from another model, got no --variant-of"),
        (["new", "--variant-of", "base", "--rank", "0"], "--rank must be a whole number from 1"),
        (["new.safetensors", "--variant-of", "base"], "a variant is a folder beside its base, got 'new.safetensors'"),
        (["new", "--variant-of", "none"], "none"),
    ],
)
def test_convert_refuses_what_is_no_variant(
    made: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    before = sorted(made.iterdir())
    assert main(["convert", "variant", *options]) in (2, 3)
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert sorted(made.iterdir()) == before

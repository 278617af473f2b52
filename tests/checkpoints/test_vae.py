"""An autoencoder of one's own in place of the model's: from a folder, or from a file in any layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.checkpoints import load_autoencoder, load_pipeline, save_model, single_file, vae
from latentdiff.checkpoints.compvis_keys import autoencoder_keys, join
from latentdiff.checkpoints.inspect import describe_file
from latentdiff.cli import main
from latentdiff.errors import InputError, ModelConfigError, ModelMismatchError
from latentdiff.generation.result import read_record
from latentdiff.images import open_image
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from tests.checkpoints.test_single_file import components_of, tensors_of, tiny
from tests.conftest import AUTOENCODER
from tests.models.tiny import randomize

FAMILY = "Stable Diffusion 1.x"
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = tiny(FAMILY)
    for module in (single_file, vae):
        monkeypatch.setattr(module, "families", lambda: {FAMILY: shape})


@pytest.fixture
def other() -> AutoencoderKL:
    network = AutoencoderKL(AutoencoderConfig.from_dict(AUTOENCODER))
    randomize(network, 9)
    return network


def write(network: AutoencoderKL, layout: str, place: Path) -> Path:
    """The weights as some program has them."""
    states, file = network.state_dict(), place / f"{layout}.safetensors"
    joined = join(autoencoder_keys(states, network.config), states)
    original = {name: tensor.clone().contiguous() for name, tensor in joined.items()}
    tensors: dict[str, Tensor] = {
        "ft-mse": {**original, "loss.logvar": torch.zeros(1), "model_ema.num_updates": torch.zeros(1)},
        "whole model's": {f"first_stage_model.{name}": tensor for name, tensor in original.items()},
        "fp16-fix": {name: tensor.half() for name, tensor in original.items()},
        "diffusers": dict(states),
        "diffusers, old": {_old(name): tensor for name, tensor in states.items()},
    }.get(layout, {"a": torch.zeros(1)})
    if layout == "folder":
        save_model(network, place / "vae")
        return place / "vae"
    if layout == "model folder":
        save_model(network, place / "model" / "vae")
        return place / "model"
    save_file(tensors, file)
    return file


def _old(name: str) -> str:
    for ours, theirs in OLD.items():
        if ".attentions." in name:
            name = name.replace(f".{ours}.", f".{theirs}.")
    return name


LAYOUTS = ("ft-mse", "whole model's", "fp16-fix", "diffusers", "diffusers, old", "folder", "model folder")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["folder", "single file", "single file without"])
def test_it_takes_the_place_of_the_models_own(
    built_model: Path, tmp_path: Path, other: AutoencoderKL, layout: str, kind: str
) -> None:
    given, model = write(other, layout, tmp_path), built_model
    if kind != "folder":
        model = tmp_path / "whole.safetensors"
        tensors = tensors_of(components_of(tiny(FAMILY)), tiny(FAMILY))
        save_file({name: x for name, x in tensors.items() if "without" not in kind or "first_stage" not in name}, model)
    loaded = load_pipeline(model, vae=given)
    expected = other.state_dict()
    if layout == "fp16-fix":
        expected = {name: tensor.half().float() for name, tensor in expected.items()}
    found = loaded.autoencoder.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    if kind == "folder":
        assert loaded.autoencoder.config.scaling_factor == 0.5  # of the model that it is for
    alone = load_autoencoder(given).state_dict()
    assert all(torch.equal(alone[name], expected[name]) for name in expected)
    if kind != "single file without":
        assert loaded.model_hash not in ("", load_pipeline(model).model_hash)  # it draws other pictures


def test_a_folder_may_lack_the_weights_of_its_own(model_folder: Path, tmp_path: Path, other: AutoencoderKL) -> None:
    given = write(other, "ft-mse", tmp_path)
    (model_folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert load_pipeline(model_folder, vae=given).autoencoder.config.downsample_factor == 4
    shutil.rmtree(model_folder / "vae")
    assert load_pipeline(model_folder, vae=write(other, "folder", tmp_path)).unet is not None


def test_what_does_not_fit_is_refused(built_model: Path, tmp_path: Path, other: AutoencoderKL) -> None:
    file = tmp_path / "whole.safetensors"
    tensors = tensors_of(components_of(tiny(FAMILY)), tiny(FAMILY))
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith("first_stage")}, file)
    with pytest.raises(ModelMismatchError, match=r"has no autoencoder .* pass one besides, as vae or --vae"):
        load_pipeline(file)
    assert "vae" not in describe_file(file)["components"]
    with pytest.raises(ModelMismatchError, match=r"expected an autoencoder, with decoder\.conv_in"):
        load_pipeline(built_model, vae=write(other, "nothing", tmp_path))
    for path in (tmp_path / "none", "a" * 5000):
        with pytest.raises(InputError, match="no file or folder here"):
            load_pipeline(built_model, vae=path)
    with pytest.raises(InputError, match="by a path without NUL"):
        load_pipeline(built_model, vae="a\0b")
    with pytest.raises(InputError, match="must be given by its path"):
        load_pipeline(built_model, vae=3)  # type: ignore[arg-type]
    wide = AutoencoderKL(AutoencoderConfig.from_dict({**AUTOENCODER, "latent_channels": 8}))
    with pytest.raises(ModelConfigError, match="input channels of unet and those of vae"):
        load_pipeline(built_model, vae=write(wide, "folder", tmp_path))
    with pytest.raises(ModelMismatchError, match=r"is F32 .* instead of"):
        load_pipeline(built_model, vae=write(wide, "ft-mse", tmp_path))
    assert describe_file(write(other, "ft-mse", tmp_path))["kind"] == "VAE"


def test_consistency_models_by_their_own_class(model_folder: Path) -> None:
    index = json.loads((model_folder / "model_index.json").read_text())
    for name in ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"):
        (model_folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
        assert load_pipeline(model_folder).unet is not None


def test_a_vae_of_ones_own_on_the_command_line_and_in_records(
    built_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = load_pipeline(built_model).autoencoder
    with torch.no_grad():
        other.decoder.conv_out.bias.add_(0.2)  # type: ignore[union-attr]
    save_model(other, tmp_path / "brighter")
    call = ["generate", "fox", "--model", str(built_model), "--steps", "1"]
    assert main([*call, "-o", "own.png"]) == main([*call, "--vae", "brighter", "-o", "other.png"]) == 0
    own, drawn = (np.asarray(open_image(f"{name}.png"), int) for name in ("own", "other"))
    assert drawn.mean() > own.mean() + 5
    assert read_record("other.png")["vae"] == "brighter" and "vae" not in read_record("own.png")
    assert main(["replay", "other.png", "--model", str(built_model)]) == 0
    assert Path("other-replay.png").read_bytes() == Path("other.png").read_bytes()
    (tmp_path / "brighter").rename(tmp_path / "elsewhere")
    assert main(["replay", "other.png", "--model", str(built_model), "--vae", "elsewhere", "-o", "c.png"]) == 0
    assert np.array_equal(np.asarray(open_image("c.png"), int), drawn)

"""What single files say of themselves is read, and what is written says it: the same model comes back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff import Pipeline
from latentdiff.checkpoints import Components, load_pipeline, single_file
from latentdiff.checkpoints.inspect import describe_file
from latentdiff.checkpoints.single_file import save_single_file
from latentdiff.checkpoints.textual_inversion import add_embedding
from latentdiff.diffusion import NoiseSchedule
from latentdiff.errors import InputError, ModelConfigError, ModelFormatError, ModelLoadError, ModelMismatchError
from latentdiff.models.autoencoder import AutoencoderKL
from tests.checkpoints.test_single_file import components_of, tensors_of, tiny

FAMILIES = ("Stable Diffusion 1.x", "Stable Diffusion 2.x", "Stable Diffusion XL", "Stable Diffusion x4 upscaler")
SMALL: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {family: tiny(family) for family in FAMILIES}
    for shape in shapes.values():  # fewer layers, for these tests to be quick
        unet = shape["unet"]
        levels = [key for key, value in unet.items() if isinstance(value, list)]
        unet |= {"layers_per_block": 1} | {key: [unet[key][0], unet[key][-1]] for key in levels}
    SMALL.update(shapes)
    monkeypatch.setattr(single_file, "families", lambda: shapes)


def model(family: str, channels: int = 4) -> Components:
    return components_of(SMALL[family], channels)


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


CHANGES: dict[str, Callable[[Components], dict[str, Any]]] = {
    "nothing": lambda one: {},
    "velocity": lambda one: {"schedule": replace(one.schedule, prediction_type="v_prediction")},
    "noise": lambda one: {"schedule": replace(one.schedule, prediction_type="epsilon")},
    "zero SNR": lambda one: {
        "schedule": replace(one.schedule, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    },
}
TOLD: dict[str, Callable[[Components], dict[str, Any]]] = {
    "sample": lambda one: {"schedule": replace(one.schedule, prediction_type="sample")},
    "betas": lambda one: {"schedule": replace(one.schedule, beta_schedule="linear", beta_end=0.02)},
    "scaling_factor": lambda one: {"autoencoder": _scaled(one.autoencoder)},
}
SILENT: dict[str, Callable[[Components], dict[str, Any]]] = {
    "spacing": lambda one: {"schedule": replace(one.schedule, timestep_spacing="trailing", steps_offset=0)},
    "force_zeros": lambda one: {"force_zeros": not one.force_zeros},
}


def _scaled(autoencoder: Any) -> AutoencoderKL:
    scaled = AutoencoderKL(replace(autoencoder.config, scaling_factor=0.3))
    scaled.load_state_dict(autoencoder.state_dict())
    return scaled.requires_grad_(False).eval()


def draw(components: Components) -> Tensor:
    options: dict[str, Any] = {"num_inference_steps": 3, "width": 32, "height": 32, "output_type": "pt"}
    return Pipeline(components)("a photo of a cat", **options).images


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", list(CHANGES))
def test_what_is_written_is_read(tmp_path: Path, family: str, change: str) -> None:
    components, file = model(family), tmp_path / "a.safetensors"
    components = replace(components, **CHANGES[change](components))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_single_file(components, file, None)
        again = load_pipeline(file)
    assert again.schedule == components.schedule and again.low_res_schedule == components.low_res_schedule
    usual = NoiseSchedule(**SMALL[family]["schedule"]).prediction_type
    named = {"v_pred"} if components.schedule.prediction_type == "v_prediction" != usual else set()
    named |= {"v_pred", "ztsnr"} if change == "zero SNR" else set()
    assert load_file(file).keys() & {"v_pred", "ztsnr"} == named
    word = "v" if components.schedule.prediction_type == "v_prediction" else "epsilon"
    assert metadata(file)["modelspec.prediction_type"] == metadata(file)["modelspec.predict_key"] == word


@pytest.mark.parametrize("change", [*TOLD, *SILENT])
def test_what_no_mark_says_is_in_the_metadata(tmp_path: Path, change: str) -> None:
    """The same pixels; where other programs would draw others, a warning says so."""
    components, file = model("Stable Diffusion XL"), tmp_path / "a.safetensors"
    components = replace(components, **(TOLD | SILENT)[change](components))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_single_file(components, file, None)
    assert len(caught) == (change in TOLD)
    if change in TOLD:
        assert "programs take that of Stable Diffusion XL" in str(caught[0].message)
    again = load_pipeline(file)
    assert again.schedule.to_dict() == components.schedule.to_dict()
    assert again.force_zeros == components.force_zeros
    torch.testing.assert_close(draw(again), draw(components), rtol=1e-3, atol=1e-3)


def test_other_shapes_are_in_the_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of another number of channels and layers than its family has."""
    components, file = model("Stable Diffusion 1.x"), tmp_path / "a.safetensors"
    wide = tiny("Stable Diffusion 1.x")
    monkeypatch.setattr(single_file, "families", lambda: {"Stable Diffusion 1.x": wide})
    with pytest.warns(UserWarning, match="no place for .*layers_per_block of unet"):
        save_single_file(components, file, None)
    again = load_pipeline(file)
    assert again.unet is not None and components.unet is not None
    assert again.unet.config == components.unet.config


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.safetensors" for number in range(6)]
    for file in files:
        save_single_file(model("Stable Diffusion XL"), file)
    assert len({file.read_bytes() for file in files}) == 1
    assert metadata(files[0])["modelspec.architecture"] == "stable-diffusion-xl-v1-base"


def test_learned_words_have_no_place(tmp_path: Path) -> None:
    save_file({"emb_params": torch.zeros(2, 16)}, tmp_path / "foxtoy.safetensors")
    learned = add_embedding(model("Stable Diffusion 1.x"), tmp_path / "foxtoy.safetensors")
    with pytest.raises(InputError, match="no place for a vocabulary other than CLIP's"):
        save_single_file(learned, tmp_path / "a.safetensors")


SAID: list[tuple[str, dict[str, str], dict[str, Tensor], str]] = [
    ("Stable Diffusion XL", {"modelspec.prediction_type": "v"}, {}, "v_prediction"),
    ("Stable Diffusion 1.x", {"modelspec.predict_key": "V"}, {}, "v_prediction"),
    ("Stable Diffusion 1.x", {"ss_v_parameterization": "True"}, {}, "v_prediction"),
    ("Stable Diffusion 2.x", {"modelspec.prediction_type": "epsilon"}, {}, "epsilon"),
    ("Stable Diffusion 2.x", {"modelspec.architecture": "stable-diffusion-v2-512"}, {}, "epsilon"),
    ("Stable Diffusion 2.x", {"modelspec.architecture": "stable-diffusion-v2-768-v"}, {}, "v_prediction"),
    ("Stable Diffusion 2.x", {"ss_base_model_version": "sd_v2_v"}, {}, "v_prediction"),
    ("Stable Diffusion XL", {"modelspec.prediction_type": "epsilon"}, {"v_pred": torch.zeros(0)}, "v_prediction"),
]


@pytest.mark.parametrize(("family", "said", "more", "expected"), SAID)
def test_what_a_file_says_it_predicts(
    tmp_path: Path, family: str, said: dict[str, str], more: dict[str, Tensor], expected: str
) -> None:
    file = tmp_path / "a.safetensors"
    save_file(tensors_of(model(family), SMALL[family]) | more, file, metadata=said)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none says that the file does not say
        assert load_pipeline(file).schedule.prediction_type == expected
        described = describe_file(file)
    assert described["prediction_type"] == expected and "prediction type" not in described["assumed"]
    if "512" in str(said):
        assert described["image_size"] == 512


def test_size_in_the_metadata(tmp_path: Path) -> None:
    components, file = model("Stable Diffusion 1.x"), tmp_path / "a.safetensors"
    assert components.unet is not None
    components.unet.config = replace(components.unet.config, sample_size=24)
    save_single_file(components, file)
    again = load_pipeline(file).unet
    assert metadata(file)["modelspec.resolution"] == "96x96"
    assert again is not None and again.config.sample_size == 24


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", ["alphas_cumprod", "betas"])
def test_tables_of_the_noise_schedule(tmp_path: Path, name: str, half: bool) -> None:
    family, file = "Stable Diffusion 1.x", tmp_path / "a.safetensors"
    weights = tensors_of(model(family), SMALL[family])
    usual = NoiseSchedule(**SMALL[family]["schedule"])
    velocity = replace(usual, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    for schedule in (usual, replace(usual, beta_schedule="linear", beta_start=1e-4, beta_end=0.02), velocity):
        table = schedule.alphas_cumprod
        if name == "betas":
            table = 1 - table / torch.cat([table.new_ones(1), table[:-1]])
        marks = {"v_pred": torch.zeros(0)} if schedule is velocity else {}
        save_file(weights | marks | {name: table.half() if half else table.float()}, file)
        assert load_pipeline(file).schedule.alphas_cumprod.equal(schedule.alphas_cumprod)
    save_file(weights | {name: torch.linspace(0.99, 0.5, 1000) if name == "alphas_cumprod" else torch.ones(9)}, file)
    if name == "alphas_cumprod":
        with pytest.warns(UserWarning, match="none that is known here"):
            assert load_pipeline(file).schedule == usual


REFUSED: list[tuple[dict[str, str], dict[str, Tensor], type[ModelLoadError], str]] = [
    ({}, {"edm_vpred.sigma_max": torch.ones(1)}, ModelConfigError, "EDM formulation"),
    ({}, {"scaled_fp8": torch.zeros(2)}, ModelMismatchError, "scales are not supported; use the file in float16"),
    ({}, {"cond_stage_model.x.scale_weight": torch.ones(1)}, ModelMismatchError, "scale_weight is not expected"),
    ({"latentdiff": "[1]"}, {}, ModelFormatError, "expected a JSON object"),
    ({"latentdiff": '{"auto_map": {}}'}, {}, ModelConfigError, "names code to run"),
    ({"latentdiff": '{"unet": {"block_out_channels": "x"}}'}, {}, ModelConfigError, "block_out_channels"),
    ({"latentdiff": '{"scheduler": {"_class_name": "X"}}'}, {}, ModelConfigError, "discrete variance-preserving"),
]


@pytest.mark.parametrize(("said", "more", "error", "message"), REFUSED)
def test_what_cannot_be_honoured_is_refused(
    tmp_path: Path, said: dict[str, str], more: dict[str, Tensor], error: type[ModelLoadError], message: str
) -> None:
    family, file = "Stable Diffusion 1.x", tmp_path / "a.safetensors"
    save_file(tensors_of(model(family), SMALL[family]) | more, file, metadata=said)
    with pytest.raises(error, match=message):
        load_pipeline(file)


def test_what_is_not_used_is_told(tmp_path: Path) -> None:
    family, file = "Stable Diffusion 1.x", tmp_path / "a.safetensors"
    usual = {"model_ema.decay": torch.zeros(1), "logvar": torch.zeros(9), "sqrt_recipm1_alphas_cumprod": torch.ones(9)}
    weights = tensors_of(model(family), SMALL[family]) | usual
    save_file(weights, file)
    load_pipeline(file)  # which would warn
    save_file(weights | {"control_model.a": torch.zeros(1)}, file)
    with pytest.warns(UserWarning, match=r"control_model\.a in a\.safetensors is not used"):
        load_pipeline(file)
    assert describe_file(file)["notes"] == ["control_model.a in a.safetensors is not used"]

"""Single files of the original layout: recognised, loaded to the same numbers as folders, and refused where odd."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff import Pipeline
from latentdiff.checkpoints import Components, save_pipeline, single_file
from latentdiff.checkpoints.compvis_keys import autoencoder_keys, clip_keys, join, open_clip_keys, unet_keys
from latentdiff.checkpoints.family import ENLARGING, FOLDER, MARKS, UNET, VAE, clip_tokenizer, families
from latentdiff.checkpoints.inspect import describe_file
from latentdiff.cli import main
from latentdiff.diffusion import NoiseSchedule
from latentdiff.errors import InputError, ModelConfigError, ModelMismatchError, ModelValueError, UnsafeModelError
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.clip import CLIPTextConfig, CLIPTextModel
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from tests.conftest import AUTOENCODER
from tests.models.tiny import noise_picture, randomize

FAMILIES = [*MARKS, ENLARGING]


def tiny(family: str) -> dict[str, Any]:
    """The configuration of a family with few channels and layers; what tells families apart stays."""
    shape: dict[str, Any] = json.loads((FOLDER / "families.json").read_text())[family]
    for text in shape["text"]:
        size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        text["config"] |= {**size, "projection_dim": 8}
    unet = shape["unet"]
    levels = len(unet["block_out_channels"])
    unet |= {"block_out_channels": [16 * (1 + i) for i in range(levels)], "attention_head_dim": 2, "norm_num_groups": 8}
    unet |= {"cross_attention_dim": 16 * len(shape["text"]), "sample_size": 8}
    if unet.get("transformer_layers_per_block"):
        unet["transformer_layers_per_block"] = 1
    if unet.get("addition_embed_type"):
        ids = 5 if "refiner" in family else 6
        unet |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 8 + 8 * ids}
    shape["vae"] = AUTOENCODER
    return shape


def components_of(shape: dict[str, Any], channels: int = 4) -> Components:
    channels = 7 if "low_res_schedule" in shape else channels
    unet = UNet2DConditionModel(UNetConfig.from_dict({**shape["unet"], "in_channels": channels}))
    autoencoder = AutoencoderKL(AutoencoderConfig.from_dict(shape["vae"]))
    encoders = [CLIPTextModel(CLIPTextConfig.from_dict(text["config"])) for text in shape["text"]]
    for seed, network in enumerate([unet, autoencoder, *encoders]):
        randomize(network, seed)
        network.requires_grad_(False).eval()
    tokenizers = [clip_tokenizer(text["pad"]) for text in shape["text"]]
    second = len(encoders) > 1
    schedule = dict(shape["schedule"])
    if channels == 9:
        schedule.pop("prediction_type", None)
    return Components(
        unet=unet,
        autoencoder=autoencoder,
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        schedule=NoiseSchedule(**schedule),
        text_encoder_2=encoders[1] if second else None,
        tokenizer_2=tokenizers[1] if second else None,
        low_res_schedule=NoiseSchedule(**shape["low_res_schedule"]) if "low_res_schedule" in shape else None,
        force_zeros=shape.get("force_zeros", False),
    )


def tensors_of(components: Components, shape: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a model as a file of the original layout has them."""
    assert components.unet is not None and isinstance(components.autoencoder, AutoencoderKL)
    unet, vae = components.unet.state_dict(), components.autoencoder.state_dict()
    tensors = {UNET + k: v for k, v in join(unet_keys(unet, components.unet.config), unet).items()}
    places = autoencoder_keys(vae, components.autoencoder.config)
    tensors |= {VAE + k: v for k, v in join(places, vae).items()}
    for text, encoder in zip(shape["text"], (components.text_encoder, components.text_encoder_2)):
        assert encoder is not None
        states = encoder.state_dict()
        named = open_clip_keys(states) if text["layout"] == "open_clip" else clip_keys(states)
        tensors |= {text["prefix"] + k: v for k, v in join(named, states).items()}
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


@pytest.fixture
def use_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {family: tiny(family) for family in FAMILIES}
    monkeypatch.setattr(single_file, "families", lambda: shapes)


def load(path: Path) -> Pipeline:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Pipeline.from_pretrained(path, device="cpu")


@pytest.mark.usefixtures("use_tiny")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("channels", [4, 9])
def test_a_file_is_the_model_it_was_made_of(tmp_path: Path, family: str, channels: int) -> None:
    shape = tiny(family)
    components = components_of(shape, channels)
    save_file(tensors_of(components, shape) | {"model_ema.decay": torch.zeros(1)}, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent", "width": 32, "height": 32}
    options |= {"image": noise_picture(8, 8)} if components.upscales else {}
    ours, expected = (pipe("a photo of a cat", **options) for pipe in (loaded, Pipeline(components)))
    torch.testing.assert_close(ours.images, expected.images, rtol=1e-3, atol=1e-3)  # memory is aligned otherwise
    assert ours.images.std() > 0.1
    for part in ("unet", "autoencoder", "text_encoder", "text_encoder_2"):
        first, second = getattr(loaded.components, part), getattr(components, part)
        if second is not None:
            found, wanted = first.state_dict(), second.state_dict()
            assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert (loaded.components.schedule, loaded.components.low_res_schedule) == (
        components.schedule,
        components.low_res_schedule,
    )
    assert len(ours.settings["model_hash"]) == 64


@pytest.mark.usefixtures("use_tiny")
@pytest.mark.parametrize("family", FAMILIES)
def test_files_and_folders_turn_into_each_other(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a file to a folder and back: bitwise the same tensors."""
    shape = tiny(family)
    first, folder, second = tmp_path / "first.safetensors", tmp_path / "folder", tmp_path / "second.safetensors"
    save_file({name: tensor.half() for name, tensor in tensors_of(components_of(shape), shape).items()}, first)
    assert main(["convert", str(first), str(folder)]) == 0
    assert ("taken for the Stable Diffusion 2.x" in capsys.readouterr().err) == (family == "Stable Diffusion 2.x")
    assert main(["convert", str(folder), str(second)]) == 0
    before, after = load_file(first), load_file(second)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["first.safetensors", "folder", "second.safetensors"]


def test_what_has_no_place_in_a_single_file_is_said(
    built_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(built_model), str(tmp_path / "a.safetensors")]) == 2
    assert "place for CLIP text encoders alone, got BertModel; save it as a folder" in capsys.readouterr().err
    assert main(["convert", str(built_model), str(tmp_path / "none/a.safetensors")]) == 4
    assert main(["convert", str(built_model), str(tmp_path / "copy"), "--dtype", "float32"]) == 0
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.usefixtures("use_tiny")
def test_what_the_file_does_not_say_is_said(tmp_path: Path) -> None:
    shape = tiny("Stable Diffusion 2.x")
    save_file(tensors_of(components_of(shape), shape), tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="taken for the Stable Diffusion 2.x that predicts velocity"):
        Pipeline.from_pretrained(tmp_path / "model.safetensors", device="cpu")


@pytest.mark.usefixtures("use_tiny")
@pytest.mark.parametrize("zero_snr", [False, True])
def test_files_that_say_what_they_predict(tmp_path: Path, zero_snr: bool) -> None:
    shape = tiny("Stable Diffusion XL")
    marks = {"v_pred": torch.zeros(0)} | ({"ztsnr": torch.zeros(0)} if zero_snr else {})
    save_file(tensors_of(components_of(shape), shape) | marks, tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = Pipeline.from_pretrained(tmp_path / "model.safetensors", device="cpu").components.schedule
    assert schedule.prediction_type == "v_prediction" and schedule.ends_in_pure_noise == zero_snr


@pytest.mark.usefixtures("use_tiny")
@pytest.mark.parametrize("family", FAMILIES)
def test_inspection_says_what_a_file_is_and_what_of_it_is_not_used(tmp_path: Path, family: str) -> None:
    shape = tiny(family)
    components = components_of(shape)
    tensors = tensors_of(components, shape) | {"model_ema.decay": torch.zeros(3), "betas": torch.zeros(1000)}
    save_file({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    described = describe_file(tmp_path / "model.safetensors")
    assert described["family"] == family and described["precision"] == "F16"
    assert described["prediction_type"] == components.schedule.prediction_type
    assert described["image_size"] == 8 * components.autoencoder.config.downsample_factor
    assert described["unused"] == {"tensors": 2, "first": ["betas", "model_ema.decay"]}
    assert described["components"].keys() == {"unet", "vae", "text_encoder", "text_encoder_2"} - (
        {"text_encoder_2"} if components.text_encoder_2 is None else set()
    )
    weights = sum(tensor.numel() for tensor in components.unet.state_dict().values())  # type: ignore[union-attr]
    assert described["components"]["unet"]["parameters"] == weights
    assert len(described["model_hash"]) == 64


@pytest.mark.usefixtures("use_tiny")
def test_names_of_old_text_encoders(tmp_path: Path) -> None:
    shape = tiny("Stable Diffusion 1.x")
    components = components_of(shape)
    old = {name.replace(".text_model.", "."): tensor for name, tensor in tensors_of(components, shape).items()}
    old["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(77)
    save_file(old, tmp_path / "old.safetensors")
    loaded = load(tmp_path / "old.safetensors").components.text_encoder.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in components.text_encoder.state_dict().items())


@pytest.mark.usefixtures("use_tiny")
def test_odd_files_are_refused(tmp_path: Path) -> None:
    shape, file = tiny("Stable Diffusion 1.x"), tmp_path / "model.safetensors"
    whole = tensors_of(components_of(shape), shape)
    last, norm = "model.diffusion_model.out.2.weight", "model.diffusion_model.out.0.weight"
    first = "model.diffusion_model.input_blocks.0.0.weight"
    cases: list[tuple[Any, type[Exception], str]] = [
        ({"a": torch.zeros(1)}, ModelConfigError, "expected a whole model in the original layout"),
        ({k: v for k, v in whole.items() if "cond_stage" not in k}, ModelConfigError, "no text encoder"),
        (whole | {first: torch.zeros(16, 5, 3, 3)}, ModelConfigError, "5 input channels is not supported"),
        ({k: v for k, v in whole.items() if k != last}, ModelMismatchError, "out.2.weight is missing"),
        (whole | {norm: torch.zeros(8)}, ModelMismatchError, r"out.0.weight is F32 \[8\] instead of \[16\]"),
        (whole | {norm: torch.full((16,), torch.nan)}, ModelValueError, "16 values that are NaN"),
    ]
    for tensors, error, message in cases:
        save_file(tensors, file)
        with pytest.raises(error, match=message):
            load(file)
    file.write_bytes(b"PK\x03\x04" + bytes(600))
    with pytest.raises(UnsafeModelError):
        load(file)


def test_the_vocabulary_is_that_of_clip() -> None:
    tokens = clip_tokenizer("!")(["a photo of a cat"])
    assert tokens.input_ids[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert clip_tokenizer("<|endoftext|>")(["Crème brûlée 24!"]).input_ids.max() == 49407


def test_families_are_the_published_ones() -> None:
    """Full size, on the meta device: the counts that the papers and cards give."""
    expected = {
        "Stable Diffusion 1.x": 859.5,
        "Stable Diffusion 2.x": 865.9,
        "Stable Diffusion XL": 2567.5,
        "Stable Diffusion XL refiner": 2269.0,
        "Stable Diffusion x4 upscaler": 473.4,
    }
    for family, millions in expected.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel(UNetConfig.from_dict(families()[family]["unet"]))
        count = sum(tensor.numel() for tensor in unet.state_dict().values())
        assert count / 1e6 == pytest.approx(millions, rel=0.01), family


@pytest.mark.usefixtures("use_tiny")
def test_what_the_network_predicts_can_be_said(tmp_path: Path) -> None:
    """As the warning about what a file does not say advises; there is none then."""
    shape, file = tiny("Stable Diffusion 2.x"), tmp_path / "model.safetensors"
    save_file(tensors_of(components_of(shape), shape), file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = Pipeline.from_pretrained(file, device="cpu", prediction_type="epsilon")
    assert pipe.components.schedule.prediction_type == "epsilon"
    save_pipeline(pipe.components, tmp_path / "folder")
    folder = Pipeline.from_pretrained(tmp_path / "folder", device="cpu", prediction_type="v_prediction")
    assert folder.components.schedule.prediction_type == "v_prediction"
    with pytest.raises(InputError, match="prediction_type"):
        Pipeline.from_pretrained(file, device="cpu", prediction_type="noise")

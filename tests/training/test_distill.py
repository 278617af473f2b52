"""`latentdiff distill`: a tuned sampler, a LoRA and a model of few calls, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from latentdiff.training.check import diffusion as check_module
from latentdiff.training.check import table as check_parts
from latentdiff.training.config import DiffusionTraining, load_config, parse_config
from latentdiff.training.losses.consistency import few_calls, neighbours
from PIL import Image
from safetensors.torch import load_file, save_file

from latentdiff import Pipeline
from latentdiff.checkpoints import load_pipeline, save_pipeline
from latentdiff.checkpoints.generation_config import METADATA
from latentdiff.checkpoints.inspect import describe_file
from latentdiff.checkpoints.lora import apply_loras, save_lora
from latentdiff.cli import main
from latentdiff.commands.train import train as cli_train
from latentdiff.errors import InputError, ModelConfigError, ModelFormatError, ModelMismatchError
from latentdiff.generation.result import read_record
from latentdiff.models.lora import Factors, LoRA, layers_of
from latentdiff.training import distill, tiny_decoder, tune_sampler
from tests.training.test_lora_stage import base
from tests.training.test_stages import check_interrupted, pictures, recipe

FEW: dict[str, Any] = {"guidance_scale": 2.0, "calls": 2, "skip": 20, "halvings": 1}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune by few samples, few iterations and a teacher of few steps."""
    monkeypatch.setattr(tune_sampler, "TEACHER_STEPS", 6)
    for name, count in (("TRAINED_ON", 4), ("MEASURED_ON", 3)):
        monkeypatch.setattr(distill, name, count)
    monkeypatch.setattr(distill, "tune", partial(tune_sampler.tune, iterations=4))


@pytest.fixture
def own_precision() -> Iterator[None]:
    """Let a run choose its precision, which accelerate keeps for the time of a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("quick")
def test_a_sampler_is_tuned_by_one_command(
    built_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the model, or into a copy of it; another count of steps joins those that are there."""
    model = shutil.copytree(built_model, tmp_path / "model")
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    data = pictures(tmp_path / "pictures", 4)
    call = ["distill", str(model), "--data", str(data), "--guidance", "2"]
    assert main([*call, "--steps", "2", "--out", str(model)]) == 0
    printed = capsys.readouterr().out
    assert "from many steps by dpmpp_2m" in printed and "--sampler tuned --steps 2 --guidance 2" in printed
    assert all(path.read_bytes() == content for path, content in before.items())
    assert main([*call, "--steps", "1,3", "--out", str(model)]) == 0
    assert main([*call, "--steps", "4,5", "--out", str(tmp_path / "copy")]) == 0
    found = [Pipeline.from_pretrained(place, device="cpu").components.tuned for place in (model, tmp_path / "copy")]
    assert [list(one.tables) for one in found if one is not None] == [[1, 2, 3], [1, 2, 3, 4, 5]]
    assert all(one.guidance_scale == 2 for one in found[1].tables.values())  # type: ignore[union-attr]
    assert not list((tmp_path / "copy").glob("*cache*")), "captions of a folder need none"
    chosen = recipe(tmp_path, "autoencoder", data__keep={"text": ["c"]})
    capsys.readouterr()
    assert main([*call, "--recipe", chosen, "--steps", "1", "--out", str(model)]) == 0
    assert "latentdiff generate c --model" in capsys.readouterr().out


def test_a_tiny_decoder_is_trained_by_one_command(
    built_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the model or in a copy of it; it learns what the autoencoder decodes."""
    monkeypatch.setattr(distill, "train_tiny_decoder", partial(tiny_decoder.train_tiny_decoder, iterations=30))
    model = shutil.copytree(built_model, tmp_path / "model")
    call = ["distill", str(model), "--data", str(pictures(tmp_path / "pictures", 6)), "--preview", "--out"]
    for out in (model, tmp_path / "copy"):
        assert main([*call, str(out)]) == 0
        assert "dB from what the autoencoder decodes" in capsys.readouterr().out
    components = [Pipeline.from_pretrained(place, device="cpu").components for place in (model, tmp_path / "copy")]
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    decoded = [one.tiny_decoder.decode(latents) for one in components if one.tiny_decoder is not None]
    assert torch.equal(decoded[0], decoded[1])
    assert decoded[0].shape == components[0].autoencoder.decode(latents).shape
    assert main([*call, str(model), "--whole"]) == 2


def test_a_tiny_decoder_learns() -> None:
    config = tiny_decoder.AutoencoderTinyConfig(decoder_block_out_channels=(8, 8), num_decoder_blocks=(1, 1))
    latents = torch.randn(40, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted = torch.nn.functional.interpolate(latents[:, :3].clamp(-1, 1), scale_factor=2)
    state = torch.get_rng_state()
    errors = [
        tiny_decoder.train_tiny_decoder(config, latents, wanted, count, lambda line: None)[1] for count in (1, 120)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert errors[1] > errors[0] + 4


@pytest.fixture
def model(built_model: Path, tmp_path: Path) -> Path:
    """The tiny model, its latents of six pictures scaled to what training asks for."""
    for file in pictures(tmp_path / "pictures", 6).glob("*.png"):
        Image.open(file).resize((32, 32)).save(file)
    return base(built_model, tmp_path / "diffusion/model", tmp_path / "pictures")


def config_of(tmp_path: Path, kind: str = "lora") -> str:
    """Write a recipe of consistency distillation, of a LoRA or a whole U-Net."""
    file = Path(recipe(tmp_path, "lora", optimizer__learning_rate=0.01, optimizer__warmup_steps=1))
    tree = yaml.safe_load(file.read_text())
    tree["consistency"] = FEW
    tree["data"]["size"] = 32
    if kind == "unet":
        del tree["lora"]
    file.write_text(yaml.safe_dump(tree))
    return str(file)


@pytest.mark.usefixtures("model")
def test_a_lora_draws_in_few_calls_by_itself(tmp_path: Path) -> None:
    """Its file says sampler, steps and guidance, so that nobody has to; what is given counts more."""
    cli_train(config_of(tmp_path), [], False, None)
    pipe = Pipeline.from_pretrained(tmp_path / "diffusion/model", device="cpu")
    fast = pipe.with_loras({tmp_path / "lora/lora.safetensors": 1.0})
    drawn = fast("a", output_type="latent")
    told = {name: drawn.settings[name] for name in ("sampler", "num_inference_steps", "guidance_scale")}
    assert told == {"sampler": "lcm", "num_inference_steps": 2, "guidance_scale": 1.0}
    slow = pipe("a", output_type="latent", **told)
    assert not torch.allclose(drawn.images, slow.images, atol=1e-3)
    assert fast("a", num_inference_steps=3, output_type="latent").settings["num_inference_steps"] == 3
    assert fast.with_loras({}).components.defaults == pipe.components.defaults == {}
    assert pipe.with_loras({tmp_path / "lora/lora.safetensors": 0.0}).components.defaults == {}
    # In a folder that is written of both, they are the model's.
    fast.save_pretrained(tmp_path / "merged")
    assert Pipeline.from_pretrained(tmp_path / "merged", device="cpu").components.defaults == told


def test_defaults_of_a_lora_are_told_and_checked(built_model: Path, tmp_path: Path) -> None:
    """They are in the metadata, where other tools pass over them; damaged ones are refused like any other file's."""
    components, file = load_pipeline(built_model), tmp_path / "fast.safetensors"
    name, layer = next((name, one) for name, one in layers_of(components.unet).items() if one.weight.ndim == 2)
    rows, columns = layer.weight.shape
    factors = Factors(torch.ones(1, columns), torch.ones(rows, 1), 1.0)
    save_lora(LoRA({"unet": {name: factors}}, defaults={"sampler": "lcm"}), file, components)
    assert describe_file(file)["defaults"] == {"sampler": "lcm"}
    assert apply_loras(components, {file: 1.0}).defaults == {"sampler": "lcm"}
    pipe = Pipeline(components)
    for text, error, message in (
        ("{", ModelFormatError, "expected JSON"),
        ("3", ModelFormatError, "expected a JSON object"),
        ('{"sampler": "lmc"}', ModelConfigError, "sampler 'lmc' is unknown; did you mean"),
        ('{"seed": 3}', ModelConfigError, "'seed' is no option of a model"),
    ):
        save_file(load_file(file), file, metadata={METADATA: text})
        with pytest.raises(error, match=message):
            pipe.with_loras({file: 1.0})


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("kind", ["lora", "unet"])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path, kind: str) -> None:
    check_interrupted(config_of(tmp_path, kind), tmp_path)
    if kind == "lora":
        first, second = ((tmp_path / run / "lora.safetensors").read_bytes() for run in ("unbroken", "resumed"))
        assert first == second
        return
    defaults = json.loads((tmp_path / "resumed/model/generation_config.json").read_text())
    assert defaults == {"sampler": "lcm", "num_inference_steps": 2, "guidance_scale": 1.0}
    pipe = Pipeline.from_pretrained(tmp_path / "resumed/model", device="cpu")
    assert pipe("a", output_type="latent").settings["sampler"] == "lcm"
    file = "unet/diffusion_pytorch_model.safetensors"
    before, after = (load_file(tmp_path / name / file) for name in ("diffusion/model", "resumed/model"))
    assert any(not torch.equal(tensor.half(), after[name].half()) for name, tensor in before.items())


@pytest.mark.usefixtures("model")
def test_it_is_looked_at_before_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in (("OVERFIT_STEPS", 2), ("SAMPLES", 8)):
        monkeypatch.setattr(check_module, name, few)
    monkeypatch.setitem(check_parts.OVERFIT_FLOPS, "cpu", 0.0)
    monkeypatch.setitem(check_parts.OVERFIT_FLOPS, "cuda", 0.0)
    config = load_config(config_of(tmp_path, "unet"))
    assert isinstance(config, DiffusionTraining)
    rows = {row.name: row for row in check_module.examine_diffusion(config)}
    assert rows["gradient norm"].fine and "held-out pictures" not in rows


def test_neighbours_come_nearer() -> None:
    """At first the clean end; each half of the way later; never nearer than told, never below 0."""
    asked = few_config().consistency
    assert asked is not None
    timesteps = torch.tensor([999, 500, 15, 0])
    found = [neighbours(timesteps, done, asked.model_copy(update={"halvings": 3})) for done in (0, 0.25, 0.5, 0.99)]
    assert found[0].tolist() == [0, 0, 0, 0]
    assert [one.tolist()[:2] for one in found[1:]] == [[499, 250], [749, 375], [874, 437]]
    assert all(one.tolist()[2:] == [0, 0] for one in found)
    assert few_calls(asked) == {"sampler": "lcm", "num_inference_steps": 2, "guidance_scale": 1.0}


def few_config(**changes: Any) -> DiffusionTraining:
    tree: dict[str, Any] = {
        "stage": "diffusion",
        "data": {"folder": "pictures"},
        "run": {"out": "out", "steps": 2, "batch_size": 2},
        "start_from": "embedded",
        "consistency": FEW,
    }
    config = parse_config({**tree, **changes})
    assert isinstance(config, DiffusionTraining)
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"kind": "inpaint"}}, "consistency does not go with task inpaint"),
        ({"train": {"kind": "unet_and_text"}}, "consistency does not go with train.kind unet_and_text"),
        ({"objective": {"offset_noise": 0.1}}, "consistency does not go with an objective besides caption_dropout"),
        ({"samples": {"guidance_scale": 2.0}}, "consistency does not go with samples.guidance_scale"),
        ({"evaluate": {"every": 1, "keep_best": "held_out/loss"}}, "does not go with evaluate.keep_best held_out/loss"),
        ({"consistency": {"calls": 0}}, "consistency.calls"),
        ({"consistency": {"cals": 4}}, "unknown key 'consistency.cals'; did you mean 'calls'"),
        ({"start_from": None}, "consistency distils a model that is there; name it as start_from"),
    ],
)
def test_odd_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    if changes.get("start_from", "") is None:
        changes = {**changes, "model": {"layers_per_block": 1}, "schedule": {"num_train_timesteps": 10}}
    with pytest.raises(InputError, match=message):
        few_config(**changes)


@pytest.mark.usefixtures("own_precision")
def test_one_command_trains_a_lora(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints the recipe that it runs; the last line says how to draw with what came out; --resume goes on."""
    monkeypatch.setattr(distill, "STEPS", 4)
    out = tmp_path / "fast"
    call = ["distill", str(model), "--data", str(tmp_path / "pictures"), "--out", str(out), "--lora", "2"]
    chosen = recipe(tmp_path, "autoencoder", data__drop={"text": ["a"]})
    assert main([*call, "--steps", "3", "--guidance", "2", "--recipe", chosen]) == 0
    printed, _, said = capsys.readouterr().out.partition("saved ")
    tree: Any = yaml.safe_load(printed)
    assert parse_config(tree).run.steps == 4 and tree["consistency"]["calls"] == 3
    assert tree["consistency"]["guidance_scale"] == 2 and tree["train"]["rank"] == 2
    assert tree["data"]["drop"] == {"text": ["a"]}
    assert f"--model {model} --lora {out / 'lora.safetensors'}" in said
    lora = (out / "lora.safetensors").read_bytes()
    (out / "lora.safetensors").unlink()
    assert main([*call, "--resume"]) == 0
    assert (out / "lora.safetensors").read_bytes() == lora
    picture = tmp_path / "fast.png"
    draw = ["generate", "a", "--model", str(model), "--lora", str(out / "lora.safetensors"), "-o", str(picture)]
    assert main(draw) == 0
    assert (read_record(picture)["sampler"], read_record(picture)["num_inference_steps"]) == ("lcm", 3)
    replay = ["replay", str(picture), "--model", str(model), "--lora", str(out / "lora.safetensors")]
    assert main([*replay, "-o", str(tmp_path / "again.png")]) == 0
    assert Image.open(picture).tobytes() == Image.open(tmp_path / "again.png").tobytes()
    quick, again = tmp_path / "elsewhere/quick.png", tmp_path / "again.png"
    assert main(["generate", "a", "--model", str(model), "--fast"]) == 2
    assert "no fast_lora.safetensors" in capsys.readouterr().err
    shutil.copyfile(out / "lora.safetensors", model / "fast_lora.safetensors")
    quick.parent.mkdir()
    assert main(["generate", "a", "--model", str(model), "--fast", "-o", str(quick)]) == 0
    assert main(["replay", str(quick), "--model", str(model), "-o", str(again)]) == 0
    drawn = [Image.open(file).tobytes() for file in (picture, quick, again)]
    assert drawn == [drawn[0]] * 3
    config = load_config(out / "config.yaml")
    assert isinstance(config, DiffusionTraining) and config.consistency is not None
    capsys.readouterr()
    assert main(["distill", str(model), "--lora", "2", "--resume", "--out", str(tmp_path / "none")]) == 2
    assert main(["distill", str(out / "lora.safetensors"), *call[2:6]]) == 2
    assert "is a LoRA and no model; merge it" in capsys.readouterr().err
    other = load_pipeline(model)
    unet = type(other.unet)(replace(other.unet.config, block_out_channels=(8, 16)))
    save_pipeline(other.with_unet(unet), tmp_path / "narrow", dtype=None)
    with pytest.raises(ModelMismatchError, match="make no change of"):
        Pipeline.from_pretrained(tmp_path / "narrow", device="cpu").with_loras({out / "lora.safetensors": 1.0})


def test_models_and_numbers_that_are_refused(
    built_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, components = str(pictures(tmp_path / "pictures", 4)), load_pipeline(built_model)
    fast, lcm = tmp_path / "fast", tmp_path / "lcm"
    save_pipeline(replace(components, defaults={"num_inference_steps": 4, "guidance_scale": 1.0}), fast, dtype=None)
    save_pipeline(replace(components, defaults={"sampler": "lcm"}), lcm, dtype=None)
    named, out = [str(built_model), "--data", data], ["--out", str(tmp_path / "out")]
    for call, expected in (
        ([str(fast), "--data", data, *out], "is a model of few steps already"),
        ([str(lcm), "--data", data, "--whole", *out], "is a model of few steps already"),
        (["embedded-inpaint", "--data", data, *out], "only text-to-image models are distilled, got one of inpaint"),
        ([str(tmp_path / "none"), "--data", data, *out], "model"),
        ([*named, "--steps", "0", *out], "--steps must be a whole number from 1 to 32, got 0; try 4"),
        ([*named, "--steps", "4,33", *out], "--steps must be a whole number from 1 to 32, got 33; try 4"),
        ([*named, "--steps", "four", *out], "--steps must be whole numbers, got 'four'; try 4 or 4,8"),
        ([*named, "--steps", "2,4", "--lora", "4", *out], "--steps of a training is one number"),
        ([*named, "--lora", "0", *out], "--lora must be a whole number from 1 to 1024, got 0"),
        ([*named, "--lora", "4", "--whole", *out], "not allowed with argument"),
        ([*named, "--resume", *out], "--resume goes on with a training"),
        ([*named, "--guidance", "nan", *out], "--guidance must be a finite number from 0 to 50"),
        ([str(built_model), *out], "--data is missing"),
        ([str(built_model), "--data", str(tmp_path / "nothing"), *out], "there is no file or folder"),
    ):
        assert main(["distill", *call]) == 2, call
        said = capsys.readouterr().err
        assert expected in said and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists(), "nothing was written"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/letter.txt").write_text("dear")
    assert main(["distill", *named, "--out", str(tmp_path / "other")]) == 2
    assert "holds something that is no saved model" in capsys.readouterr().err
    (tmp_path / "taken").write_text("")
    assert main(["distill", *named, "--out", str(tmp_path / "taken")]) == 4


def test_self_conditioned_models_are_refused(built_model: Path) -> None:
    components = load_pipeline(built_model)
    config = replace(components.unet.config, self_conditioning=True)
    components.unet.config = config
    with pytest.raises(InputError, match="conditioned on its own estimates"):
        distill.require_many_steps(components, "m")

"""YAML is a small regular file, typed strictly; values that cannot be used are refused before data are opened."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from latentdiff.training.config import DiffusionTraining, dump_yaml, load_config, parse_config, read_yaml
from latentdiff.training.config.yaml_file import MAX_BYTES, parse_yaml

from latentdiff.errors import InputError

AUTOENCODER: dict[str, Any] = {
    "stage": "autoencoder",
    "data": {"folder": "pictures"},
    "run": {"out": "runs/x", "steps": 10, "batch_size": 2},
    "model": {},
}
DIFFUSION: dict[str, Any] = {**AUTOENCODER, "stage": "diffusion", "model": {"layers_per_block": 1}}
DIFFUSION["schedule"] = {"beta_start": 1e-4}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        (".5", 0.5),
        ("+3", 3),
        ("0x10", 16),
        ("007", 7),
        ("1:30", "1:30"),
        ("2024-02-30", "2024-02-30"),
        ("1_000", "1_000"),
        ("'5'", "5"),
        ("no", False),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(f"key: {text}", "x")["key"]
    assert found == value and type(found) is type(value)
    assert parse_yaml(dump_yaml({"key": value}), "x") == {"key": value}


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [" + ", ".join(["x"] * 9) + "]"]
    lines += [f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 9) + "]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        bomb(9),
        "a: &a [*a]",
        "[" * 1500,
        "[" * 100 + "]" * 100,
        "a: 1\na: 2",
        "a: {b: 1, b: 2}",
        "!!python/object/apply:os.system [ls]",
        "a: [",
        "? [a]\n: 1",
    ],
    ids=["bomb", "itself", "deep", "deeper", "twice", "twice inside", "object", "open", "list as key"],
)
def test_what_no_recipe_holds_is_refused_at_once(text: str) -> None:
    began = time.perf_counter()
    with pytest.raises(InputError) as caught:
        parse_yaml(text, "x")
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
    assert time.perf_counter() - began < 10


def test_only_small_regular_files_are_read(tmp_path: Path) -> None:
    large, pipe = tmp_path / "large.yaml", tmp_path / "pipe.yaml"
    with large.open("wb") as file:
        file.truncate(4 * 2**30)  # of zeros, that take no room
    os.mkfifo(pipe)
    for file in (large, pipe, tmp_path, Path("/dev/zero")):
        with pytest.raises(InputError, match=f"must be a file of at most {MAX_BYTES} bytes"):
            read_yaml(file)
    for name in ("a\0b", "a" * 5000):
        with pytest.raises(InputError, match="cannot read config"):
            read_yaml(name)
    (tmp_path / "mark.yaml").write_bytes(b"\xef\xbb\xbfstage: x")
    assert read_yaml(tmp_path / "mark.yaml") == {"stage": "x"}


@pytest.mark.parametrize("override", ["prompts=[a", "run.steps={", "run.steps=" + "9" * 5000, "run.steps=2024-99-99"])
def test_an_override_that_is_no_yaml_is_refused(tmp_path: Path, override: str) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_yaml(AUTOENCODER))
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "recipe.yaml", [override])
    assert len(str(caught.value)) < 400


def changed(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    first, *rest = key.split(".", 1)
    return {**tree, first: changed(tree.get(first, {}), rest[0], value) if rest else value}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stage", ["a"], "stage must be one of"),
        ("stage", "x" * 10**6, "stage must be one of"),
        ("run.steps", True, "run.steps"),
        ("run.steps", "5", "run.steps"),
        ("run.seed", 2**200, "run.seed"),
        ("run.out", "a\0b", "without NUL"),
        ("run.out", "\ud800", "valid Unicode"),
        ("run.out", "a" * 300, "at most 255 bytes"),
        ("data.background", "nocolour", "data.background must be a colour"),
        ("data.variants", [], "data.variants"),
        ("data.captions", ["\ud800"], "valid Unicode"),
        ("optimizer", {"betas": [1, 1]}, "optimizer.betas"),
        ("optimizer", {"betas": [float("nan"), 0.9]}, "optimizer.betas"),
        ("optimizer", {"learning_rate": float("inf")}, "optimizer.learning_rate"),
        ("optimizer", {"weight_decay": float("inf")}, "optimizer.weight_decay"),
        ("model", {"_target_": "os.system"}, "model.'_target_' counts for nothing"),
        ("model", {"in_channels": 9}, "in_channels and out_channels are 3"),
        ("model", {"block_out_channels": [32] * 20}, "20 levels"),
        ("model", {"layers_per_block": 10_000}, "model.layers_per_block must be at most 64"),
        ("model", {"latent_channels": 10**6}, "model.latent_channels must be at most 256"),
        ("model", {"block_out_channels": [10**400]}, "model.block_out_channels must be at most"),
        ("model", {"layer_per_block": 1}, "did you mean 'layers_per_block'"),
        ("model", {"use_quant_conv": False}, "need use_quant_conv"),
        ("data.size", 24, "data.size must be a multiple of 16"),
    ],
)
def test_an_impossible_value_is_found_before_anything_else(key: str, value: Any, message: str) -> None:
    tree = changed(AUTOENCODER, "model", {"block_out_channels": [32] * 5} if key == "data.size" else {})
    if key == "data.size":
        shape = {"down_block_types": ["DownEncoderBlock2D"] * 5, "up_block_types": ["UpDecoderBlock2D"] * 5}
        tree["model"] |= shape
    with pytest.raises(InputError) as caught:
        parse_config(changed(tree, key, value))
    assert message in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", {"transformer_layers_per_block": 10_000}, "must be at most 64"),
        ("model", {"layers_per_block": 64, "transformer_layers_per_block": 64}, "more than 4096 blocks"),
        ("model", {"in_channels": 9}, "model.in_channels follows from the latents"),
        ("model", {"layers_per_blocks": 1}, "did you mean 'layers_per_block'"),
        ("schedule", {"_target_": "x"}, "counts for nothing"),
        ("schedule", {"beta_strat": 0.1}, "did you mean 'beta_start'"),
        ("schedule", {"beta_start": 2}, "betas must satisfy"),
        ("samples", {"prompts": []}, "samples.prompts"),
        ("samples", {"prompts": [" "]}, "samples.prompts[0] must not be empty"),
        ("samples", {"prompts": ["a", "x" * 4001]}, "samples.prompts[1] must have at most 4000 characters"),
        ("samples", {"prompts": ["a\0"]}, "NUL"),
        ("samples", {"guidance_scale": 51.0}, "samples.guidance_scale"),
        ("prior", {"prompt": "a", "pictures": 10**9}, "prior.pictures"),
        ("prior", {"prompt": "a\0"}, "prior.prompt must not hold NUL"),
        ("train", {"kind": "loara"}, "train.kind must be one of unet, lora, word, unet_and_text, got 'loara'"),
        ("train", {"rank": 4}, "train.kind is missing"),
        ("task", {"kind": "upscale", "low_res_schedule": {"x": 1}}, "task.low_res_schedule"),
        ("objective", {"losses": "vlb"}, "unknown key 'objective.losses'; did you mean 'loss'"),
    ],
)
def test_an_impossible_value_of_diffusion_too(key: str, value: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_config({**DIFFUSION, key: value})
    assert message in str(caught.value) and len(str(caught.value)) < 1200


def test_brackets_are_plain_text_in_samples_as_in_captions() -> None:
    for given, prompts in (({}, ["clock showing (10:30)", "model car (1:64)"]), ({"text_encoder": "none"}, [""])):
        config = parse_config({**DIFFUSION, **given, "samples": {"prompts": prompts}})
        assert isinstance(config, DiffusionTraining) and config.samples.prompts == prompts

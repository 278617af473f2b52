"""Configs of earlier releases, whose keys of the diffusion stage stood side by side, mean what they meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from latentdiff.training.config import DiffusionTraining, UpscaleTask, completed, load_config, parse_config
from latentdiff.training.loop.checkpointing import config_differences

from latentdiff.commands.train import train as cli_train
from latentdiff.errors import InputError
from tests.training.test_objective import LEARNED
from tests.training.test_objective import recipe as pixel_recipe
from tests.training.test_stages import pictures, weights_of

# The config that release 0.1 kept in a checkpoint.
SAVED = """{"stage": "diffusion", "task": "upscale", "full_mask": 0.1, "degradation": 0.5, "max_noise_level": 350,
"low_res_schedule": {"beta_end": 0.01}, "data": {"folder": "p", "image_column": null, "caption_column": null,
"size": 128, "buckets": false, "crop": "center", "zoom": 1.0, "crops": 4, "keep": {}, "drop": {}, "captions": [],
"held_out": 0.0, "background": "white", "variants": ["plain"]},
"run": {"out": "r", "steps": 3, "batch_size": 2, "accumulation": 1,
"seed": 0, "precision": "auto", "compile": false, "gradient_checkpointing": false, "ema_decay": 0.999,
"ema_snapshots": 0, "log_every": 50, "sample_every": 1000, "save_every": 1000, "keep_checkpoints": 2,
"trackers": ["tensorboard"]}, "autoencoder": "embedded", "channels": 3, "text_encoder": "embedded",
"model": {"layers_per_block": 1, "in_channels": 9}, "schedule": {"prediction_type": "v_prediction"},
"start_from": null, "lora": null, "train_text_encoder": false, "prior": null, "textual_inversion": null,
"optimizer": {"kind": "adamw", "learning_rate": 0.0001, "betas": [0.9, 0.99], "weight_decay": 0.0, "warmup_steps": 100,
"decay_share": 0.5, "max_grad_norm": 1.0}, "caption_dropout": 0.2, "loss": "simple", "vlb_weight": 0.001,
"timesteps": "logit_normal", "self_conditioning": false, "weighting": "p2", "min_snr_gamma": 5.0, "offset_noise": 0.1,
"input_perturbation": 0.0, "prompts": ["a"], "guidance_scale": 2.0, "cache": null}"""
BASE: dict[str, Any] = {
    "stage": "diffusion",
    "data": {"folder": "p"},
    "run": {"out": "r", "steps": 3, "batch_size": 2},
    "start_from": "embedded",
}


def test_a_saved_config_of_an_earlier_release_is_the_recipe_of_today() -> None:
    tree: dict[str, Any] = {
        "stage": "diffusion",
        "task": {"kind": "upscale", "degradation": 0.5, "low_res_schedule": {"beta_end": 0.01}},
        "data": {"folder": "p", "size": 128},
        "run": {"out": "r", "steps": 3, "batch_size": 2},
        "autoencoder": "embedded",
        "model": {"layers_per_block": 1},  # in_channels was passed over
        "schedule": {"prediction_type": "v_prediction"},
        "objective": {"caption_dropout": 0.2, "timesteps": "logit_normal", "weighting": "p2", "offset_noise": 0.1},
        "samples": {"prompts": ["a"], "guidance_scale": 2.0},
    }
    config = parse_config(tree)
    assert isinstance(config, DiffusionTraining) and isinstance(config.task, UpscaleTask)
    saved = json.loads(SAVED)
    assert config_differences(completed(saved), config.model_dump(mode="json")) == []
    assert parse_config(saved) == config
    longer = parse_config({**tree, "task": {"kind": "upscale", "degradation": 0.6}}).model_dump(mode="json")
    assert config_differences(completed(saved), longer) == [
        "task.degradation was 0.5, is 0.6",
        "task.low_res_schedule.beta_end was 0.01, is None",
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"lora": {"rank": 4}}, {"train": {"kind": "lora", "rank": 4}}),
        ({"lora": {}}, {"train": {"kind": "lora"}}),
        ({"train_text_encoder": True}, {"train": {"kind": "unet_and_text"}}),
        (
            {"textual_inversion": {"word": "<x>", "initializer": "a"}, "prompts": ["<x>"]},
            {"train": {"kind": "word", "word": "<x>", "initializer": "a"}, "samples": {"prompts": ["<x>"]}},
        ),
        ({"task": "inpaint", "full_mask": 0.3}, {"task": {"kind": "inpaint", "full_mask": 0.3}}),
        ({"task": "inpaint", "degradation": 1.0}, {"task": {"kind": "inpaint"}}),
    ],
)
def test_old_keys_are_where_they_are_now(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert parse_config({**BASE, **old}) == parse_config({**BASE, **new})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"lora": {}, "train_text_encoder": True}, "lora and train_text_encoder do not go together"),
        ({"lora": {}, "train": {"kind": "unet"}}, r"lora is train \(kind: lora\) now, and both are given"),
        ({"loss": "vlb", "objective": {"loss": "simple"}}, r"loss is objective\.loss now, and both are given"),
        ({"low_res_schedule": {"x": 1}}, r"unknown key 'task\.low_res_schedule'"),
        ({"task": "inpaint", "degradation": 0.5}, r"unknown key 'task\.degradation'"),
    ],
)
def test_what_is_said_twice_or_for_nothing_is_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_config({**BASE, **tree})


def test_a_run_of_an_earlier_release_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Its checkpoints and its config.yaml have the old keys."""
    pictures(tmp_path / "pictures", 6)
    changes = {"loss": "hybrid", "timesteps": "logit_normal", "schedule": LEARNED}
    file = pixel_recipe(tmp_path, **changes)
    for name in ("unbroken", "resumed"):
        cli_train(file, ["run.trackers=[]"], False, str(tmp_path / name))
    run = tmp_path / "resumed"
    (run / "checkpoints/step-00000004/manifest.json").unlink()
    tree = load_config(file, ["run.trackers=[]"]).model_dump(mode="json")
    flat = {**tree, **tree["objective"], **tree["samples"], **dict.fromkeys(("lora", "textual_inversion"))}
    flat["task"] = tree["task"]["kind"]
    for name in ("objective", "samples", "train"):
        del flat[name]
    (run / "config.yaml").write_text(yaml.safe_dump(flat, sort_keys=False))
    rewrite_config(run / "checkpoints/step-00000002", flat)
    cli_train(file, ["run.trackers=[]"], True, str(run))
    ours, theirs = weights_of(tmp_path / "unbroken"), weights_of(run)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert "objective:" in (run / "config.yaml").read_text()


def rewrite_config(checkpoint: Path, config: dict[str, Any]) -> None:
    """Put another config into a checkpoint."""
    from latentdiff.training.loop import checkpointing

    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "config": config}))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"]["state.json"] = checkpointing._fingerprint(checkpoint / "state.json")
    manifest["sha256"] = checkpointing._sha256(checkpointing._render(manifest).encode())
    (checkpoint / "manifest.json").write_text(checkpointing._render(manifest))

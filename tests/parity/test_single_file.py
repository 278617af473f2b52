"""Single files that we write, as diffusers loads them with the configuration of the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from latentdiff import Pipeline
from latentdiff.checkpoints import single_file
from latentdiff.checkpoints.single_file import save_single_file
from tests.checkpoints.test_single_file import components_of, tiny


@pytest.mark.parametrize("family", ["Stable Diffusion 1.x", "Stable Diffusion XL"])
def test_diffusers_draws_the_same_from_a_file_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    shape = tiny(family)
    for text in shape["text"][1:]:  # diffusers tells the two text encoders apart by their widths
        text["config"]["hidden_size"] = 24
        shape["unet"]["cross_attention_dim"] = 16 + 24
    monkeypatch.setattr(single_file, "families", lambda: {family: shape})
    pipe = Pipeline(components_of(shape))
    pipe.save_pretrained(tmp_path / "folder")
    save_single_file(pipe.components, tmp_path / "model.safetensors", dtype=torch.float32)
    kind: Any = getattr(diffusers, type(pipe.to_diffusers()).__name__)
    peer = kind.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(tmp_path / "folder"), local_files_only=True
    )
    peer.scheduler = diffusers.DDIMScheduler.from_config(peer.scheduler.config)
    peer.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 4, "height": 32, "width": 32, "output_type": "pt"}
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = peer("a red fox", latents=noise, guidance_scale=4.0, **options).images
    drawn = pipe("a red fox", latents=noise, guidance_scale=4.0, sampler="ddim", **options).images
    assert (drawn - expected).abs().max() <= 2 / 255

"""Half precision from the prompt to the pixels, for every family of models, against the same in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from latentdiff import Pipeline
from latentdiff.models.autoencoder import AutoencoderKL
from tests.checkpoints.test_single_file import FAMILIES, components_of, tiny
from tests.conftest import AUTOENCODER

PICTURE = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
LIMITS = {"float16": 0.01, "bfloat16": 0.06}  # of the mean difference, as a share of the spread of the latents


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("family", [*FAMILIES, "inpainting"])
def test_latents_differ_by_rounding(family: str, dtype: str) -> None:
    kind = "Stable Diffusion 1.x" if family == "inpainting" else family
    components = components_of(tiny(kind), channels=9 if family == "inpainting" else 4)
    options: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "sampler": "dpmpp_2m"}
    if components.upscales:
        options["image"] = PICTURE.resize((8, 8))
    elif components.inpaints:
        mask = Image.new("L", (32, 32))
        mask.paste(255, (0, 0, 16, 32))
        options |= {"image": PICTURE, "mask": mask}
    else:
        options |= {"height": 32, "width": 32}
    exact = Pipeline(components)("a photo of (a red fox:1.2)", **options).images
    half = Pipeline(replace(components)).to(dtype=dtype)
    rounded = half("a photo of (a red fox:1.2)", **options)
    assert rounded.settings["dtype"] == dtype and rounded.images.dtype == torch.float32
    assert (rounded.images - exact).abs().mean() < LIMITS[dtype] * exact.std()
    assert rounded.notes == []
    options["output_type"] = "pt"
    assert torch.isfinite(half("a photo of a red fox", **options).images).all()


@pytest.mark.parametrize(
    ("family", "asked", "expected"),
    [
        ("Stable Diffusion XL", True, torch.float32),
        ("Stable Diffusion XL", False, torch.float16),
        ("Stable Diffusion 1.x", True, torch.float16),  # where diffusers writes it whatever the model
    ],
)
def test_autoencoders_that_are_known_to_overflow_run_once_in_float32(
    monkeypatch: pytest.MonkeyPatch, family: str, asked: bool, expected: torch.dtype
) -> None:
    components = components_of({**tiny(family), "vae": {**AUTOENCODER, "force_upcast": asked}})
    ran: list[torch.dtype] = []

    def watched(run: Callable[..., Any]) -> Callable[..., Any]:
        def watch(autoencoder: AutoencoderKL, x: Tensor) -> Any:
            ran.append(x.dtype)
            return run(autoencoder, x)

        return watch

    for name in ("encode", "decode"):
        monkeypatch.setattr(AutoencoderKL, name, watched(getattr(AutoencoderKL, name)))
    half = Pipeline(components).to(dtype="float16")
    result = half("a fox", image=PICTURE, strength=0.5, num_inference_steps=2)
    assert ran == [expected] * 2 and result.notes == []
    assert half.dtype == torch.float16

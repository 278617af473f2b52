"""Compare networks of the published sizes, random weights, float32, with those of diffusers, transformers and
OpenCLIP (where it is installed).

Both share the memory of their weights. The largest (Stable Diffusion XL) needs 12 GB.

    python tests/benchmarks/full_size_parity.py
    python tests/benchmarks/full_size_parity.py --only stable-diffusion-xl
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from latentdiff.checkpoints.openclip import load_open_clip
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.clip import CLIPTextConfig, CLIPTextModel
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from tests.models.tiny import relative_error
from tests.parity.published import AUTOENCODERS, CLIPS, UNETS
from tests.parity.test_clip import renamed
from tests.parity.test_unet import call

LATENTS = (16, 16)  # height and width
OPEN_CLIPS = {name: {"architecture": name} for name in ("ViT-H-14", "ViT-bigG-14")}
POOLED = 1280  # width of the pooled text of Stable Diffusion XL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="the models whose name holds this")
    arguments = parser.parse_args()
    kinds: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, float]]]] = {
        "unet": (UNETS, unet),
        "vae": (AUTOENCODERS, autoencoder),
        "text": (CLIPS, text_encoder),
        "openclip": (OPEN_CLIPS, open_clip_text) if importlib.util.find_spec("open_clip") else ({}, open_clip_text),
    }
    figures: dict[str, dict[str, float]] = {}
    for kind, (configs, compare) in kinds.items():
        for name, config in configs.items():
            if arguments.only is None or arguments.only in name:
                begin = time.perf_counter()
                torch.manual_seed(0)
                with torch.no_grad():
                    figures[f"{kind} {name}"] = compare(config)
                gc.collect()
                errors = ", ".join(f"{what} {error:.1e}" for what, error in figures[f"{kind} {name}"].items())
                print(f"{kind:5} {name:32} {errors} ({time.perf_counter() - begin:.0f} s)", flush=True)
    print(json.dumps(figures))


def ours_of(build: Callable[[], nn.Module], weights: dict[str, Tensor]) -> Any:
    """Return our network on the same weights, not copied."""
    with torch.device("meta"):
        network = build()
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval()


def unet(config: dict[str, Any]) -> dict[str, float]:
    from diffusers import UNet2DConditionModel as Reference

    reference: Any = Reference.from_config(config).eval()
    shape = UNetConfig.from_dict(config)
    ours = ours_of(lambda: UNet2DConditionModel(shape), reference.state_dict())
    inputs = inputs_of(shape)
    return {"output": relative_error(ours(**inputs), call(reference, inputs))}


def inputs_of(shape: UNetConfig) -> dict[str, Any]:
    """Return the arguments of one forward call for two images, by name."""
    width = shape.cross_attention_dim
    inputs: dict[str, Any] = {
        "sample": torch.randn(2, shape.in_channels, *LATENTS),
        "timesteps": torch.tensor([7, 801]),
        "context": torch.randn(2, 77, width if isinstance(width, int) else width[0]),
    }
    if shape.num_class_embeds is not None:
        inputs["class_labels"] = torch.tensor([3, 20])
    if shape.expects_sizes:
        ids = ((shape.projection_class_embeddings_input_dim or 0) - POOLED) // (shape.addition_time_embed_dim or 1)
        inputs["added"] = {"text_embeds": torch.randn(2, POOLED), "time_ids": torch.randint(0, 1024, (2, ids))}
    if shape.time_cond_proj_dim is not None:
        inputs["added"] = {"timestep_cond": torch.randn(2, shape.time_cond_proj_dim)}
    return inputs


def autoencoder(config: dict[str, Any]) -> dict[str, float]:
    from diffusers import AutoencoderKL as Reference

    reference: Any = Reference.from_config(config).eval()
    ours = ours_of(lambda: AutoencoderKL(AutoencoderConfig.from_dict(config)), reference.state_dict())
    images = torch.rand(1, 3, 128, 128) * 2 - 1
    latents = reference.encode(images).latent_dist.mode()
    return {
        "encode": relative_error(ours.encode(images).mode(), latents),
        "decode": relative_error(ours.decode(latents), reference.decode(latents).sample),
    }


def text_encoder(config: dict[str, Any]) -> dict[str, float]:
    from transformers import CLIPTextConfig as TheirConfig
    from transformers import CLIPTextModel as Plain
    from transformers import CLIPTextModelWithProjection as Projected

    shape = CLIPTextConfig.from_dict(config)
    reference: Any = (Projected if shape.with_projection else Plain)(TheirConfig(**config)).eval()
    ours = ours_of(lambda: CLIPTextModel(shape), renamed(reference.state_dict()))
    ids = torch.tensor([[49406, 320, 1125, 539, 320, 2368, *[49407] * 71]])
    expected, found = reference(ids, output_hidden_states=True), ours(ids)
    pooled = expected.text_embeds if shape.with_projection else expected.pooler_output
    return {
        "last": relative_error(found.last_hidden_state, expected.last_hidden_state),
        "penultimate": relative_error(found.hidden_states[-2], expected.hidden_states[-2]),
        "pooled": relative_error(found.pooled, pooled),
    }


def open_clip_text(config: dict[str, Any]) -> dict[str, float]:
    import open_clip

    architecture = config["architecture"]
    shape = open_clip.get_model_config(architecture)
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}  # which no text needs
    reference = open_clip.model.CLIP(**{**shape, "vision_cfg": vision}).eval()
    last: dict[str, Tensor] = {}
    reference.ln_final.register_forward_hook(lambda module, inputs, output: last.update(states=output))
    ids = torch.tensor([[49406, 320, 1125, 539, 320, 2368, 49407, *[0] * 70]])
    pooled = reference.encode_text(ids)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in reference.state_dict().items()}, file)
        ours, _ = load_open_clip(file, architecture)
    found = ours(ids)
    return {
        "last": relative_error(found.last_hidden_state, last["states"]),
        "pooled": relative_error(found.pooled, pooled),
    }


if __name__ == "__main__":
    main()

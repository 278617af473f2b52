"""Model folders of a few thousand weights, and their weights by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.checkpoints import Components, load_pipeline, save_pipeline
from latentdiff.checkpoints.variant import save_variant
from latentdiff.diffusion import NoiseSchedule
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.bert import BertConfig, BertModel
from latentdiff.models.clip import CLIPTextConfig, CLIPTextModel
from latentdiff.models.pixels import LabelConfig, LabelEncoder, PixelSpace, PixelSpaceConfig
from latentdiff.models.tokenizer import Tokenizer
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from tests.models.tiny import BERT, CLIP, randomize, write_bert_vocabulary, write_clip_vocabulary

Weights = dict[str, Tensor]

UNET = {"block_out_channels": [16], "norm_num_groups": 4, "cross_attention_dim": 16, "attention_head_dim": 2}
UNET |= {"layers_per_block": 1, "down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
BASE, VARIANTS = "bert", {"variant": None, "difference": 1}  # names of folders, and the rank of the difference
VAE = {"block_out_channels": [8], "norm_num_groups": 4}


def networks_of(components: Components) -> dict[str, nn.Module]:
    """Return the networks of a model by the name of their folder."""
    found = {"unet": components.unet, "vae": components.autoencoder, "text_encoder": components.text_encoder}
    found["text_encoder_2"] = components.text_encoder_2
    return {name: network for name, network in found.items() if network is not None}


def weights_of(components: Components) -> Weights:
    """Return all weights, named by folder and weight."""
    return {
        f"{name}.{key}": value
        for name, net in networks_of(components).items()
        for key, value in net.state_dict().items()
    }


def build_folders(place: Path) -> list[Path]:
    """Write small models: one of classes in pixels, one with BERT, one with CLIP, and two variants of that with BERT.

    The first variant has a whole U-Net, the second a difference.
    """
    texts = {
        "labels": LabelEncoder(LabelConfig.from_dict({"labels": ["a", "b"], "hidden_size": 16})),
        "bert": BertModel(BertConfig.from_dict({**BERT, "vocab_size": 256, "num_hidden_layers": 1})),
        "clip": CLIPTextModel(CLIPTextConfig.from_dict({**CLIP, "vocab_size": 600, "num_hidden_layers": 1})),
    }
    for name, text in texts.items():
        vae: Any = AutoencoderKL(AutoencoderConfig.from_dict(VAE))
        if name == "labels":
            vae = PixelSpace(PixelSpaceConfig())
        channels = vae.config.latent_channels
        unet = UNet2DConditionModel(UNetConfig.from_dict({**UNET, "in_channels": channels, "out_channels": channels}))
        for seed, network in enumerate((unet, vae, text)):
            randomize(network, seed)
        vocabulary = {"bert": write_bert_vocabulary, "clip": write_clip_vocabulary}.get(name)
        tokenizer = Tokenizer.from_folder(vocabulary(place / f"{name}-words")) if vocabulary else None
        components = Components(
            unet=unet, autoencoder=vae, text_encoder=text, tokenizer=tokenizer, schedule=NoiseSchedule()
        )  # type: ignore[arg-type]
        save_pipeline(components, place / name, dtype=None)
    (place / "outside.safetensors").write_bytes((place / "bert/unet/diffusion_pytorch_model.safetensors").read_bytes())
    for name, rank in VARIANTS.items():
        components = load_pipeline(place / BASE)
        assert components.unet is not None
        unet = UNet2DConditionModel(replace(components.unet.config, in_channels=9))
        weights = unet.state_dict()
        randomize(unet, 7)
        for key, value in components.unet.state_dict().items():
            if value.ndim > 1 and value.shape == weights[key].shape:
                weights[key] = value + 0.1 * torch.outer(value.flatten(1)[:, 0], value.flatten(1)[0]).view_as(value)
        unet.load_state_dict(weights)
        save_variant(replace(components, unet=unet), place / name, place / BASE, dtype=None, rank=rank)
    return [place / name for name in (*texts, *VARIANTS)]

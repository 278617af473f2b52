"""Model folders of a few thousand weights, and their weights by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from latentdiff.checkpoints import Parts, save_pipeline
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
VAE = {"block_out_channels": [8], "norm_num_groups": 4}


def networks_of(parts: Parts) -> dict[str, nn.Module]:
    """Return the networks of a model by the name of their folder."""
    found = {"unet": parts.unet, "vae": parts.autoencoder, "text_encoder": parts.text_encoder}
    found["text_encoder_2"] = parts.text_encoder_2
    return {name: network for name, network in found.items() if network is not None}


def weights_of(parts: Parts) -> Weights:
    """Return all weights, named by folder and weight."""
    return {
        f"{name}.{key}": value for name, net in networks_of(parts).items() for key, value in net.state_dict().items()
    }


def build_folders(place: Path) -> list[Path]:
    """Write three small models: one of classes in pixels, one with BERT, one with CLIP."""
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
        parts = Parts(unet, vae, text, tokenizer, NoiseSchedule())  # type: ignore[arg-type]
        save_pipeline(parts, place / name, dtype=None)
    (place / "outside.safetensors").write_bytes((place / "bert/unet/diffusion_pytorch_model.safetensors").read_bytes())
    return [place / name for name in texts]

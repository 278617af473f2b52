"""Shared by the tests of models: configurations of a few thousand weights, inputs for them, small vocabularies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import pre_tokenizers
from torch import Tensor, nn

from latentdiff.models.unet import UNetConfig

CONTEXT = 24  # width of the text states

AUTOENCODERS: dict[str, dict[str, Any]] = {
    "stable-diffusion": {"block_out_channels": [16, 32], "norm_num_groups": 8, "layers_per_block": 2},
    "no-attention": {"block_out_channels": [16, 24, 32], "norm_num_groups": 8, "mid_block_add_attention": False},
    "no-quant-conv": {
        "block_out_channels": [16],
        "norm_num_groups": 4,
        "latent_channels": 8,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}

CROSS_FIRST = {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
CROSS_LAST = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
BASE = {"block_out_channels": [16, 32], "norm_num_groups": 8, "cross_attention_dim": CONTEXT, "attention_head_dim": 4}
XL = {
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {**BASE, **CROSS_FIRST},
    "sd2": {
        **BASE,
        **CROSS_FIRST,
        "attention_head_dim": [2, 4],
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "xl": {**BASE, **CROSS_LAST, **XL},
    "inpainting": {**BASE, **CROSS_FIRST, "in_channels": 9},
    "x4-upscaler": {
        **BASE,
        **CROSS_FIRST,
        "in_channels": 7,
        "num_class_embeds": 50,
        "only_cross_attention": [True, False],
        "use_linear_projection": True,
    },
    "class-timestep": {**BASE, **CROSS_FIRST, "class_embed_type": "timestep"},
    "class-projection": {
        **BASE,
        **CROSS_FIRST,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 12,
    },
    "text-in-time": {
        **BASE,
        **CROSS_FIRST,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 4,
    },
    "lcm": {**BASE, **CROSS_FIRST, "time_cond_proj_dim": 6},
    "no-middle": {**BASE, **CROSS_LAST, "mid_block_type": None, "layers_per_block": [1, 2]},
    "old-frequencies": {**BASE, **CROSS_FIRST, "flip_sin_to_cos": False, "freq_shift": 1},
}

BERT = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
}
CLIP = {**BERT, "projection_dim": 8, "eos_token_id": 59}


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Fill every parameter with noise, so that no layer is without effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.08 * torch.randn(parameter.shape, generator=generator))


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Return the largest absolute difference over the largest absolute value of the reference."""
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def unet_inputs(config: UNetConfig, size: tuple[int, int] = (16, 16)) -> dict[str, Any]:
    """Return the arguments of one forward call for two images, by name."""
    generator = torch.Generator().manual_seed(1)
    inputs: dict[str, Any] = {
        "sample": torch.randn(2, config.in_channels, *size, generator=generator),
        "timesteps": torch.tensor([7, 801]),
        "context": torch.randn(2, 5, CONTEXT, generator=generator),
    }
    if config.class_embed_type == "projection":
        inputs["class_labels"] = torch.randn(2, 12, generator=generator)
    elif config.class_embed_type is not None or config.num_class_embeds is not None:
        inputs["class_labels"] = torch.tensor([3, 20])
    if config.expects_sizes:
        time_ids = torch.randint(0, 1024, (2, 6), generator=generator)
        inputs["added"] = {"text_embeds": torch.randn(2, 16, generator=generator), "time_ids": time_ids}
    if config.time_cond_proj_dim is not None:
        inputs["added"] = {"timestep_cond": torch.randn(2, config.time_cond_proj_dim, generator=generator)}
    return inputs


def write_clip_vocabulary(folder: Path, *, pad_token: str = "<|endoftext|>", window: int = 8) -> Path:
    """Write vocab.json, merges.txt and the settings of a CLIP tokenizer that knows all bytes and a few words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["f o", "fo x</w>", "r e", "re d</w>", "t h", "th e</w>", "c a", "ca t</w>", "i n", "in g</w>"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    flags = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": window,
        "bos_token": {"content": "<|startoftext|>", **flags},
        "eos_token": {"content": "<|endoftext|>", **flags},
        "unk_token": {"content": "<|endoftext|>", **flags},
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    # As published with Stable Diffusion 2: the padding of this file counts, not that of the other one.
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad_token}))
    return folder


def write_bert_vocabulary(folder: Path, *, window: int = 8, lower: bool = True) -> Path:
    """Write vocab.txt and the settings of a BERT tokenizer that knows ASCII letters and a few words."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["fox", "red", "the", "cat", "un", "##ing", "##fox", "caf", "中", "é"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *words]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*tokens, ""]), encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": window, "do_lower_case": lower}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def noise_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a picture of grey noise, "RGB", the same for every order of the tests."""
    grey = np.random.default_rng(seed).normal(128, 80, (height, width)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")

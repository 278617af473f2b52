"""Configurations of the published models, as in their config.json, to compare the shapes of all weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

CROSS_DOWN, PLAIN_DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"

_SD1: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, PLAIN_DOWN],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": [PLAIN_UP, CROSS_UP, CROSS_UP, CROSS_UP],
}
_SD2: dict[str, Any] = {
    **_SD1,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
_XL: dict[str, Any] = {
    **_SD2,
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": [PLAIN_DOWN, CROSS_DOWN, CROSS_DOWN],
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": [CROSS_UP, CROSS_UP, PLAIN_UP],
    "upcast_attention": None,
}

UNETS: dict[str, dict[str, Any]] = {
    "stable-diffusion-1.5": _SD1,
    "stable-diffusion-1.5-inpainting": {**_SD1, "in_channels": 9},
    "stable-diffusion-2.1": _SD2,
    "stable-diffusion-2-inpainting": {**_SD2, "in_channels": 9, "sample_size": 64},
    "stable-diffusion-x4-upscaler": {
        **_SD2,
        "attention_head_dim": 8,
        "block_out_channels": [256, 512, 512, 1024],
        "down_block_types": [PLAIN_DOWN, CROSS_DOWN, CROSS_DOWN, CROSS_DOWN],
        "in_channels": 7,
        "num_class_embeds": 1000,
        "only_cross_attention": [True, True, True, False],
        "sample_size": 128,
        "up_block_types": [CROSS_UP, CROSS_UP, CROSS_UP, PLAIN_UP],
    },
    "stable-diffusion-xl": _XL,
    "stable-diffusion-xl-refiner": {
        **_XL,
        "attention_head_dim": [6, 12, 24, 24],
        "block_out_channels": [384, 768, 1536, 1536],
        "cross_attention_dim": 1280,
        "down_block_types": [PLAIN_DOWN, CROSS_DOWN, CROSS_DOWN, PLAIN_DOWN],
        "projection_class_embeddings_input_dim": 2560,
        "transformer_layers_per_block": 4,
        "up_block_types": [PLAIN_UP, CROSS_UP, CROSS_UP, PLAIN_UP],
    },
    "lcm-dreamshaper": {**_SD1, "time_cond_proj_dim": 256},
}

_KL8: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "stable-diffusion-1.5": _KL8,
    "stable-diffusion-xl": {**_KL8, "force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025},
    "stable-diffusion-x4-upscaler": {
        **_KL8,
        "block_out_channels": [128, 256, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "sample_size": 256,
        "scaling_factor": 0.08333,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
    },
}

_CLIP: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "initializer_factor": 1.0,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "pad_token_id": 1,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
CLIPS: dict[str, dict[str, Any]] = {
    "stable-diffusion-1.5": {
        **_CLIP,
        "architectures": ["CLIPTextModel"],
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
    },
    "stable-diffusion-2.1": {
        **_CLIP,
        "architectures": ["CLIPTextModel"],
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "projection_dim": 512,
    },
    "stable-diffusion-xl-2": {
        **_CLIP,
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
    },
}


def shapes_on_meta(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of a network, by name, without allocating any."""
    with torch.device("meta"):
        return {name: tuple(weight.shape) for name, weight in build().state_dict().items()}

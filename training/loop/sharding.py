"""FSDP2: each process holds its share of every weight, gradient, moment and average, and all of them make one network.

`accelerate launch` only starts the processes and says so: which weights travel together is decided here, for this
network, on a GPU and on a CPU alike. Checkpoints know nothing of it, they hold whole tensors.

Source: Rajbhandari et al. 2020, arXiv 1910.02054, section 5.3; Zhao et al. 2023, arXiv 2304.11277.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer

from latentdiff.checkpoints import Components
from latentdiff.errors import InputError
from latentdiff.models.attention import BasicTransformerBlock, Transformer2DModel
from latentdiff.models.layers import ResnetBlock2D
from latentdiff.models.unet import UNet2DConditionModel

from ..config import DiffusionTraining, TrainingConfig, UNetTraining
from .ema import Ema


def shards_weights(accelerator: Accelerator) -> bool:
    """Say whether the launch file has `distributed_type: FSDP`, which the accelerator itself forgets on a CPU."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return asked and accelerator.distributed_type != DistributedType.NO


def require_shardable(config: TrainingConfig, accelerator: Accelerator) -> None:
    """Raise InputError where weights are to be sharded that cannot be, or not in the way they are trained."""
    if not shards_weights(accelerator):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError("the launch file asks for FSDP version 1; set fsdp_version: 2 in its fsdp_config")
    if not isinstance(config, DiffusionTraining):
        raise InputError("FSDP is for the diffusion stage, the autoencoder is small; launch it with MULTI_GPU")
    if not isinstance(config.train, UNetTraining):
        raise InputError("FSDP is for the U-Net, not for a LoRA, words or the text encoder; launch with MULTI_GPU")
    if config.optimizer.kind != "adamw":
        raise InputError(f"FSDP goes with optimizer.kind adamw, got {config.optimizer.kind}; launch with MULTI_GPU")
    if config.run.compile:
        raise InputError("run.compile does not go together with FSDP; set it to false, or launch with MULTI_GPU")
    if config.run.precision == "fp16":
        raise InputError("run.precision fp16 does not go together with FSDP; choose bf16, or launch with MULTI_GPU")


def shard(unet: UNet2DConditionModel, accelerator: Accelerator) -> None:
    """Leave each process its share of the weights, in place, on its device.

    The weights of a residual block or transformer are gathered while it runs. Those of them that the network applies to
    time and text before its blocks run (see its `forward`) make a group of their own, and what is left the last.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    blocks = [module for module in unet.modules() if isinstance(module, ResnetBlock2D | Transformer2DModel)]
    early: list[nn.Module] = [block.time_emb_proj for block in blocks if isinstance(block, ResnetBlock2D)]
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock):
            for attention in (block.attn1, block.attn2) if block.only_cross else (block.attn2,):
                early += [attention.to_k, attention.to_v]
    for group in (early, *blocks, unet):
        fully_shard(group, mesh=mesh)


def prepared(accelerator: Accelerator, network: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Any]:
    """Return what a loop calls as the network and as the optimizer."""
    return (network, optimizer) if shards_weights(accelerator) else accelerator.prepare(network, optimizer)


def own(tensor: Tensor) -> Tensor:
    """Return this process's share of a sharded tensor, any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor whole, any other as it is. All processes have to call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered_on_main(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return sharded tensors whole, for the main process alone and in its CPU's memory, others as they are.

    All processes have to call it.
    """
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if full is tensor:
            found[name] = tensor
        elif torch.distributed.get_rank() == 0:
            found[name] = full.cpu()
    return found


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return this process's share of a whole tensor if `other`, of the same shape, is sharded; else the tensor."""
    if not (hasattr(other, "device_mesh") and hasattr(other, "placements")) or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements)


def blank_unet(components: Components) -> UNet2DConditionModel:
    """Return a whole U-Net of the shape of a model's, without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(components.unet.config)


@contextmanager
def averaged_network(
    network: nn.Module, components: Components, trained: nn.Module, ema: Ema, accelerator: Accelerator
) -> Iterator[tuple[nn.Module, Components] | None]:
    """Give the main process network and components with averaged weights, for a `with` block, and the others None.

    A sharded network runs in all processes or in none, and drawing is not for all. So its average is gathered into a
    whole network of the main process's own, for which all processes have to come here; else it is swapped into the one
    there is.

    Args:
        network: what is called while training.
        trained: the part of it, or all, whose average `ema` is.
    """
    weights = gathered_on_main(ema.weights)
    if not accelerator.is_main_process:
        yield None
    elif not shards_weights(accelerator):
        with ema.swapped_into(trained):
            yield network, components
    else:
        unet = blank_unet(components)
        unet.load_state_dict(weights, assign=True)
        unet = unet.to(accelerator.device).eval()
        yield unet, replace(components, unet=unet)

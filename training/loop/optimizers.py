"""The optimizers that a run can choose from, and what each keeps beside the weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from latentdiff.errors import InputError, MissingDependencyError

from ..config import OptimizerConfig
from .muon import Muon
from .sharding import own

# bitsandbytes by default: smaller tensors keep moments in float32; of the others each block has a scale.
EIGHT_BIT_FROM = 4096
EIGHT_BIT_BLOCK = 256


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Return the optimizer of a model, which `require_optimizer` has found usable.

    Raises:
        MissingDependencyError: its package is not installed.

    Source: Loshchilov & Hutter 2017, arXiv 1711.05101 (adamw); Dettmers et al. 2021, arXiv 2110.02861 (adamw_8bit);
    Shazeer & Stern 2018, arXiv 1804.04235 (adafactor); `Muon` names its own.
    """
    if config.kind == "muon":
        return Muon(model, config.learning_rate, config.betas, config.weight_decay)
    if config.kind == "adafactor":
        return torch.optim.Adafactor(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    if config.kind == "adamw_8bit":
        return _adamw_8bit(model.parameters(), config)
    return torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )


def require_optimizer(config: OptimizerConfig, device: torch.device) -> None:
    """See that the chosen optimizer is there and works on a device, by one step of it.

    Raises:
        MissingDependencyError: its package is not installed.
        InputError: what is installed does not have it, or not for this device.
    """
    if config.kind == "adafactor" and not hasattr(torch.optim, "Adafactor"):
        raise InputError(f"optimizer.kind adafactor needs torch 2.5 or newer, got {torch.__version__}; choose adamw")
    if config.kind != "adamw_8bit":
        return
    probe = nn.Parameter(torch.ones(EIGHT_BIT_FROM, device=device))
    probe.grad = torch.ones_like(probe)
    optimizer = _adamw_8bit([probe], config)
    try:
        optimizer.step()
    except Exception as error:  # releases without kernels for a device fail in many ways
        raise InputError(
            f"optimizer.kind adamw_8bit: the installed bitsandbytes cannot take a step on {device.type} "
            f"({type(error).__name__}); upgrade it, or choose adamw"
        ) from error


def _adamw_8bit(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise MissingDependencyError(
            "optimizer.kind adamw_8bit needs the package bitsandbytes; install it with "
            "`pip install latentdiff[bitsandbytes]`"
        ) from error
    return AdamW8bit(parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)


def state_bytes(optimizer: Optimizer) -> int:
    """Return how many bytes an optimizer keeps once it has taken a step; single numbers and tables are left out."""
    if isinstance(optimizer, Muon):
        return optimizer.state_bytes()
    kept = KEPT[type(optimizer).__name__]
    return sum(kept(own(parameter).shape) for group in optimizer.param_groups for parameter in group["params"])


def _moments(shape: torch.Size) -> int:
    return 2 * 4 * shape.numel()


def _moments_in_8_bits(shape: torch.Size) -> int:
    count = shape.numel()
    blocks = -(-count // EIGHT_BIT_BLOCK)
    return 2 * (count + 4 * blocks) if count >= EIGHT_BIT_FROM else _moments(shape)


def _means_of_rows_and_columns(shape: torch.Size) -> int:
    count = shape.numel()
    return 4 * (count // shape[-1] + count // shape[-2] if len(shape) > 1 else count)


KEPT = {"AdamW": _moments, "AdamW8bit": _moments_in_8_bits, "Adafactor": _means_of_rows_and_columns}

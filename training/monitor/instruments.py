"""Measure speed, latents and loss terms for the log, without changing weights or random state."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.devices import DTYPES

from ..data.batches import Batch, Conditioning

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Speed:
    """What an image costs, and what the devices could do.

    Attributes:
        flops: that training needs for an image, whether activations are computed twice or a compiler leaves some out.
        peak: per second, of large matrix products on all devices of the run.
    """

    flops: float
    peak: float

    def scalars(self, images_per_second: float) -> dict[str, float]:
        """Return what the log says."""
        rate = self.flops * images_per_second
        return {"flops_per_second": rate, "utilisation": rate / self.peak}


def measure_speed(
    network: nn.Module,
    *inputs: Tensor,
    accelerator: Accelerator,
    more: float = 0.0,
    **options: Unpack[Conditioning],
) -> Speed:
    """Count the FLOPs of training a network, and time a matrix product in the precision of the run.

    A backward pass costs as much again for the inputs of the layers, and once more for their weights where these are
    trained; that of thin layers beside frozen ones is little.

    Args:
        network: not yet prepared by the accelerator; compiled or not.
        inputs, options: of one image.
        more: forward passes without a backward pass, on average.

    Source: Chowdhery et al. 2022, arXiv 2204.02311, appendix B.
    """
    passes = 3 if all(parameter.requires_grad for parameter in network.parameters()) else 2
    flops = (passes + more) * forward_flops(network, *inputs, **options)
    return Speed(flops, matrix_product_rate(accelerator) * accelerator.num_processes)


class _Eager(nn.Module):
    """Call what is written of a network, not what was compiled."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor, **options: Unpack[Conditioning]) -> Any:
        return self.network.forward(*inputs, **options)


@torch.no_grad()
def forward_flops(network: nn.Module, *inputs: Tensor, **options: Unpack[Conditioning]) -> int:
    """Return the FLOPs of a forward pass; nothing is computed, since shapes are enough."""
    eager = _Eager(network)
    weights = {name: tensor.detach().to("meta") for name, tensor in [*eager.named_parameters(), *eager.named_buffers()]}
    with FlopCounterMode(display=False) as counter:
        functional_call(eager, weights, *tree_map(lambda tensor: tensor.to("meta"), (inputs, options)))
    return counter.get_total_flops()


def matrix_product_rate(accelerator: Accelerator) -> float:
    """Return the FLOP/s of a large matrix product in the precision of the run."""
    names = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
    side, device = (1024, "cpu") if accelerator.device.type == "cpu" else (8192, accelerator.device)
    matrix = torch.ones(side, side, dtype=DTYPES[names[accelerator.mixed_precision]], device=device)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # which waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


class LatentStatistics:
    """Mean and standard deviation of each channel of the latents that went by since they were last asked for."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # (3, C) float64: how many numbers, their sum, that of their squares

    def watching(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches as they come."""
        for batch in batches:
            values = batch.latents.detach().double().transpose(0, 1).flatten(1)  # (C, b*h*w)
            sums = torch.stack([torch.full((len(values),), values.shape[1]), values.sum(1), values.square().sum(1)])
            self.sums = sums if self.sums is None else self.sums + sums
            yield batch

    def scalars(self, accelerator: Accelerator) -> dict[str, float]:
        """Return what the log says of the latents of all processes, and begin anew."""
        assert self.sums is not None
        sums = self.sums
        if accelerator.num_processes > 1:  # which is never so on "mps", that has no float64
            sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
        count, total, squares = sums
        self.sums, means = None, total / count
        return _by_channel(means, (squares / count - means.square()).clamp_min(0).sqrt())


def latent_scalars(latents: Tensor) -> dict[str, float]:
    """Return mean and standard deviation of each channel of latents (B, C, h, w), by "latent/mean_0" and so on."""
    pixels = latents.detach().float().transpose(0, 1).flatten(1)  # (C, B*h*w)
    return _by_channel(pixels.mean(dim=1), pixels.std(dim=1, correction=0))


def _by_channel(means: Tensor, stds: Tensor) -> dict[str, float]:
    figures = {"mean": means, "std": stds}
    return {f"latent/{kind}_{n}": value for kind, values in figures.items() for n, value in enumerate(values.tolist())}


def gradient_norms(terms: Mapping[str, Tensor], network: nn.Module, accelerator: Accelerator) -> dict[str, float]:
    """Return the norm of the gradient that each term of a loss, as it is weighed, sends into all weights of a network.

    Costs a backward pass for each term, and while one is looked at the memory of all gradients. Nothing is changed: the
    gradients that the network has stay, and the terms can still be gone back through. A term that sends nothing is 0.
    The graph of a compiled network can be gone through but once, unless it was compiled as `compile_autoencoder` does.

    Args:
        terms: means over this process's share of a batch; the norm is that of the gradient's mean over all shares.

    Returns:
        The norms by "grad_norm/" and the name of the term.
    """
    weights, norms = [weight for weight in network.parameters() if weight.requires_grad], {}
    scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
    for name, term in terms.items():
        norms[f"grad_norm/{name}"] = 0.0
        if term.requires_grad:
            gradients = torch.autograd.grad(term * scale, weights, retain_graph=True, materialize_grads=True)
            averages = accelerator.reduce(list(gradients), "mean")
            norms[f"grad_norm/{name}"] = float(torch.stack(torch._foreach_norm(averages)).norm()) / scale
    return norms

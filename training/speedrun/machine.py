"""How fast this machine is: a few steps of a small autoencoder and U-Net, from which those of other sizes follow."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentdiff.checkpoints import Encoders
from latentdiff.devices import device_name, memory_of
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig

from ..config import OptimizerConfig
from ..loop.cpu import tuned_for_cpu
from ..loop.ema import Ema
from ..loop.optimizers import make_optimizer
from ..monitor.instruments import forward_flops
from .plan import Costs

TIMED = 2  # steps, after one that is not
SAMPLES = {"cpu": 8}  # of a timed step; 64 elsewhere
CAPTIONS = 16  # that are timed
BACKWARD = 3  # times the FLOPs of a forward pass are those of a step


@dataclass(frozen=True)
class Machine:
    """What a speedrun has to do with.

    Attributes:
        name: of the GPU, or the processor.
        threads: of the CPU that are used.
        memory: bytes that the device has.
        autoencoder, unet: FLOPs that their training reaches in a second.
        caption: seconds until its text states are there.
    """

    name: str
    device: str
    threads: int
    memory: int
    autoencoder: float
    unet: float
    caption: float

    def costs(self, autoencoder: AutoencoderKL | None, unet: UNet2DConditionModel, trained: bool) -> Costs:
        """Return what a size takes.

        Args:
            autoencoder: its network; None for a model of pixels.
            unet: its network.
            trained: whether the autoencoder is trained too.
        """
        step = 0.0 if autoencoder is None else BACKWARD * forward_flops(autoencoder, *pictures(autoencoder, 1))
        return Costs(
            autoencoder=step / self.autoencoder if trained else 0.0,
            unet=BACKWARD * forward_flops(unet, *noisy(unet, 1)) / self.unet,
            encode=step / BACKWARD / 2 / self.autoencoder,
            caption=self.caption,
        )


def measure(
    autoencoder: AutoencoderKL, unet: UNet2DConditionModel, encoders: Encoders | None, accelerator: Accelerator
) -> Machine:
    """Return how fast the machine trains two networks, whose weights are changed by it, and reads captions.

    Args:
        encoders: whose text encoder is asked; None where there are no captions.
    """
    device = accelerator.device
    count = SAMPLES.get(device.type, 64)
    networks: tuple[nn.Module, ...] = (autoencoder.to(device), unet.to(device))
    inputs = (pictures(autoencoder, count), noisy(unet, count))
    rates = []
    for network, given in zip(networks, inputs):
        given = tuple(tensor.to(device) for tensor in given)
        flops = count * BACKWARD * forward_flops(network, *(tensor[:1] for tensor in given))
        rates.append(flops / seconds_of_step(network, given, accelerator))
    caption = 0.0
    if encoders is not None:
        texts = [f"a drawing of thing number {number}, in some style" for number in range(CAPTIONS)]
        caption = _timed(lambda: encoders.prompt_encoder(texts)) / CAPTIONS
    name, memory = device_name(device), memory_of(device)
    return Machine(name, device.type, torch.get_num_threads(), memory, rates[0], rates[1], caption)


def seconds_of_step(network: nn.Module, inputs: tuple[Tensor, ...], accelerator: Accelerator) -> float:
    """Return the seconds of a step of training on something, with the optimizer and the average of a run."""
    optimizer, average = make_optimizer(network, OptimizerConfig()), Ema(network, 0.9)
    average.to(accelerator.device)

    def step() -> None:
        with accelerator.autocast():
            output: Any = network(*inputs)
        output = output[0] if isinstance(output, tuple) else output
        output.float().square().mean().backward()
        norm = accelerator.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(network)
        float(norm)  # which waits for the device

    with tuned_for_cpu(network):
        return _timed(step)


def pictures(autoencoder: AutoencoderKL, count: int) -> tuple[Tensor, ...]:
    """Return what an autoencoder is called with for so many pictures of its side."""
    side = autoencoder.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side[:2]
    return (torch.zeros(count, 3, height, width),)


def noisy(unet: UNet2DConditionModel, count: int) -> tuple[Tensor, ...]:
    """Return what a U-Net is called with for so many samples of its side."""
    config = unet.config
    side = config.sample_size if isinstance(config.sample_size, int) else 64
    width = config.cross_attention_dim if isinstance(config.cross_attention_dim, int) else config.cross_attention_dim[0]
    times = torch.zeros(count, dtype=torch.int64)
    return torch.zeros(count, config.in_channels, side, side), times, torch.zeros(count, 32, width)


def blank_autoencoder(model: dict[str, Any]) -> AutoencoderKL:
    """Return the autoencoder of a recipe's section, of shapes alone."""
    with torch.device("meta"):
        return AutoencoderKL(AutoencoderConfig.from_dict(model))


def blank_unet(model: dict[str, Any], channels: int, side: int) -> UNet2DConditionModel:
    """Return the U-Net of a recipe's section for latents, of shapes alone."""
    follows = {"in_channels": channels, "out_channels": channels, "sample_size": side}
    with torch.device("meta"):
        return UNet2DConditionModel(UNetConfig.from_dict({**model, **follows}))


def _timed(call: Callable[[], object]) -> float:
    call()
    began = time.perf_counter()
    for _ in range(TIMED):
        call()
    return (time.perf_counter() - began) / TIMED

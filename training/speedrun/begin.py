"""The beginning of a speedrun: look at machine and pictures, and decide what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from latentdiff.checkpoints import (
    EMBEDDED,
    Components,
    Encoders,
    embedded_model,
    load_autoencoder,
    load_pipeline,
    load_text_encoder,
    save_pipeline,
)
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.images import to_tensor
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.pixels import LabelConfig, LabelEncoder
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig

from ..config import DataConfig
from ..data.augment import rgb
from ..data.dataset import composite, load_images
from ..monitor.reconstructions import mean_psnr, reconstructed
from . import machine, table
from .machine import Machine
from .plan import Costs, needed
from .recipes import VARIANTS, recipe_tree
from .survey import Survey
from .table import Size, Work

WIDTH = 384  # of the text states that recipes of the package are for
LOOKED_AT = 32  # pictures that the embedded autoencoder is tried on
LEAST_PSNR = 20.0  # dB, below which it loses what they show
MANY = 5000  # pictures, from which on a model of their own is worth while, if there is time for it
START = "start"  # folder of a model to start from that is not the embedded one itself


@dataclass(frozen=True)
class Choice:
    """What is to be trained.

    Attributes:
        sizes: that it may be, the smallest first.
        start: model that is trained further; None for a new one.
        why: a line for people.
    """

    sizes: Sequence[Size]
    start: str | None
    why: str


def measure_machine(accelerator: Accelerator, captions: bool) -> Machine:
    """Return how fast this machine is.

    Args:
        captions: whether there are any to be read.
    """
    smallest = table.LATENTS[0]
    shape = {**recipe_tree(smallest.autoencoder)["model"], "sample_size": smallest.side}
    autoencoder = AutoencoderKL(AutoencoderConfig.from_dict(shape))
    follows = {"cross_attention_dim": WIDTH, "in_channels": 4, "out_channels": 4, "sample_size": 16}
    unet = UNet2DConditionModel(UNetConfig.from_dict({**recipe_tree(smallest.recipe)["model"], **follows}))
    return machine.measure(autoencoder, unet, _encoders() if captions else None, accelerator)


def _encoders() -> Encoders:
    text_encoder, tokenizer = load_text_encoder(embedded_model())
    autoencoder = load_autoencoder(embedded_model())
    schedule = NoiseSchedule.from_dict({})
    return Encoders(autoencoder=autoencoder, text_encoder=text_encoder, tokenizer=tokenizer, schedule=schedule)


def costs_of(size: Size, found: Machine) -> Costs:
    """Return what a size takes on a machine."""
    if not size.recipe:
        components = load_pipeline(EMBEDDED)
        assert isinstance(components.autoencoder, AutoencoderKL)
        return found.costs(components.autoencoder, components.unet, trained=False)
    autoencoder, channels, side = None, 3, size.side
    if size.autoencoder:
        shape = {**recipe_tree(size.autoencoder)["model"], "sample_size": size.side}
        autoencoder = machine.blank_autoencoder(shape)
        channels, side = autoencoder.config.latent_channels, size.side // autoencoder.config.downsample_factor
    model = {**recipe_tree(size.recipe)["model"], **size.model, "cross_attention_dim": WIDTH}
    return found.costs(autoencoder, machine.blank_unet(model, channels, side), trained=True)


def choose_model(
    pictures: Survey, config: DataConfig, from_nothing: bool, found: Machine, seconds: float, cache: Path
) -> Choice:
    """Decide whether a new model is trained on pictures of one's own, or the embedded one further.

    Args:
        seconds: that are left.
        cache: folder of what is kept of the pictures.
    """
    if pictures.side <= table.SMALL_SIDE:
        side = max(8, 8 * -(-pictures.side // 8))
        return Choice([table.of_pixels(side)], None, f"pictures of {pictures.side} px need no latents")
    sizes = fitting_device(found.device, pictures.side)
    if from_nothing:
        return Choice(sizes, None, "a new model was asked for")
    psnr, native = embedded_psnr(config, cache)
    if psnr < LEAST_PSNR:
        return Choice(sizes, None, f"the embedded autoencoder gives these pictures back with {psnr:.1f} dB only")
    if pictures.pictures >= MANY:
        work, costs = work_of(pictures), {size.name: costs_of(size, found) for size in sizes}
        large = [s for s in sizes if s.side >= native and needed(s, costs[s.name], work) <= seconds]
        if large:
            return Choice(large, None, f"{pictures.pictures} pictures and the time are enough for a model of their own")
    why = f"{pictures.pictures} pictures are learnt in this time by a model that can draw already"
    start = EMBEDDED if pictures.captions else START
    return Choice([table.of_embedded(native)], start, f"{why}; its autoencoder gives them back with {psnr:.1f} dB")


def fitting_device(device: str, side: int = 2**30) -> list[Size]:
    """Return the sizes of new models for a device, none much larger than the pictures."""
    sizes = [size for size in table.LATENTS if size.on_cpu or device != "cpu"]
    return [size for size in sizes if size.side <= 1.25 * side or size is sizes[0]]


def work_of(pictures: Survey) -> Work:
    """Return how much there is to do before pictures of one's own can be trained on."""
    return Work(round(pictures.pictures * (1 - pictures.held_out)), len(VARIANTS), pictures.captions)


def embedded_psnr(config: DataConfig, cache: Path) -> tuple[float, int]:
    """Return how well the embedded autoencoder gives pictures back, in dB, and the side that its model draws."""
    components = load_pipeline(EMBEDDED)
    assert isinstance(components.autoencoder, AutoencoderKL)
    side = components.native_size[0]
    data = load_images(config.model_copy(update={"size": side}), cache=cache, most=LOOKED_AT)
    images = to_tensor(composite(data.images, rgb(config.background)))  # (N, 3, H, W)
    return mean_psnr(reconstructed(components.autoencoder, images).clamp(-1, 1), images), side


def start_model(start: str | None, folder: Path) -> tuple[str | None, Components | None]:
    """Return the model that is trained further, as configs name it, and loaded; neither for a new one.

    For pictures without captions it is the embedded one that reads no prompt: its context is a vector of zeros.

    Raises:
        StorageError: it cannot be written.
    """
    if start is None:
        return None, None
    if start == EMBEDDED:
        return EMBEDDED, load_pipeline(EMBEDDED)
    place = folder / START
    if not place.is_dir():
        components = load_pipeline(EMBEDDED)
        width = components.text_encoder.config.hidden_size
        nothing = LabelEncoder(LabelConfig(labels=(), hidden_size=width)).requires_grad_(False)
        save_pipeline(replace(components, text_encoder=nothing, tokenizer=None), place, torch.float16)
    return str(place), load_pipeline(place)

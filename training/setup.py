"""Assemble a diffusion run: components, data, trainable modules, optimizer and EMA."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from latentdiff.checkpoints import (
    Components,
    Encoders,
    load_autoencoder,
    load_pipeline,
    load_text_encoder,
)
from latentdiff.checkpoints.components import Autoencoder, check_fit
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import InputError
from latentdiff.models.clip import CLIPTextModel
from latentdiff.models.pixels import LabelConfig, LabelEncoder, PixelSpace, PixelSpaceConfig
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig

from .config import (
    DiffusionTraining,
    LoraConfig,
    TextualInversionConfig,
    UNetAndTextTraining,
    UNetTraining,
    UpscaleTask,
)
from .data.conditions import Task, extra_channels
from .data.dataset import CaptionedImages, open_images, read_captions
from .data.latents import LatentSet, cached_latents
from .data.prior_images import draw_prior
from .data.timesteps import ImportanceSampler
from .loop.ema import Ema
from .loop.optimizers import make_optimizer
from .loop.posthoc_ema import power_emas
from .loop.resources import require_small_enough
from .loop.run import checkpoint_gradients, short
from .loop.sharding import shard, shards_weights
from .loop.state import RunState
from .losses.consistency import few_calls
from .networks.encoders import JointNetwork, add_words, new_words, train_encoder
from .networks.grown_unet import grown_unet
from .networks.lora import Adapted
from .networks.parts import part_folder
from .networks.tasks import with_task

# Latents whose mean and standard deviation are looked at before training, at most about so many.
MEASURED = 4096
MAX_LABELS = 4096  # for each of which the text encoder has a vector of as many numbers


def load_components(config: DiffusionTraining) -> Encoders:
    """Load the model to start from; or the frozen halves, autoencoder, text encoder and schedule, without a U-Net.

    Without an autoencoder latents are pixels; without a text encoder each different caption is a class.
    """
    if config.start_from is None:
        return with_task(config, _load_halves(config))
    other = None if config.autoencoder is None else part_folder("autoencoder", config.autoencoder)
    more_latents = "in_channels" in config.model
    started = load_pipeline(config.start_from, vae=None if more_latents else other)
    if isinstance(config.train, TextualInversionConfig):
        started = add_words(started, config.train)
    if config.model:
        torch.manual_seed(config.run.seed)
        started = started.with_unet(grown_unet(started.unet, config.model))
    if more_latents and other is not None:
        started = replace(started, autoencoder=load_autoencoder(other), source=None, tiny_decoder=None)
        check_fit(other, started)
    return with_task(config, started)


def _load_halves(config: DiffusionTraining) -> Encoders:
    schedule = NoiseSchedule.from_dict(config.schedule)
    if config.autoencoder is None:
        space: Autoencoder = PixelSpace(PixelSpaceConfig(latent_channels=config.channels))
    else:
        space = load_autoencoder(part_folder("autoencoder", config.autoencoder))
    if config.text_encoder in ("labels", "none"):
        labels: tuple[str, ...] = ()
        if config.text_encoder == "labels":
            found = read_captions(config.data, _cache(config, Path(config.run.out)))
            labels = tuple(sorted({caption for captions in found for caption in captions}))
            if len(labels) > MAX_LABELS:
                raise InputError(
                    f"text_encoder: labels is for at most {MAX_LABELS} classes, got {len(labels)} different captions; "
                    "choose embedded"
                )
        classes = LabelEncoder(LabelConfig(labels=labels, hidden_size=max(1, len(labels))))
        return Encoders(
            autoencoder=space.requires_grad_(False), text_encoder=classes.requires_grad_(False), schedule=schedule
        )
    encoder, tokenizer = load_text_encoder(part_folder("text_encoder", config.text_encoder))
    if isinstance(encoder, CLIPTextModel) and encoder.config.with_projection:  # of OpenCLIP's files, and of no use here
        del encoder.text_projection
        encoder.config = replace(encoder.config, with_projection=False)
    return Encoders(
        autoencoder=space.requires_grad_(False), text_encoder=encoder, tokenizer=tokenizer, schedule=schedule
    )


def move_networks(components: Encoders, device: torch.device) -> None:
    """Move all networks of a model to the device of the run, in place; the only place where they are."""
    for network in vars(components).values():
        if isinstance(network, nn.Module):
            network.to(device)


def prepare_data(
    config: DiffusionTraining, components: Encoders, folder: Path, turns: AbstractContextManager[None] | None = None
) -> LatentSet:
    """Open the pictures, encode them and their captions (from the cache where it has them), and check latents.

    Args:
        folder: of the run.
        turns: held while pictures are examined and drawn, which one process does before the others; what is encoded
            they share out by themselves.

    Raises:
        InputError: the pictures cannot be used, or the latents' mean or standard deviation is far from 0 and 1.
        StorageError: the cache cannot be written.
    """
    prior: tuple[DiffusionTraining, CaptionedImages] | None = None
    with turns or nullcontext():
        images = open_data(config, components, folder)
        if config.prior is not None and isinstance(components, Components):
            drawn = config.model_copy(update={"data": draw_prior(config, components, folder)})
            prior = drawn, open_data(drawn, components, folder)
    data = encode_data(config, components, folder, images)
    return data if prior is None else replace(data, prior=encode_data(prior[0], components, folder, prior[1]))


def open_data(config: DiffusionTraining, components: Encoders, folder: Path) -> CaptionedImages:
    """Open the pictures to train on; see `training.data.dataset.open_images`."""
    multiple = 8 * components.autoencoder.config.downsample_factor
    return open_images(config.data, config.run.batch_size, folder, _cache(config, folder), multiple)


def encode_data(config: DiffusionTraining, components: Encoders, folder: Path, images: CaptionedImages) -> LatentSet:
    """Encode pictures and their captions, and check the latents; see `prepare_data`."""
    cache = _cache(config, folder)
    task = None if config.task.kind == "text_to_image" else Task.of(config, components)
    data = cached_latents(images, config.data, config.run.seed, components, cache, config.encodes_each_step, task)
    if isinstance(components.autoencoder, PixelSpace):
        return data
    kinds = len(data.choices[0])
    measured = range(0, len(data.latents), kinds * (1 + (len(images) - 1) // MEASURED))
    plain = torch.cat([data.latents[index].float().flatten(1) for index in measured], dim=1)  # (C, N*h*w)
    mean, std = plain.mean(dim=1), plain.std(dim=1)
    if mean.abs().max() > 0.3 or std.max() > 1.5 or std.min() < 0.6:
        problem = f"mean about 0 and standard deviation about 1, got {short(mean, most=16)} and {short(std, most=16)}"
        if config.start_from is None and config.autoencoder != "embedded":
            raise InputError(
                f"latents must have {problem}; the autoencoder was measured on other pictures: train it on these, or "
                "run its export again"
            )
        print(f"latents of these pictures do not have {problem}: the autoencoder knows other ones", file=sys.stderr)
    return data


def assemble(
    config: DiffusionTraining, data: LatentSet, components: Encoders, accelerator: Accelerator
) -> tuple[nn.Module, Components, RunState]:
    """Return the network that is called while training, the components with its U-Net, and what is trained."""
    torch.manual_seed(config.run.seed)
    unet = network_to_train(config, data, components)
    with_unet = replace(components.with_unet(unet), tuned=None)  # a sampler that was tuned for the weights of before
    if config.consistency is not None:
        with_unet = replace(with_unet, defaults=few_calls(config.consistency))
    network, trained = adapt(unet, config, with_unet)
    modules: dict[str, nn.Module] = {"model": trained}
    if config.objective.timesteps == "importance":
        modules["importance"] = ImportanceSampler(components.schedule.num_train_timesteps)
    if config.run.gradient_checkpointing:
        checkpoint_gradients(unet)
    if shards_weights(accelerator):
        shard(unet, accelerator)
    ema, profiles = Ema(trained, config.run.ema_decay), power_emas(trained, config.run)
    state = RunState(modules, {"optimizer": make_optimizer(trained, config.optimizer)}, ema, profiles)
    return network, with_unet, state


def adapt(unet: UNet2DConditionModel, config: DiffusionTraining, components: Components) -> tuple[nn.Module, nn.Module]:
    """Return what is called in place of a U-Net while training, and the part of it, or all, that is trained."""
    if isinstance(config.train, LoraConfig):
        adapted = Adapted(unet, config.train)
        return adapted, adapted.adapters
    if isinstance(config.train, TextualInversionConfig):
        words = new_words(components, config.train)
        return JointNetwork(unet.requires_grad_(False), components.text_encoder.requires_grad_(False), words), words
    if isinstance(config.train, UNetAndTextTraining):
        joint = JointNetwork(unet, train_encoder(components))
        return joint, joint
    return unet, unet


def network_to_train(config: DiffusionTraining, data: LatentSet, components: Encoders) -> UNet2DConditionModel:
    """Return a new U-Net that fits the latents and contexts, or that of the model to start from.

    Raises:
        InputError: it has no weights of one of the parts that are to be trained.
    """
    if isinstance(components, Components):
        parts = config.train.parts if isinstance(config.train, UNetTraining) else []
        return with_gradients_of(components.unet.train(), parts)
    return UNet2DConditionModel(unet_config(config, components, round(data.latents[0][0].numel() ** 0.5)))


def with_gradients_of(unet: UNet2DConditionModel, parts: Sequence[str]) -> UNet2DConditionModel:
    """Return a U-Net of which only some parts are trained, or all without any; see `UNetTraining`."""
    unet.requires_grad_(not parts)
    for part in parts:
        weights = [weight for name, weight in unet.named_parameters() if f"{name}.".startswith(f"{part}.")]
        if not weights:
            blocks = ", ".join(name for name, _ in unet.named_children())
            raise InputError(f"train.parts: the U-Net has no weights of {part!r:.80}; its parts are {blocks}")
        for weight in weights:
            weight.requires_grad_(True)
    return unet


def unet_config(config: DiffusionTraining, components: Encoders, side: int) -> UNetConfig:
    """Return the shape of a new U-Net for latents of a side.

    Raises:
        InputError: the recipe asks for another width of text states than the text encoder has.
        ModelConfigError: its values do not fit together.
    """
    channels, width = components.autoencoder.config.latent_channels, components.text_encoder.config.hidden_size
    given = config.model.get("cross_attention_dim", width)
    if any(one != width for one in (given if isinstance(given, list | tuple) else (given,))):
        raise InputError(
            f"model.cross_attention_dim must be {width}, that of the text encoder, got {given}; leave it out"
        )
    twice, learned = config.objective.self_conditioning, components.schedule.variance_type == "learned_range"
    follows = {
        "in_channels": channels * (1 + twice) + extra_channels(config, channels),
        "out_channels": channels * (1 + learned),
        "sample_size": side,
        "self_conditioning": twice,
    }
    if isinstance(config.task, UpscaleTask):
        follows["num_class_embeds"] = config.task.max_noise_level + 1
    return UNetConfig.from_dict({"cross_attention_dim": width, **config.model, **follows})


def require_buildable(config: DiffusionTraining, components: Encoders, accelerator: Accelerator) -> None:
    """Raise InputError where a new U-Net cannot be built, or not be trained in the memory of the device."""
    if isinstance(components, Components):
        return
    processes = accelerator.num_processes if shards_weights(accelerator) else 1
    require_small_enough(
        lambda: UNet2DConditionModel(unet_config(config, components, 8)), accelerator.device, processes
    )


def _cache(config: DiffusionTraining, folder: Path) -> Path:
    return Path(config.cache) if config.cache else folder / "cache"

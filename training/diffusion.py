"""Train a latent text-to-image U-Net from scratch on captioned pictures.

Try:
    latentdiff train configs/emoji-diffusion.yaml
    latentdiff generate "a red fox" --model runs/emoji-diffusion/model
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from latentdiff.checkpoints import (
    Parts,
    embedded_model,
    load_autoencoder,
    load_pipeline,
    load_text_encoder,
    save_pipeline,
)
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import InputError
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from latentdiff.pipeline import Pipeline
from training.cache import LatentSet, cached_latents
from training.checkpointing import gather, restore, save_checkpoint
from training.config import DiffusionTraining
from training.dataset import batch_indices, load_images
from training.ema import Ema
from training.run import (
    Log,
    StepGuard,
    adamw,
    compile_checked,
    fast_attention,
    learning_rate,
    mixed_precision,
    open_run,
    save_grid,
    seeded,
    set_learning_rate,
    stop_on_signal,
)


def train_diffusion(config: DiffusionTraining, resume: bool = False) -> Path:
    """Run the whole stage and return the folder of the trained model (diffusers layout, EMA weights).

    Raises:
        InputError: data or config cannot be used, or the loss is not finite 20 steps in a row.
        StorageError: a checkpoint cannot be written.
    """
    checkpoint = open_run(config, resume)
    run, folder = config.run, Path(config.run.out)
    accelerator = Accelerator(mixed_precision=mixed_precision(run), cpu=not torch.cuda.is_available())
    parts = load_parts(config)
    data = prepare_data(config, parts, folder)
    torch.manual_seed(run.seed)
    unet: Any = network_to_train(config, data)
    optimizer: Any = adamw(unet, config.optimizer)
    plain: UNet2DConditionModel = unet
    parts = replace(parts, unet=plain)
    ema = Ema(unet, run.ema_decay)
    modules, optimizers = {"model": unet}, {"optimizer": optimizer}
    first = restore(checkpoint, modules, optimizers, ema)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    ema.to(accelerator.device)
    log, guard = Log(run, first, "diffusion"), StepGuard()
    if run.compile:
        latents, context, _ = (part.to(accelerator.device) for part in draw_batch(data, config, first))
        timesteps = torch.zeros(len(latents), dtype=torch.int64, device=accelerator.device)
        compile_checked(plain, latents, timesteps, context, autocast=accelerator.autocast())
    with stop_on_signal() as stopped, fast_attention():
        for step in range(first, run.steps):
            latents, context, nulls = (part.to(accelerator.device) for part in draw_batch(data, config, step))
            generator = seeded(run.seed, step, 1)
            timesteps = stratified_timesteps(len(latents), parts.schedule.num_train_timesteps, generator)
            noise = torch.randn(latents.shape, generator=generator).to(latents.device)
            timesteps = timesteps.to(latents.device)
            with accelerator.autocast():
                output = unet(parts.schedule.add_noise(latents, noise, timesteps), timesteps, context)
            target = parts.schedule.target(latents, noise, timesteps)
            errors = (output.float() - target).square().mean(dim=(1, 2, 3))  # (B,)
            loss = (errors * loss_weight(parts.schedule, timesteps, config.min_snr_gamma)).mean()
            set_learning_rate(optimizer, learning_rate(config.optimizer, step, run.steps))
            optimizer.zero_grad()
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(plain.parameters(), config.optimizer.max_grad_norm)
            if guard.allows(loss, norm, step):
                optimizer.step()
                ema.update(plain)
            log.step(
                step, {"loss": loss, "grad_norm": norm, "null": nulls.float().mean(), "skipped": guard.bad_steps > 0}
            )
            done = step + 1
            if done % run.sample_every == 0 or done == run.steps:
                with ema.swapped_into(plain):
                    draw_samples(parts, config, folder / f"samples/{done:08d}.png")
            if done % run.save_every == 0 or done == run.steps or stopped:
                tensors = gather(modules, optimizers, ema)
                save_checkpoint(folder, done, tensors, {"ema_updates": ema.updates}, run.keep_checkpoints)
            if stopped:
                log.close()
                return folder
    log.close()
    model = folder / "model"
    with ema.swapped_into(plain):
        save_pipeline(parts, model, torch.float16)
    print(f"saved {model}; try: latentdiff generate {config.prompts[0]!r} --model {model}")
    return model


def prepare_data(config: DiffusionTraining, parts: Parts, folder: Path) -> LatentSet:
    """Load the pictures, encode them and their captions (from the cache where it has them), and check the latents.

    Raises:
        InputError: the latents' mean or standard deviation is far from 0 and 1.
    """
    images = load_images(config.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for network in (parts.autoencoder, parts.text_encoder):
        network.to(device)
    cache = Path(config.cache) if config.cache else folder / "cache"
    data = cached_latents(images, config.data, config.run.seed, parts, cache)
    plain = data.latents[:, 0].float()
    mean, std = plain.mean(dim=(0, 2, 3)), plain.std(dim=(0, 2, 3))
    if mean.abs().max() > 0.3 or std.max() > 1.5 or std.min() < 0.6:
        raise InputError(
            f"latents must have mean about 0 and standard deviation about 1, got {_short(mean)} and {_short(std)}; "
            "the autoencoder was measured on other pictures: train it on these, or run its export again"
        )
    return data


def network_to_train(config: DiffusionTraining, data: LatentSet) -> UNet2DConditionModel:
    """Return a new U-Net that fits the latents and contexts, or the one of the model that `start_from` names.

    Raises:
        InputError: that model's U-Net has another shape than the config asks for.
    """
    channels, side = data.latents.shape[2], data.latents.shape[-1]
    follows = {"in_channels": channels, "out_channels": channels, "sample_size": side}
    shape = UNetConfig.from_dict({"cross_attention_dim": data.contexts.shape[-1], **config.model, **follows})
    unet = UNet2DConditionModel(shape)
    if config.start_from is not None:
        trained = load_pipeline(config.start_from).unet
        assert trained is not None
        if trained.config != shape:
            raise InputError(f"start_from: {config.start_from} has a U-Net of another shape; make `model` fit it")
        unet.load_state_dict(trained.state_dict())
    return unet


def draw_batch(data: LatentSet, config: DiffusionTraining, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents (B, C, h, w), contexts (B, L, D) and which of them are the null prompt (B,) bool, for one step.

    Variant, caption and caption dropout of a sample are a pure function of (seed, sample, epoch).
    """
    run, kinds = config.run, list(dict.fromkeys(config.data.variants))
    count = len(data.latents)
    indices = batch_indices(count, run.batch_size, step, run.seed)
    picked, rows = [], []
    for position, index in enumerate(indices):
        epoch = (step * run.batch_size + position) // count
        rng = np.random.default_rng([run.seed, int(index), epoch])
        kind = kinds.index(config.data.variants[rng.integers(len(config.data.variants))])
        caption = int(rng.choice(data.choices[index][kind]))
        rows.append(0 if rng.random() < config.caption_dropout else caption)
        picked.append(kind)
    latents = data.latents[torch.from_numpy(indices), torch.tensor(picked)].float()
    chosen = torch.tensor(rows)
    return latents, data.contexts[chosen].float(), chosen == 0


def stratified_timesteps(count: int, num_train_timesteps: int, generator: torch.Generator) -> Tensor:
    """Draw one timestep from each of `count` equal strata, shuffled: uniform, with less variance in the loss.

    Returns:
        (count,) int64.

    Source: Kingma et al. 2021, arXiv 2107.00630, appendix I.1.
    """
    offsets = torch.rand((), generator=generator) + torch.randperm(count, generator=generator)
    return (offsets / count * num_train_timesteps).long().clamp_max(num_train_timesteps - 1)


def loss_weight(schedule: NoiseSchedule, timesteps: Tensor, gamma: float) -> Tensor:
    """Return the min-SNR weight (B,) of each timestep: min(SNR, gamma) on the x0 error, whatever the network predicts.

    Source: Hang et al. 2023, arXiv 2303.09556, Eq. 4 and section 3.4.
    """
    if gamma == 0:
        return torch.ones(len(timesteps), device=timesteps.device)
    snr = schedule.snr(timesteps).to(timesteps.device, torch.float32)
    clipped = snr.clamp_max(gamma)
    of_error = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    return clipped / of_error[schedule.prediction_type]


def draw_samples(parts: Parts, config: DiffusionTraining, file: Path) -> None:
    """Draw the config's prompts, one row of pictures each eight, with fixed seeds."""
    result = Pipeline(parts)(config.prompts, guidance_scale=config.guidance_scale, seed=0, output_type="pt")
    save_grid(result.images * 2 - 1, file, columns=8)


def load_parts(config: DiffusionTraining) -> Parts:
    """Load the frozen halves: autoencoder, text encoder, tokenizer and schedule; the U-Net comes later."""
    text = embedded_model() if config.text_encoder == "embedded" else Path(config.text_encoder)
    text_encoder, tokenizer = load_text_encoder(text)
    schedule = NoiseSchedule.from_dict(config.schedule)
    return Parts(
        unet=None,
        autoencoder=load_autoencoder(Path(config.autoencoder)),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        schedule=schedule,
    )


def _short(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.2f}" for value in values.tolist()) + "]"

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
from latentdiff.models.pixels import LabelConfig, LabelEncoder, PixelSpace, PixelSpaceConfig
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from latentdiff.pipeline import Pipeline
from latentdiff.settings import Settings
from training.cache import LatentSet, cached_latents
from training.checkpointing import gather, restore, save_checkpoint
from training.config import DiffusionTraining
from training.dataset import batch_indices, load_images
from training.ema import Ema
from training.objective import diffusion_losses, model_inputs, require_trainable
from training.process import show_process
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
from training.timesteps import ImportanceSampler, stratified_timesteps


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
    require_trainable(config, parts)
    data = prepare_data(config, parts, folder)
    torch.manual_seed(run.seed)
    unet: Any = network_to_train(config, data, parts)
    optimizer: Any = adamw(unet, config.optimizer)
    plain: UNet2DConditionModel = unet
    parts = replace(parts, unet=plain)
    ema, importance = Ema(unet, run.ema_decay), ImportanceSampler(parts.schedule.num_train_timesteps)
    modules, optimizers = {"model": unet}, {"optimizer": optimizer}
    if config.timesteps == "importance":
        modules["importance"] = importance
    first = restore(checkpoint, modules, optimizers, ema)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    ema.to(accelerator.device)
    log, guard = Log(run, first, "diffusion"), StepGuard()
    if run.compile:
        latents, context, _ = (part.to(accelerator.device) for part in draw_batch(data, config, first))
        timesteps = torch.zeros(len(latents), dtype=torch.int64, device=accelerator.device)
        inputs = model_inputs(latents, config)
        compile_checked(plain, inputs, timesteps, context, autocast=accelerator.autocast())
    with stop_on_signal() as stopped, fast_attention():
        for step in range(first, run.steps):
            latents, context, nulls = (part.to(accelerator.device) for part in draw_batch(data, config, step))
            generator = seeded(run.seed, step, 1)
            drawn, weights = draw_timesteps(importance, config, len(latents), generator)
            timesteps = drawn.to(latents.device)
            with accelerator.autocast():
                losses = diffusion_losses(unet, parts, config, latents, context, timesteps, generator)  # (B,)
            loss = (losses * weights.to(losses)).mean()
            set_learning_rate(optimizer, learning_rate(config.optimizer, step, run.steps))
            optimizer.zero_grad()
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(plain.parameters(), config.optimizer.max_grad_norm)
            if guard.allows(loss, norm, step):
                optimizer.step()
                ema.update(plain)
            if config.timesteps == "importance":
                importance.update(drawn, losses)
            values = {"loss": loss, "grad_norm": norm, "null": nulls.float().mean(), "skipped": guard.bad_steps > 0}
            log.step(step, values)
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
    with ema.swapped_into(plain):
        return export(parts, config, folder)


def export(parts: Parts, config: DiffusionTraining, folder: Path) -> Path:
    """Save the model, say how to use it, and show what it learnt where it was trained on pixels."""
    model = folder / "model"
    save_pipeline(parts, model, torch.float16)
    if config.autoencoder is None:
        show_process(parts, config, folder)
    print(f"saved {model}; try: latentdiff generate {config.prompts[0]!r} --model {model}")
    return model


def draw_timesteps(
    importance: ImportanceSampler, config: DiffusionTraining, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return timesteps (count,) int64 of a batch and the weights (count,) of their losses."""
    if config.timesteps == "importance":
        return importance.draw(count, generator)
    return stratified_timesteps(count, len(importance.losses), generator), torch.ones(count)


def prepare_data(config: DiffusionTraining, parts: Parts, folder: Path) -> LatentSet:
    """Load the pictures, encode them and their captions (from the cache where it has them), and check latents.

    Raises:
        InputError: the latents' mean or standard deviation is far from 0 and 1.
    """
    images = load_images(config.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for network in (parts.autoencoder, parts.text_encoder):
        network.to(device)
    cache = Path(config.cache) if config.cache else folder / "cache"
    data = cached_latents(images, config.data, config.run.seed, parts, cache)
    if isinstance(parts.autoencoder, PixelSpace):
        return data
    plain = data.latents[:, 0].float()
    mean, std = plain.mean(dim=(0, 2, 3)), plain.std(dim=(0, 2, 3))
    if mean.abs().max() > 0.3 or std.max() > 1.5 or std.min() < 0.6:
        raise InputError(
            f"latents must have mean about 0 and standard deviation about 1, got {_short(mean)} and {_short(std)}; "
            "the autoencoder was measured on other pictures: train it on these, or run its export again"
        )
    return data


def network_to_train(config: DiffusionTraining, data: LatentSet, parts: Parts) -> UNet2DConditionModel:
    """Return a new U-Net that fits the latents and contexts, or that of the model to start from."""
    if parts.unet is not None:
        return parts.unet.requires_grad_(True).train()
    channels, side = data.latents.shape[2], data.latents.shape[-1]
    follows = {
        "in_channels": channels * (1 + config.self_conditioning),
        "out_channels": channels * (1 + (parts.schedule.variance_type == "learned_range")),
        "sample_size": side,
        "self_conditioning": config.self_conditioning,
    }
    shape = {"cross_attention_dim": data.contexts.shape[-1], **config.model, **follows}
    return UNet2DConditionModel(UNetConfig.from_dict(shape))


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


def draw_samples(parts: Parts, config: DiffusionTraining, file: Path) -> None:
    """Draw the config's prompts, one row of pictures each eight, with fixed seeds."""
    steps = min(Settings.num_inference_steps, parts.schedule.num_train_timesteps)
    options: dict[str, Any] = {"guidance_scale": config.guidance_scale, "num_inference_steps": steps}
    result = Pipeline(parts)(config.prompts, seed=0, output_type="pt", **options)
    save_grid(result.images * 2 - 1, file, columns=8)


def load_parts(config: DiffusionTraining) -> Parts:
    """Load the model to start from; or the frozen halves, autoencoder, text encoder and schedule, without a U-Net.

    Without an autoencoder latents are pixels; without a text encoder each different caption is a class.
    """
    if config.start_from is not None:
        return load_pipeline(config.start_from)
    schedule = NoiseSchedule.from_dict(config.schedule)
    if config.autoencoder is None:
        space: Any = PixelSpace(PixelSpaceConfig(latent_channels=config.channels))
    else:
        space = load_autoencoder(Path(config.autoencoder))
    if config.text_encoder in ("labels", "none"):
        labels: tuple[str, ...] = ()
        if config.text_encoder == "labels":
            labels = tuple(sorted({caption for row in load_images(config.data).rows for caption in row["captions"]}))
        encoder: Any = LabelEncoder(LabelConfig(labels=labels, hidden_size=max(1, len(labels))))
        return Parts(None, space.requires_grad_(False), encoder.requires_grad_(False), None, schedule)
    text = embedded_model() if config.text_encoder == "embedded" else Path(config.text_encoder)
    encoder, tokenizer = load_text_encoder(text)
    return Parts(None, space.requires_grad_(False), encoder, tokenizer, schedule)


def _short(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.2f}" for value in values.tolist()) + "]"

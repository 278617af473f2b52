"""Train a KL autoencoder on a folder of pictures.

Try:
    latentdiff train configs/emoji-autoencoder.yaml
    tensorboard --logdir runs
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from latentdiff.errors import InputError
from latentdiff.images import to_tensor
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL, DiagonalGaussian
from training.augment import random_view, rgb
from training.checkpointing import gather, restore, save_checkpoint
from training.config import AutoencoderTraining
from training.dataset import CaptionedImages, batch_indices, composite, load_images
from training.ema import Ema
from training.losses import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    multiscale_gradient,
    psnr,
    ssim,
)
from training.run import (
    Log,
    StepGuard,
    adamw,
    compile_checked,
    learning_rate,
    mixed_precision,
    open_run,
    save_grid,
    seeded,
    set_learning_rate,
    stop_on_signal,
)


def train_autoencoder(config: AutoencoderTraining, resume: bool = False) -> Path:
    """Run the whole stage and return the folder of the trained autoencoder (diffusers layout).

    Raises:
        InputError: data or config cannot be used, or the loss is not finite 20 steps in a row.
        StorageError: a checkpoint cannot be written.
    """
    checkpoint = open_run(config, resume)
    run, folder = config.run, Path(config.run.out)
    data = load_images(config.data)
    held_out = _held_out(config, data)
    accelerator = Accelerator(mixed_precision=mixed_precision(run), cpu=not torch.cuda.is_available())
    torch.manual_seed(run.seed)
    model: Any = AutoencoderKL(AutoencoderConfig.from_dict(config.model))
    discriminator: Any = PatchDiscriminator()
    optimizer, critic = adamw(model, config.optimizer), adamw(discriminator, config.optimizer)
    plain: AutoencoderKL = model
    ema = Ema(model, run.ema_decay)
    modules, optimizers = {"model": model, "discriminator": discriminator}, {"optimizer": optimizer, "critic": critic}
    first = restore(checkpoint, modules, optimizers, ema)
    model, discriminator, optimizer, critic = accelerator.prepare(model, discriminator, optimizer, critic)
    ema.to(accelerator.device)
    if run.compile:
        images = _batch(data, config, first).to(accelerator.device)
        compile_checked(plain.encoder, images, autocast=accelerator.autocast())
        latents = plain.encode(images).mode().detach()
        compile_checked(plain.decoder, latents, autocast=accelerator.autocast())
    log, guard = Log(run, first, "autoencoder"), StepGuard()
    with stop_on_signal() as stopped:
        for step in range(first, run.steps):
            images = _batch(data, config, step).to(accelerator.device)
            with accelerator.autocast():
                reconstruction, posterior = model(images, noise_generator=seeded(run.seed, step, 1))
            terms = loss_terms(reconstruction.float(), images, posterior, config)
            loss = torch.stack(list(terms.values())).sum()
            if config.loss.adversarial and step >= config.loss.adversarial_start:
                adversarial = -discriminator(reconstruction.float()).mean()
                weight = config.loss.adversarial * adaptive_weight(loss, adversarial, plain.decoder.conv_out.weight)
                loss = loss + weight * adversarial
                terms["adversarial"] = adversarial
            set_learning_rate(optimizer, learning_rate(config.optimizer, step, run.steps))
            optimizer.zero_grad()
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(plain.parameters(), config.optimizer.max_grad_norm)
            if guard.allows(loss, norm, step):
                optimizer.step()
                ema.update(plain)
            if "adversarial" in terms:
                scores = discriminator(images), discriminator(reconstruction.detach().float())
                terms["discriminator"] = discriminator_loss(*scores)
                set_learning_rate(critic, learning_rate(config.optimizer, step, run.steps))
                critic.zero_grad()
                accelerator.backward(terms["discriminator"])
                critic.step()
            log.step(step, {"loss": loss, **terms, "grad_norm": norm, "skipped": guard.bad_steps > 0})
            done = step + 1
            if done % run.sample_every == 0 or done == run.steps:
                with ema.swapped_into(plain):
                    log.write(done, {"held_out_psnr": evaluate(plain, held_out, folder / f"samples/{done:08d}.png")})
            if done % run.save_every == 0 or done == run.steps or stopped:
                parts = gather(modules, optimizers, ema)
                save_checkpoint(folder, done, parts, {"ema_updates": ema.updates}, run.keep_checkpoints)
            if stopped:
                log.close()
                return folder
    log.close()
    with ema.swapped_into(plain):
        return export(plain, to_tensor(composite(data.images[:4096], rgb(config.data.background))), held_out, folder)


def loss_terms(
    reconstruction: Tensor, images: Tensor, posterior: DiagonalGaussian, config: AutoencoderTraining
) -> dict[str, Tensor]:
    """Return the weighted terms of the loss that are switched on, by name; their sum is what is minimised."""
    weights, terms = config.loss, {}
    if weights.l1:
        terms["l1"] = weights.l1 * F.l1_loss(reconstruction, images)
    if weights.l2:
        terms["l2"] = weights.l2 * F.mse_loss(reconstruction, images)
    if weights.gradient:
        terms["gradient"] = weights.gradient * multiscale_gradient(reconstruction, images)
    if weights.ssim:
        terms["ssim"] = weights.ssim * (1 - ssim(reconstruction, images))
    if weights.kl:
        terms["kl"] = weights.kl * posterior.kl().mean() / posterior.mean[0].numel()
    return terms


@torch.no_grad()
def evaluate(model: AutoencoderKL, images: Tensor, picture: Path | None = None) -> float:
    """Return the mean PSNR in dB of images (N, 3, H, W) decoded from the mode; draw the first 32 pairs to `picture`."""
    device = next(model.parameters()).device
    decoded = torch.cat([model.decode(model.encode(part.to(device)).mode()).cpu() for part in images.split(32)])
    if picture is not None:
        rows = [torch.cat([images[i : i + 8], decoded[i : i + 8]]) for i in range(0, min(32, len(images)), 8)]
        save_grid(torch.cat(rows), picture, columns=8)
    return psnr(decoded, images).mean().item()


@torch.no_grad()
def export(model: AutoencoderKL, images: Tensor, held_out: Tensor, folder: Path) -> Path:
    """Fold the measured latent statistics into the model, save it to folder/vae and return that path.

    The per-channel mean and standard deviation of the latents of `images` go into the two 1x1 convolutions around the
    latent space, so that latents have mean 0 and standard deviation 1 and `scaling_factor` is 1: an ordinary
    AutoencoderKL that no loader has to know more about.
    """
    from latentdiff.checkpoints import save_model

    device = next(model.parameters()).device
    latents = torch.cat([model.encode(part.to(device)).mode() for part in images.split(32)])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    fold_statistics(model, mean, std)
    model.config = replace(model.config, scaling_factor=1.0)
    vae = folder / "vae"
    save_model(model, vae)
    figures = {
        "held_out_psnr_db": evaluate(model, held_out),
        "held_out_images": len(held_out),
        "latent_mean_before": mean.tolist(),
        "latent_std_before": std.tolist(),
    }
    (folder / "autoencoder.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"held-out PSNR {figures['held_out_psnr_db']:.2f} dB; saved {vae}")
    return vae


@torch.no_grad()
def fold_statistics(model: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Rescale the latents to (latents - mean) / std per channel inside `quant_conv` and `post_quant_conv`."""
    before: Any = model.quant_conv
    after: Any = model.post_quant_conv
    if before is None or after is None:
        raise InputError("measured latent statistics need use_quant_conv and use_post_quant_conv: true in the model")
    channels = len(mean)
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[None, :, None, None]
    before.bias[:channels] -= mean
    before.weight[:channels] /= std[:, None, None, None]
    before.bias[:channels] /= std
    before.bias[channels:] -= 2 * std.log()


def _batch(data: CaptionedImages, config: AutoencoderTraining, step: int) -> Tensor:
    indices = batch_indices(len(data), config.run.batch_size, step, config.run.seed)
    views = [random_view(data.images[i], np.random.default_rng([config.run.seed, step, int(i)])) for i in indices]
    return to_tensor(np.stack(views))


def _held_out(config: AutoencoderTraining, data: CaptionedImages) -> Tensor:
    """Return the pictures of the validation and test splits, or the last 16 training ones where there are none."""
    ground = rgb(config.data.background)
    try:
        splits = [load_images(config.data, split).images for split in ("validation", "test")]
    except InputError:
        splits = [data.images[-16:]]
    return to_tensor(composite(np.concatenate(splits), ground))

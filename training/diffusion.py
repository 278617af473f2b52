"""Train a latent text-to-image U-Net from scratch on captioned pictures.

Try:
    latentdiff train configs/emoji-diffusion.yaml
    latentdiff generate "a red fox" --model runs/emoji-diffusion/model
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentdiff.checkpoints import (
    Parts,
    embedded_model,
    load_autoencoder,
    load_pipeline,
    load_text_encoder,
    save_pipeline,
)
from latentdiff.checkpoints.lora import save_lora
from latentdiff.checkpoints.textual_inversion import save_embedding
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import InputError
from latentdiff.models.clip import CLIPTextModel
from latentdiff.models.lora import LoRA
from latentdiff.models.pixels import LabelConfig, LabelEncoder, PixelSpace, PixelSpaceConfig
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from latentdiff.pipeline import Pipeline
from latentdiff.settings import Settings
from training.adapters import Adapted
from training.batches import Batch, draw_batch, latent_batches, sample_weights
from training.config import DiffusionTraining
from training.dataset import CaptionedImages, open_images, read_captions
from training.distributed import any_process, gathered, micro_batches, own_shares, sample_noise, start_accelerator
from training.ema import Ema
from training.encoders import JointNetwork, add_words, new_words, train_encoder
from training.instruments import LatentStatistics, gradient_norms, measure_speed
from training.latents import LatentSet, cached_latents
from training.objective import loss_terms, model_inputs, require_trainable, told
from training.optimizers import make_optimizer
from training.posthoc_ema import power_emas, save_snapshot
from training.prior import draw_prior
from training.process import show_process
from training.resources import require_room
from training.run import (
    Log,
    checkpoint_gradients,
    compile_checked,
    fast_attention,
    open_run,
    save_grid,
    save_run,
    seeded,
    start_step,
    stop_on_signal,
)
from training.sharding import averaged_network, blank_unet, prepared, require_shardable, shard, shards_weights, whole
from training.state import RunState
from training.timesteps import ImportanceSampler, logit_normal_timesteps, stratified_timesteps
from training.validation import ema_distance, held_out_scalars, load_held_out

LORA_FILE = "lora.safetensors"
EMBEDDING_FILE = "embedding.safetensors"

# Latents whose mean and standard deviation are looked at before training, at most about so many.
MEASURED = 4096


def train_diffusion(config: DiffusionTraining, resume: bool = False) -> Path:
    """Run the whole stage and return the folder of the trained model (diffusers layout, EMA weights).

    Raises:
        InputError: data or config cannot be used, or the loss is not finite 20 steps in a row.
        StorageError: a checkpoint cannot be written, or there is no room for it.
    """
    accelerator, folder = start_accelerator(config.run), Path(config.run.out)
    require_shardable(config, accelerator)
    checkpoint = open_run(config, resume, accelerator)
    parts = load_parts(config)
    require_trainable(config, parts)
    with accelerator.main_process_first():  # which writes the cache
        data, held_out = prepare_data(config, parts, folder), load_held_out(config, parts)
    network, parts, state = assemble(config, data, parts, accelerator)
    require_room(config.run, state, (network, parts.autoencoder, parts.text_encoder), accelerator.device)
    state.scaler = accelerator.scaler
    first = state.restore(checkpoint)
    if config.run.compile:
        compile_unet(network.to(accelerator.device), config, data, accelerator)
    reached = run_steps(network, config, parts, data, state, first, accelerator, held_out)
    if reached:
        with averaged_network(network, parts, state.modules["model"], state.ema, accelerator) as looked_at:
            if looked_at is not None:
                export(*looked_at, config, folder)
    return folder / (LORA_FILE if config.lora else EMBEDDING_FILE if config.textual_inversion else "model")


def assemble(
    config: DiffusionTraining, data: LatentSet, parts: Parts, accelerator: Accelerator
) -> tuple[nn.Module, Parts, RunState]:
    """Return the network that is called while training, the parts with its U-Net, and what of it all is trained."""
    torch.manual_seed(config.run.seed)
    unet = network_to_train(config, data, parts)
    network, trained = adapt(unet, config, parts)
    modules: dict[str, nn.Module] = {"model": trained}
    if config.timesteps == "importance":
        modules["importance"] = ImportanceSampler(parts.schedule.num_train_timesteps)
    if config.run.gradient_checkpointing:
        checkpoint_gradients(unet)
    if shards_weights(accelerator):
        shard(unet, accelerator)
    ema, profiles = Ema(trained, config.run.ema_decay), power_emas(trained, config.run)
    state = RunState(modules, {"optimizer": make_optimizer(trained, config.optimizer)}, ema, profiles)
    return network, replace(parts, unet=unet), state


def adapt(unet: UNet2DConditionModel, config: DiffusionTraining, parts: Parts) -> tuple[nn.Module, nn.Module]:
    """Return what is called in place of a U-Net while training, and the part of it, or all, that is trained."""
    if config.lora is not None:
        adapted = Adapted(unet, config.lora)
        return adapted, adapted.adapters
    if config.textual_inversion is not None:
        words = new_words(parts, config.textual_inversion)
        return JointNetwork(unet.requires_grad_(False), parts.text_encoder.requires_grad_(False), words), words
    if config.train_text_encoder:
        joint = JointNetwork(unet, train_encoder(parts))
        return joint, joint
    return unet, unet


def run_steps(
    network: nn.Module,
    config: DiffusionTraining,
    parts: Parts,
    data: LatentSet,
    state: RunState,
    first: int,
    accelerator: Accelerator,
    held_out: Batch | None,
) -> bool:
    """Train from step `first` to the last; say whether it was reached, not stopped by a signal.

    `network` is what is called, and `state.modules["model"]` the part of it, or all, that is trained.
    """
    run, trained, importance = config.run, state.modules["model"], state.modules.get("importance")
    example, twice = draw_batch(data, config, 0, slice(1)), 0.5 * config.self_conditioning
    plain = blank_unet(parts) if shards_weights(accelerator) else network
    speed = measure_speed(plain, *called_with(example, config), accelerator=accelerator, more=twice, **told(example))
    unet, optimizer = prepared(accelerator, network, state.optimizers["optimizer"])
    state.to(accelerator.device)
    log, statistics, stopping = Log(run, first, "diffusion", accelerator, speed), LatentStatistics(), False
    batches = statistics.watching(latent_batches(data, config, first, own_shares(accelerator, run)))
    with stop_on_signal() as stopped, fast_attention():
        for step in range(first, run.steps):
            start_step(config, step, optimizer)
            losses, weights, timesteps, nulls, norms = accumulate_gradients(
                unet, config, parts, batches, importance, step, accelerator
            )
            loss = (losses * weights).mean()
            norm = whole(accelerator.clip_grad_norm_(trained.parameters(), config.optimizer.max_grad_norm))
            finite = state.guard.allows(loss, norm, step)
            if finite or state.scaler is not None:  # which leaves out the step itself, and scales by less from then on
                optimizer.step()
            if finite:
                state.average(trained)
            if isinstance(importance, ImportanceSampler):
                importance.update(timesteps, losses)
            values = {"loss": loss, "grad_norm": norm, "null": nulls.mean(), "skipped": not finite}
            log.step(step, {**values, "learning_rate": optimizer.param_groups[0]["lr"]})
            done, stopping = step + 1, any_process(accelerator, bool(stopped))
            if done % run.log_every == 0:
                counted = {"ema_distance": ema_distance(state.ema, trained), "skipped_steps": state.guard.skipped}
                log.write(done, {**counted, **statistics.scalars(accelerator), **norms})
            if done % run.sample_every == 0 or done == run.steps:
                picture = Path(run.out) / f"samples/{done:08d}.png"
                with averaged_network(network, parts, trained, state.ema, accelerator) as looked_at:
                    if looked_at is not None:
                        draw_samples(looked_at[1], config, picture)
                        log.write(done, held_out_scalars(*looked_at, config, held_out, accelerator))
                log.image(done, picture)
            save_snapshot(run, done, state.profiles, accelerator)
            if done % run.save_every == 0 or done == run.steps or stopping:
                save_run(config, done, state, accelerator)
            if stopping:
                break
    log.close()
    return not stopping


def accumulate_gradients(
    unet: nn.Module,
    config: DiffusionTraining,
    parts: Parts,
    batches: Iterator[Batch],
    importance: nn.Module | None,
    step: int,
    accelerator: Accelerator,
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, float]]:
    """Add the gradients of a step's loss to those of the network, micro-step by micro-step.

    Args:
        batches: gives that of each micro-step.

    Returns:
        Of the whole batch, each (B,) on the CPU: losses, their weights, timesteps, and 1 where the caption was dropped.
        Of this process's first micro-step, where the log has a line and the loss several terms: their gradient norms.
    """
    run, total, generator = config.run, parts.schedule.num_train_timesteps, seeded(config.run.seed, step, 0)
    # A compiled backward pass can be gone through but once, and sharded gradients are not looked at one by one.
    logged = (step + 1) % run.log_every == 0 and not run.compile and not shards_weights(accelerator)
    seen, norms, to_device = list[Tensor](), dict[str, float](), partial(Tensor.to, device=accelerator.device)
    timesteps, weights = draw_timesteps(config.timesteps, importance, total, run.batch_size, generator)
    weights = weights * sample_weights(config)
    estimated = bool(torch.rand((), generator=generator) < 0.5)
    for share in micro_batches(accelerator, run, step, unet):
        batch = next(batches).map(to_device)
        noise, shown = map(to_device, draw_noises(config, step, share, batch.latents.shape[1:]))
        times = timesteps[share].to(accelerator.device)
        with accelerator.autocast():
            terms = loss_terms(unet, parts, config, batch, times, noise, estimated, shown)  # (b,) each
        losses = torch.stack([*terms.values()]).sum(dim=0)  # (b,)
        if config.prior is not None:
            of_prior = torch.arange(run.batch_size)[share].to(accelerator.device) % 2
            terms = {"instance": losses * (1 - of_prior), "prior": losses * of_prior}
        if logged and not seen and len(terms) > 1:
            means = {name: (term * weights[share].to(term)).mean() for name, term in terms.items()}
            norms = gradient_norms(means, unet, accelerator)
        accelerator.backward((losses * weights[share].to(losses)).mean() / run.accumulation)
        seen.append(torch.stack([losses, batch.nulls.to(losses)], dim=1))
    losses, nulls = gathered(accelerator, seen).cpu().unbind(dim=1)
    return losses, weights, timesteps, nulls, norms


def compile_unet(unet: nn.Module, config: DiffusionTraining, data: LatentSet, accelerator: Accelerator) -> None:
    """Compile the network in place on one micro-batch; see `compile_checked`."""
    batch = draw_batch(data, config, 0, own_shares(accelerator, config.run)[0])
    batch = batch.map(partial(Tensor.to, device=accelerator.device))
    compile_checked(unet, *called_with(batch, config), autocast=accelerator.autocast(), **told(batch))


def called_with(batch: Batch, config: DiffusionTraining) -> tuple[Tensor, Tensor, Tensor]:
    """Return an example of what the network is called with."""
    timesteps = torch.zeros(len(batch), dtype=torch.int64, device=batch.latents.device)
    return model_inputs(batch.latents, config), timesteps, batch.context


def export(network: nn.Module, parts: Parts, config: DiffusionTraining, folder: Path) -> None:
    """Save the model or the LoRA, say how to use it, and show what it learnt where it was trained on pixels."""
    prompt = shlex.quote(config.prompts[0])
    if isinstance(network, Adapted):
        file = folder / LORA_FILE
        save_lora(LoRA({"unet": network.factors(torch.float16)}), file, parts)
        print(f"saved {file}; try: latentdiff generate {prompt} --model {config.start_from} --lora {file}")
        return
    if isinstance(network, JointNetwork) and network.words is not None and config.textual_inversion is not None:
        file = folder / EMBEDDING_FILE
        save_embedding(config.textual_inversion.word, network.words.vectors.detach().cpu(), file)
        print(f"saved {file}; try: latentdiff generate {prompt} --model {config.start_from} --embedding {file}")
        return
    model = folder / "model"
    save_pipeline(parts, model, torch.float16)
    if isinstance(parts.autoencoder, PixelSpace):
        show_process(parts, config, folder)
    print(f"saved {model}; try: latentdiff generate {prompt} --model {model}")


def draw_timesteps(
    kind: str, importance: nn.Module | None, total: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return timesteps (count,) int64, below `total`, of a batch and the weights (count,) of their losses."""
    if isinstance(importance, ImportanceSampler):
        return importance.draw(count, generator)
    draw = logit_normal_timesteps if kind == "logit_normal" else stratified_timesteps
    return draw(count, total, generator), torch.ones(count)


def draw_noises(config: DiffusionTraining, step: int, share: slice, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the noise that the network is asked for and the one it sees, each (b, C, h, w), of samples of a shape.

    Source: offset noise: Guttenberg 2023, "Diffusion with Offset Noise"; input perturbation: Ning et al. 2023,
    arXiv 2301.11706, algorithm 1.
    """
    run = config.run
    noise = sample_noise(run.seed, step, share, run.batch_size, shape)
    if config.offset_noise:
        offsets = sample_noise(run.seed, step, share, run.batch_size, (shape[0], 1, 1), purpose=3)
        noise = noise + config.offset_noise * offsets
    if not config.input_perturbation:
        return noise, noise
    more = sample_noise(run.seed, step, share, run.batch_size, shape, purpose=4)
    return noise, noise + config.input_perturbation * more


def prepare_data(config: DiffusionTraining, parts: Parts, folder: Path) -> LatentSet:
    """Open the pictures, encode them and their captions (from the cache where it has them), and check latents.

    Raises:
        InputError: the pictures cannot be used, or the latents' mean or standard deviation is far from 0 and 1.
        StorageError: the cache cannot be written.
    """
    data = encode_data(config, parts, folder, open_data(config, parts, folder))
    if config.prior is None:
        return data
    drawn = config.model_copy(update={"data": draw_prior(config, parts, folder)})
    return replace(data, prior=encode_data(drawn, parts, folder, open_data(drawn, parts, folder)))


def open_data(config: DiffusionTraining, parts: Parts, folder: Path) -> CaptionedImages:
    """Open the pictures to train on; see `training.dataset.open_images`."""
    multiple = 8 * parts.autoencoder.config.downsample_factor
    return open_images(config.data, config.run.batch_size, folder, _cache(config, folder), multiple)


def encode_data(config: DiffusionTraining, parts: Parts, folder: Path, images: CaptionedImages) -> LatentSet:
    """Encode pictures and their captions, and check the latents; see `prepare_data`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for network in (parts.autoencoder, parts.text_encoder, parts.text_encoder_2):
        if network is not None:
            network.to(device)
    cache = _cache(config, folder)
    data = cached_latents(images, config.data, config.run.seed, parts, cache, config.encodes_each_step)
    if isinstance(parts.autoencoder, PixelSpace):
        return data
    kinds = len(data.choices[0])
    measured = range(0, len(data.latents), kinds * (1 + (len(images) - 1) // MEASURED))
    plain = torch.cat([data.latents[index].float().flatten(1) for index in measured], dim=1)  # (C, N*h*w)
    mean, std = plain.mean(dim=1), plain.std(dim=1)
    if mean.abs().max() > 0.3 or std.max() > 1.5 or std.min() < 0.6:
        problem = f"mean about 0 and standard deviation about 1, got {_short(mean)} and {_short(std)}"
        if config.start_from is None:
            raise InputError(
                f"latents must have {problem}; the autoencoder was measured on other pictures: train it on these, or "
                "run its export again"
            )
        print(f"latents of these pictures do not have {problem}: the model knows other ones", file=sys.stderr)
    return data


def network_to_train(config: DiffusionTraining, data: LatentSet, parts: Parts) -> UNet2DConditionModel:
    """Return a new U-Net that fits the latents and contexts, or that of the model to start from."""
    if parts.unet is not None:
        return parts.unet.requires_grad_(True).train()
    channels, side = data.latents[0].shape[0], round(data.latents[0][0].numel() ** 0.5)
    follows = {
        "in_channels": channels * (1 + config.self_conditioning),
        "out_channels": channels * (1 + (parts.schedule.variance_type == "learned_range")),
        "sample_size": side,
        "self_conditioning": config.self_conditioning,
    }
    shape = {"cross_attention_dim": parts.text_encoder.config.hidden_size, **config.model, **follows}
    return UNet2DConditionModel(UNetConfig.from_dict(shape))


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
        parts = load_pipeline(config.start_from)
        return parts if config.textual_inversion is None else add_words(parts, config.textual_inversion)
    schedule = NoiseSchedule.from_dict(config.schedule)
    if config.autoencoder is None:
        space: Any = PixelSpace(PixelSpaceConfig(latent_channels=config.channels))
    else:
        space = load_autoencoder(Path(config.autoencoder))
    if config.text_encoder in ("labels", "none"):
        labels: tuple[str, ...] = ()
        if config.text_encoder == "labels":
            found = read_captions(config.data, _cache(config, Path(config.run.out)))
            labels = tuple(sorted({caption for captions in found for caption in captions}))
        encoder: Any = LabelEncoder(LabelConfig(labels=labels, hidden_size=max(1, len(labels))))
        return Parts(None, space.requires_grad_(False), encoder.requires_grad_(False), None, schedule)
    text = embedded_model() if config.text_encoder == "embedded" else Path(config.text_encoder)
    encoder, tokenizer = load_text_encoder(text)
    if isinstance(encoder, CLIPTextModel) and encoder.config.with_projection:  # of OpenCLIP's files, and of no use here
        del encoder.text_projection
        encoder.config = replace(encoder.config, with_projection=False)
    return Parts(None, space.requires_grad_(False), encoder, tokenizer, schedule)


def _cache(config: DiffusionTraining, folder: Path) -> Path:
    return Path(config.cache) if config.cache else folder / "cache"


def _short(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.2f}" for value in values.tolist()) + "]"

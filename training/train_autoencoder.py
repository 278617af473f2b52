"""Train a KL autoencoder on a folder of pictures.

Try:
    latentdiff train configs/emoji-autoencoder.yaml
    tensorboard --logdir runs
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._functorch import config as functorch

from latentdiff.checkpoints import load_autoencoder
from latentdiff.checkpoints.lpips import load_lpips
from latentdiff.devices import restored_random_state
from latentdiff.errors import InputError
from latentdiff.images import to_tensor
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL

from .config import AutoencoderTraining
from .data.dataset import CaptionedImages, open_images
from .data.pictures import draw_views, image_batches, load_held_out, load_measured
from .loop.activations import kept_by_step
from .loop.checkpointing import Checkpoint
from .loop.cpu import tuned_for_cpu
from .loop.distributed import (
    any_process,
    averaged,
    gathered,
    micro_batches,
    own_shares,
    sample_noise,
    start_accelerator,
)
from .loop.ema import Ema
from .loop.optimizers import make_optimizer
from .loop.resources import require_room, require_small_enough
from .loop.run import (
    Stop,
    checkpoint_gradients,
    compile_checked,
    go_on,
    open_run,
    save_run,
    seeded,
    start_step,
    stop_on_signal,
)
from .loop.sharding import require_shardable
from .loop.state import RunState
from .losses.autoencoder import References, adversarial_term, discriminator_terms, loss_terms
from .losses.equivariance import equivariance
from .losses.image import PatchDiscriminator
from .monitor.evaluation import Evaluations, Tools, load_tools, open_reference
from .monitor.instruments import gradient_norms, latent_scalars
from .monitor.log import Log
from .monitor.reconstructions import export, mean_psnr, reconstructed, save_normalised, save_pairs
from .monitor.samples import SampleGrids
from .monitor.trackers import require_trackers
from .monitor.validation import ema_distance
from .networks.takeover import freeze_encoder, load_started, take_over


def train_autoencoder(config: AutoencoderTraining, resume: bool = False, stop: Stop = go_on) -> Path:
    """Run the whole stage and return the folder of the trained autoencoder (diffusers layout).

    Args:
        config: of the stage.
        resume: go on from the newest checkpoint that verifies.
        stop: see `Stop`; there is no autoencoder then.

    Raises:
        InputError: data or config cannot be used, or the loss is not finite 20 steps in a row.
        ModelLoadError: the weights of LPIPS cannot be used.
        StorageError: a checkpoint cannot be written, or there is no room for it.
    """
    require_trainable(config)
    accelerator = start_accelerator(config.run)
    require_shardable(config, accelerator)
    references = load_references(config, accelerator.device)
    require_trackers(config.run.trackers)
    tools = load_tools(config, accelerator.device)
    with restored_random_state(), kept_graphs(), open_run(config, resume, accelerator, "vae") as checkpoint:
        return _train(config, checkpoint, references, tools, accelerator, stop)


def _train(
    config: AutoencoderTraining,
    checkpoint: Checkpoint | None,
    references: References,
    tools: Tools,
    accelerator: Accelerator,
    stop: Stop,
) -> Path:
    """Run the stage in a run folder that is open, from a checkpoint on; see `train_autoencoder`."""
    folder = Path(config.run.out)
    shape = AutoencoderConfig.from_dict(config.model)
    require_small_enough(lambda: AutoencoderKL(shape), accelerator.device)
    reference = open_reference(config, folder / "cache")
    data = open_images(config.data, config.run.batch_size, folder)
    held_out = load_held_out(config, data)
    model, state = assemble(config, references.started)
    networks = [*state.modules.values(), *references.networks]
    require_room(config.run, state, networks, accelerator.device, activations(model, config, accelerator))
    first = state.restore(checkpoint)
    if config.run.compile:
        compile_autoencoder(model.to(accelerator.device), config, data, accelerator)
    evaluations, vae = Evaluations(config, tools, reference, state), folder / "vae"
    reached = run_steps(config, data, held_out, references, state, first, accelerator, evaluations, stop)
    if reached and accelerator.is_main_process:
        with state.ema.swapped_into(model):
            export(model, load_measured(config, data), held_out, folder)
        device = accelerator.device
        evaluations.conclude(
            vae, lambda request, place: evaluations.of_autoencoder(load_autoencoder(place).to(device), request)
        )
    return vae


def activations(model: AutoencoderKL, config: AutoencoderTraining, accelerator: Accelerator) -> int:
    """Return about how many bytes a micro-step keeps of the autoencoder's alone; see `kept_by_step`."""
    return kept_by_step(accelerator, config.run, model, torch.empty(1, 3, config.data.size, config.data.size))


def assemble(config: AutoencoderTraining, started: AutoencoderKL | None = None) -> tuple[AutoencoderKL, RunState]:
    """Return a new autoencoder, and what of a run is trained: it and its discriminator.

    Args:
        started: the autoencoder that training starts from, where it is loaded already.
    """
    torch.manual_seed(config.run.seed)
    model, discriminator = AutoencoderKL(AutoencoderConfig.from_dict(config.model)), PatchDiscriminator()
    if config.start_from is not None:
        started = load_started(config) if started is None else started
        take_over(model, started)
        if config.decoder_only:
            freeze_encoder(model, started)
    if config.run.gradient_checkpointing:
        checkpoint_gradients(model)
    optimizers = {
        "optimizer": make_optimizer(model, config.optimizer),
        "critic": make_optimizer(discriminator, config.optimizer),  # as its file has always been called
    }
    state = RunState({"model": model, "discriminator": discriminator}, optimizers, Ema(model, config.run.ema_decay))
    return model, state


def run_steps(
    config: AutoencoderTraining,
    data: CaptionedImages,
    held_out: Tensor,
    references: References,
    state: RunState,
    first: int,
    accelerator: Accelerator,
    evaluations: Evaluations,
    stop: Stop,
) -> bool:
    """Train from step `first` to the last; say whether it was reached, or patience ended, not stopped before."""
    run, plain, discriminator = config.run, state.modules["model"], state.modules["discriminator"]
    assert isinstance(plain, AutoencoderKL) and isinstance(discriminator, PatchDiscriminator)
    model, adversary, optimizer, discriminator_optimizer = accelerator.prepare(
        plain, discriminator, *state.optimizers.values()
    )
    state.ema.to(accelerator.device)
    log, stopping, grids = Log(run, first, "autoencoder", accelerator), False, SampleGrids()
    batches = image_batches(data, config, first, own_shares(accelerator, run))
    with stop_on_signal() as stopped, tuned_for_cpu(plain):
        for step in range(first, run.steps if not evaluations.over else first):
            start_step(config, step, optimizer, discriminator_optimizer)
            logged = (step + 1) % run.log_every == 0
            values, scalars = accumulate_gradients(
                model, adversary, references, config, batches, step, accelerator, logged
            )
            adversarial = "discriminator" in values
            norm = accelerator.clip_grad_norm_(plain.parameters(), config.optimizer.max_grad_norm)
            if adversarial:
                values["discriminator_grad_norm"] = accelerator.clip_grad_norm_(
                    discriminator.parameters(), config.optimizer.max_grad_norm
                )
            values["grad_norm"] = norm
            values = dict(zip(values, torch.stack([*values.values()]).cpu()))  # the only time it waits for the device
            finite = state.guard.allows(values["loss"], torch.stack([*values.values()]).sum(), step)
            if finite:
                optimizer.step()
                state.ema.update(plain)
                if adversarial:
                    discriminator_optimizer.step()
            log.step(step, {**values, "skipped": not finite, "learning_rate": optimizer.param_groups[0]["lr"]})
            done = step + 1
            stopping = any_process(accelerator, bool(stopped) or (done < run.steps and stop(done)))
            if logged:
                skipped = state.guard.skipped
                log.write(done, {**scalars, "ema_distance": ema_distance(state.ema, plain), "skipped_steps": skipped})
            over = evaluations.due(done) and evaluate(
                evaluations, done, state, config, data, held_out, log, accelerator
            )
            if done % run.save_every == 0 or done == run.steps or stopping or over:
                save_run(config, done, state, accelerator)
            if accelerator.is_main_process and (done % run.sample_every == 0 or done == run.steps or over):
                write_samples(grids, log, done, state, held_out, Path(run.out))
            if stopping or over:
                break
    log.close()
    return not stopping


def evaluate(
    evaluations: Evaluations,
    done: int,
    state: RunState,
    config: AutoencoderTraining,
    data: CaptionedImages,
    held_out: Tensor,
    log: Log,
    accelerator: Accelerator,
) -> bool:
    """Evaluate the averaged network after so many steps, keep it where it is the best; say whether patience ended."""
    model = state.modules["model"]
    assert isinstance(model, AutoencoderKL)
    if accelerator.is_main_process:
        with state.ema.swapped_into(model):
            scalars = evaluations.take(
                done,
                lambda: {"held_out_psnr": mean_psnr(reconstructed(model, held_out), held_out)},
                partial(evaluations.of_autoencoder, model),
                lambda place: save_normalised(model, load_measured(config, data), place),
            )
        log.write(done, scalars)
    return any_process(accelerator, evaluations.over)


def write_samples(grids: SampleGrids, log: Log, done: int, state: RunState, held_out: Tensor, folder: Path) -> None:
    """Save a grid of what the averaged network makes of held-out pictures, and log their error."""
    model, picture = state.modules["model"], folder / f"samples/{done:08d}.png"
    assert isinstance(model, AutoencoderKL)
    with state.ema.swapped_into(model):
        decoded = reconstructed(model, held_out)
    if grids.made(partial(save_pairs, held_out, decoded, picture)):
        log.image(done, picture)
    log.write(done, {"held_out_psnr": mean_psnr(decoded, held_out), "failed_samples": grids.failed})


def accumulate_gradients(
    model: nn.Module,
    adversary: nn.Module,
    references: References,
    config: AutoencoderTraining,
    batches: Iterator[Tensor],
    step: int,
    accelerator: Accelerator,
    measured: bool,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Add the gradients of a step's losses to those of both networks, micro-step by micro-step.

    Args:
        model, adversary: autoencoder and discriminator, as the accelerator prepared them.
        batches: gives the images of each micro-step.
        measured: whether to look at each term's own gradient, of the first micro-step, and at the latents.

    Returns:
        Of the whole batch the loss and its terms; and what was measured, by its name in the log.
    """
    run, plain, discriminator = config.run, accelerator.unwrap_model(model), accelerator.unwrap_model(adversary)
    adversarial = config.loss.adversarial > 0 and step >= config.loss.adversarial_start
    seen: list[dict[str, Tensor]] = []
    latents: list[Tensor] = []
    scalars: dict[str, float] = {}
    for share in micro_batches(accelerator, run, step, model):
        images = next(batches).to(accelerator.device)
        noise = sample_noise(run.seed, step, share, run.batch_size, _latent_shape(plain, images))
        with accelerator.autocast():
            reconstruction, posterior = model(images, noise)
        reconstruction = reconstruction.float()
        terms = loss_terms(reconstruction, images, posterior, config, references)
        if config.loss.equivariance:
            with accelerator.autocast():
                error = equivariance(plain, posterior.sample(noise), images, seeded(run.seed, step, 6))
            terms["equivariance"] = config.loss.equivariance * error
        loss = torch.stack(list(terms.values())).sum()
        weighted, against = dict(terms), {}
        if adversarial:
            terms["adversarial"], weight = adversarial_term(loss, reconstruction, plain, discriminator, accelerator)
            weighted["adversarial"] = config.loss.adversarial * weight * terms["adversarial"]
            loss = loss + weighted["adversarial"]
            against = discriminator_terms(adversary, discriminator, images, reconstruction.detach(), config)
        if measured and not seen:
            scalars = gradient_norms(weighted, plain, accelerator) | gradient_norms(against, discriminator, accelerator)
        if against:
            accelerator.backward(torch.stack(list(against.values())).sum())
        accelerator.backward(loss / run.accumulation)
        seen.append({"loss": loss, **terms, **against})
        if measured:
            latents.append(posterior.mode())
    if measured:
        scalars |= latent_scalars(gathered(accelerator, latents))
    return averaged(accelerator, seen), scalars


def load_references(config: AutoencoderTraining, device: torch.device) -> References:
    """Return the networks that terms of the loss ask.

    Raises:
        InputError: start_from has other latents.
        ModelLoadError: one is refused.
    """
    loss = config.loss
    perceptual = load_lpips(Path(loss.lpips_weights), device) if loss.lpips and loss.lpips_weights else None
    return References(perceptual, load_started(config, device) if loss.latents else None)


def require_trainable(config: AutoencoderTraining) -> None:
    """Raise InputError where settings of a config do not fit together."""
    if config.loss.adversarial and config.run.accumulation > 1:  # parts of a batch have other norms than the whole
        raise InputError(
            "loss.adversarial is weighed by the gradients of a whole batch and needs run.accumulation 1, got "
            f"{config.run.accumulation}; use more processes, or loss.adversarial 0"
        )
    if config.run.precision == "fp16":
        raise InputError("run.precision fp16 is for the diffusion stage, pictures overflow in it; choose bf16 or no")


def compile_autoencoder(
    model: AutoencoderKL, config: AutoencoderTraining, data: CaptionedImages, accelerator: Accelerator
) -> None:
    """Compile both halves in place on one micro-batch; see `compile_checked`."""
    share = own_shares(accelerator, config.run)[0]
    images = to_tensor(draw_views(data, config, (share,), 0)).to(accelerator.device)
    compile_checked(model.encoder, images, autocast=accelerator.autocast())
    latents = model.encode(images).mode().detach()
    compile_checked(model.decoder, latents, autocast=accelerator.autocast())


def kept_graphs() -> AbstractContextManager[Any]:
    """Return a context in which the graph of a compiled network can be gone back through more than once."""
    if hasattr(functorch, "donated_buffer"):  # of newer releases
        return functorch.patch(donated_buffer=False)
    return nullcontext()


def _latent_shape(model: AutoencoderKL, images: Tensor) -> tuple[int, int, int]:
    factor = model.config.downsample_factor
    return model.config.latent_channels, images.shape[-2] // factor, images.shape[-1] // factor

"""Train a latent text-to-image U-Net from scratch on captioned pictures.

Try:
    latentdiff train configs/emoji-diffusion.yaml
    latentdiff generate "a red fox" --model runs/emoji-diffusion/model
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentdiff.checkpoints import Components
from latentdiff.devices import restored_random_state

from .config import DiffusionTraining, ObjectiveConfig, RunConfig
from .data.batches import Batch, draw_batch, latent_batches, sample_weights
from .data.conditions import extra_channels
from .data.latents import LatentSet, warn_of_cut
from .data.timesteps import ImportanceSampler, logit_normal_timesteps, stratified_timesteps
from .loop.activations import kept_by_step
from .loop.checkpointing import Checkpoint
from .loop.cpu import tuned_for_cpu
from .loop.distributed import any_process, gathered, micro_batches, own_shares, sample_noise, start_accelerator
from .loop.posthoc_ema import save_snapshot
from .loop.resources import require_room
from .loop.run import (
    Stop,
    compile_checked,
    go_on,
    open_run,
    save_run,
    seeded,
    start_step,
    stop_on_signal,
)
from .loop.sharding import averaged_network, blank_unet, prepared, require_shardable, shards_weights, whole
from .loop.state import RunState
from .losses.consistency import Teacher, consistency_terms, make_teacher, weights_besides
from .losses.diffusion import conditioning, loss_terms, model_inputs, require_trainable
from .monitor.evaluation import Evaluations, Tools, load_tools, open_reference
from .monitor.export import export, export_name, load_trained, model_place, save_trained
from .monitor.instruments import LatentStatistics, Speed, gradient_norms, measure_speed
from .monitor.log import Log
from .monitor.samples import SampleGrids, draw_samples, try_prompts
from .monitor.trackers import require_trackers
from .monitor.validation import ema_distance, held_out_scalars, load_held_out
from .setup import assemble, load_components, move_networks, prepare_data, require_buildable


def train_diffusion(config: DiffusionTraining, resume: bool = False, stop: Stop = go_on) -> Path:
    """Run the whole stage and return the folder of the trained model (diffusers layout, EMA weights).

    Args:
        config: of the stage.
        resume: go on from the newest checkpoint that verifies.
        stop: see `Stop`; there is no model then.

    Raises:
        InputError: data or config cannot be used, or the loss is not finite 20 steps in a row.
        StorageError: a checkpoint cannot be written, or there is no room for it.
    """
    accelerator = start_accelerator(config.run)
    require_shardable(config, accelerator)
    require_trackers(config.run.trackers)
    tools = load_tools(config, accelerator.device)
    with restored_random_state(), open_run(config, resume, accelerator, export_name(config)) as checkpoint:
        return _train(config, checkpoint, tools, accelerator, stop)


def _train(
    config: DiffusionTraining, checkpoint: Checkpoint | None, tools: Tools, accelerator: Accelerator, stop: Stop
) -> Path:
    """Run the stage in a run folder that is open, from a checkpoint on; see `train_diffusion`."""
    folder = Path(config.run.out)
    components = load_components(config)
    require_trainable(config, components)
    require_buildable(config, components, accelerator)
    try_prompts(config, components)
    move_networks(components, accelerator.device)
    with accelerator.main_process_first():
        reference = open_reference(config, Path(config.cache or folder / "cache"))
    data = prepare_data(config, components, folder, accelerator.main_process_first())
    held_out = load_held_out(config, components)
    if accelerator.is_main_process:
        warn_of_cut(data.captions, components)
    teacher = make_teacher(config, components, data)
    network, components, state = assemble(config, data, components, accelerator)
    networks = (network, components.autoencoder, components.text_encoder, *weights_besides(teacher, config))
    require_room(config.run, state, networks, accelerator.device, activations(network, config, data, accelerator))
    state.scaler = accelerator.scaler
    first = state.restore(checkpoint)
    if config.run.compile:
        compile_unet(network.to(accelerator.device), config, data, accelerator)
    evaluations = Evaluations(config, tools, reference, state)
    reached = run_steps(
        network, teacher, config, components, data, state, first, accelerator, held_out, evaluations, stop
    )
    if reached:
        with averaged_network(network, components, state.modules["model"], state.ema, accelerator) as averaged:
            if averaged is not None:
                export(*averaged, config, folder, trained=first < config.run.steps)
        if accelerator.is_main_process:
            load = partial(load_trained, config, device=accelerator.device)
            evaluations.conclude(
                model_place(config, folder),
                lambda request, place: evaluations.of_model(load(place), request),
            )
    return folder / export_name(config)


def encode(config: DiffusionTraining) -> None:
    """Fill the cache of a run that is to come: latents and text states. Any number of processes share it out.

    Raises:
        InputError: data or config cannot be used.
        StorageError: the cache cannot be written.
    """
    accelerator = start_accelerator(config.run)
    components = load_components(config)
    move_networks(components, accelerator.device)
    data = prepare_data(config, components, Path(config.run.out), accelerator.main_process_first())
    if accelerator.is_main_process:
        warn_of_cut(data.captions, components)
        print(f"encoded: {len(data.latents):,} latents, {len(data.captions):,} captions")


def run_steps(
    network: nn.Module,
    teacher: Teacher | None,
    config: DiffusionTraining,
    components: Components,
    data: LatentSet,
    state: RunState,
    first: int,
    accelerator: Accelerator,
    held_out: Batch | None,
    evaluations: Evaluations,
    stop: Stop,
) -> bool:
    """Train from step `first` to the last; say whether it was reached, or patience ended, not stopped before.

    `network` is what is called, and `state.modules["model"]` the part of it, or all, that is trained.
    """
    run, trained, importance = config.run, state.modules["model"], state.modules.get("importance")
    speed = speed_of(network, teacher, config, components, data, accelerator)
    unet, optimizer = prepared(accelerator, network, state.optimizers["optimizer"])
    state.to(accelerator.device)
    log, statistics, grids = Log(run, first, "diffusion", accelerator, speed), LatentStatistics(), SampleGrids()
    batches, stopping = statistics.watching(latent_batches(data, config, first, own_shares(accelerator, run))), False
    average = partial(averaged_network, network, components, trained, state.ema, accelerator)
    with stop_on_signal() as stopped, tuned_for_cpu(network):
        for step in range(first, run.steps if not evaluations.over else first):
            start_step(config, step, optimizer)
            seen, weights, timesteps, norms = accumulate_gradients(
                unet, teacher, config, components, batches, importance, step, accelerator
            )
            norm = whole(accelerator.clip_grad_norm_(trained.parameters(), config.optimizer.max_grad_norm))
            losses, dropped, norm = fetched(seen, norm)
            loss = (losses * weights).mean()
            finite = state.guard.allows(loss, norm, step)
            if finite or state.scaler is not None:  # which leaves out the step itself, and scales by less from then on
                optimizer.step()
            if finite:
                state.average(trained)
            if isinstance(importance, ImportanceSampler):
                importance.update(timesteps, losses)
            values = {"loss": loss, "grad_norm": norm, "null": dropped.mean(), "skipped": not finite}
            log.step(step, {**values, "learning_rate": optimizer.param_groups[0]["lr"]})
            done = step + 1
            stopping = any_process(accelerator, bool(stopped) or (done < run.steps and stop(done)))
            if done % run.log_every == 0:
                norms |= {"ema_distance": ema_distance(state.ema, trained), "skipped_steps": state.guard.skipped}
                log.write(done, {**norms, **statistics.scalars(accelerator)})
            save_snapshot(run, done, state.profiles, accelerator)
            over = evaluations.due(done) and evaluate(evaluations, done, average(), config, held_out, log, accelerator)
            if done % run.save_every == 0 or done == run.steps or stopping or over:
                save_run(config, done, state, accelerator)
            if done % run.sample_every == 0 or done == run.steps or over:
                with average() as averaged:
                    if averaged is not None:
                        write_samples(grids, log, done, *averaged, config, held_out, accelerator)
            if stopping or over:
                break
    log.close()
    return not stopping


def speed_of(
    network: nn.Module,
    teacher: Teacher | None,
    config: DiffusionTraining,
    components: Components,
    data: LatentSet,
    accelerator: Accelerator,
) -> Speed:
    """Return what a sample costs the network."""
    example, twice = draw_batch(data, config, 0, slice(1)), 0.5 * config.objective.self_conditioning
    passes = twice if teacher is None else 3.0  # without a backward pass: two of the teacher, one for the target
    plain = blank_unet(components) if shards_weights(accelerator) else network
    inputs, more = called_with(example, config), conditioning(example)
    return measure_speed(plain, *inputs, accelerator=accelerator, more=passes, **more)


def evaluate(
    evaluations: Evaluations,
    done: int,
    average: AbstractContextManager[tuple[nn.Module, Components] | None],
    config: DiffusionTraining,
    held_out: Batch | None,
    log: Log,
    accelerator: Accelerator,
) -> bool:
    """Evaluate the averaged network after so many steps, keep it where it is the best; say whether patience ended."""
    with average as averaged:
        if averaged is not None:
            scalars = evaluations.take(
                done,
                partial(held_out_scalars, *averaged, config, held_out, accelerator),
                partial(evaluations.of_model, averaged[1]),
                partial(save_trained, *averaged, config),
            )
            log.write(done, scalars)
    return any_process(accelerator, evaluations.over)


def write_samples(
    grids: SampleGrids,
    log: Log,
    done: int,
    network: nn.Module,
    components: Components,
    config: DiffusionTraining,
    held_out: Batch | None,
    accelerator: Accelerator,
) -> None:
    """Draw a grid with the averaged network, and log it with the held-out errors."""
    picture = Path(config.run.out) / f"samples/{done:08d}.png"
    if grids.made(partial(draw_samples, components, config, picture)):
        log.image(done, picture)
    errors = held_out_scalars(network, components, config, held_out, accelerator)
    log.write(done, {**errors, "failed_samples": grids.failed})


def accumulate_gradients(
    unet: nn.Module,
    teacher: Teacher | None,
    config: DiffusionTraining,
    components: Components,
    batches: Iterator[Batch],
    importance: nn.Module | None,
    step: int,
    accelerator: Accelerator,
) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
    """Add the gradients of a step's loss to those of the network, micro-step by micro-step.

    Args:
        batches: gives that of each micro-step.

    Returns:
        Of the whole batch, (B, 2) on the device: losses, and 1 where the caption was dropped; and, each (B,) on the
        CPU, the weights of the losses and the timesteps. Of this process's first micro-step, where the log has a line
        and the loss several terms: their gradient norms.
    """
    run, total, generator = config.run, components.schedule.num_train_timesteps, seeded(config.run.seed, step, 0)
    # A compiled backward pass can be gone through but once, and sharded gradients are not looked at one by one.
    logged = (step + 1) % run.log_every == 0 and not run.compile and not shards_weights(accelerator)
    seen, norms, to_device = list[Tensor](), dict[str, float](), partial(Tensor.to, device=accelerator.device)
    timesteps, weights = draw_timesteps(config.objective.timesteps, importance, total, run.batch_size, generator)
    weights = weights * sample_weights(config)
    estimated = bool(torch.rand((), generator=generator) < 0.5)
    for share in micro_batches(accelerator, run, step, unet):
        batch = next(batches).map(to_device)
        noise, shown = map(to_device, draw_noises(config.objective, run, step, share, batch.latents.shape[1:]))
        times = timesteps[share].to(accelerator.device)
        with accelerator.autocast():
            if teacher is None:
                terms = loss_terms(unet, components, config.objective, batch, times, noise, estimated, shown)
            else:
                terms = consistency_terms(unet, teacher, components, batch, times, noise, step / run.steps)
        losses = torch.stack([*terms.values()]).sum(dim=0)  # (b,), as each term
        if config.prior is not None:
            of_prior = torch.arange(run.batch_size)[share].to(accelerator.device) % 2
            terms = {"instance": losses * (1 - of_prior), "prior": losses * of_prior}
        if logged and not seen and len(terms) > 1:
            means = {name: (term * weights[share].to(term)).mean() for name, term in terms.items()}
            norms = gradient_norms(means, unet, accelerator)
        accelerator.backward((losses * weights[share].to(losses)).mean() / run.accumulation)
        seen.append(torch.stack([losses, batch.dropped.to(losses)], dim=1))
    return gathered(accelerator, seen), weights, timesteps, norms


def fetched(seen: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return both columns of `seen` (B, 2) and a norm on the CPU; the only time that a step waits for the device."""
    *columns, last = torch.cat([seen.t().flatten(), norm.detach().reshape(1).to(seen)]).cpu().split(len(seen))
    return columns[0], columns[1], last[0]


def compile_unet(unet: nn.Module, config: DiffusionTraining, data: LatentSet, accelerator: Accelerator) -> None:
    """Compile the network in place on one micro-batch; see `compile_checked`."""
    batch = draw_batch(data, config, 0, own_shares(accelerator, config.run)[0])
    batch = batch.map(partial(Tensor.to, device=accelerator.device))
    compile_checked(unet, *called_with(batch, config), autocast=accelerator.autocast(), **conditioning(batch))


def called_with(batch: Batch, config: DiffusionTraining) -> tuple[Tensor, Tensor, Tensor]:
    """Return an example of what the network is called with."""
    latents, timesteps = batch.latents, torch.zeros(len(batch), dtype=torch.int64, device=batch.latents.device)
    more = extra_channels(config, latents.shape[1])
    concat = latents.new_zeros(len(batch), more, *latents.shape[2:]) if more else None
    return model_inputs(latents, config.objective.self_conditioning, concat=concat), timesteps, batch.context


def activations(network: nn.Module, config: DiffusionTraining, data: LatentSet, accelerator: Accelerator) -> int:
    """Return about how many bytes a micro-step keeps for its backward pass; see `kept_by_step`."""
    example = draw_batch(data, config, 0, slice(1))
    return kept_by_step(accelerator, config.run, network, *called_with(example, config), **conditioning(example))


def draw_timesteps(
    kind: str, importance: nn.Module | None, total: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return timesteps (count,) int64, below `total`, of a batch and the weights (count,) of their losses."""
    if isinstance(importance, ImportanceSampler):
        return importance.draw(count, generator)
    draw = logit_normal_timesteps if kind == "logit_normal" else stratified_timesteps
    return draw(count, total, generator), torch.ones(count)


def draw_noises(
    objective: ObjectiveConfig, run: RunConfig, step: int, share: slice, shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the noise that the network is asked for and the one it sees, each (b, C, h, w), of samples of a shape.

    Source: offset noise: Guttenberg 2023, "Diffusion with Offset Noise"; input perturbation: Ning et al. 2023,
    arXiv 2301.11706, algorithm 1.
    """
    noise = sample_noise(run.seed, step, share, run.batch_size, shape)
    if objective.offset_noise:
        offsets = sample_noise(run.seed, step, share, run.batch_size, (shape[0], 1, 1), purpose=3)
        noise = noise + objective.offset_noise * offsets
    if not objective.input_perturbation:
        return noise, noise
    more = sample_noise(run.seed, step, share, run.batch_size, shape, purpose=4)
    return noise, noise + objective.input_perturbation * more

"""`latentdiff train --check`: everything a run needs, looked at on throw-away copies; here, the diffusion stage.

Prints a table of what was found and what is expected; "look" is for the reader to judge, what would stop the run is an
error. Nothing is written but the cache that the config names, if it names one outside the run folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentdiff.checkpoints import Components, Encoders
from latentdiff.devices import restored_random_state
from latentdiff.models.pixels import PixelSpace

from ..config import (
    AutoencoderTraining,
    DiffusionTraining,
    ImageTextTraining,
    LoraConfig,
    TrainingConfig,
    UNetTraining,
)
from ..data.batches import Batch, draw_batch, latent_batches
from ..data.latents import LatentSet, warn_of_cut
from ..data.timesteps import stratified_timesteps
from ..loop.cpu import tuned_for_cpu
from ..loop.distributed import own_shares, sample_noise
from ..loop.run import seeded, short, start_step
from ..loop.state import RunState
from ..losses.consistency import Teacher, make_teacher, weights_besides
from ..losses.diffusion import diffusion_losses, require_trainable
from ..monitor.samples import try_prompts
from ..monitor.validation import bucket_names, gaussian_bounds, held_out_errors, load_held_out
from ..networks.encoders import JointNetwork
from ..setup import (
    assemble,
    encode_data,
    load_components,
    move_networks,
    network_to_train,
    open_data,
    require_buildable,
)
from ..train_diffusion import accumulate_gradients, activations
from .autoencoder import examine_autoencoder
from .image_text import examine_image_text
from .table import (
    OVERFIT,
    OVERFIT_RATE,
    OVERFIT_STEPS,
    TIMED,
    Row,
    examine_disk,
    examine_evaluation,
    examine_folder,
    examine_memory,
    examine_pictures,
    examine_steps,
    small_enough,
    start_check,
)

SAMPLES = 1000  # whose latents and captions are looked at
MEASURED = 64  # samples whose error is measured before the first step
REDUCED = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
}


def check(config: TrainingConfig) -> None:
    """Print what a run of a config would meet, line by line as it is found.

    Raises:
        InputError, ModelLoadError, StorageError: the run could not be started as it is.
    """
    odd = 0
    with restored_random_state():
        for row in examine(config):
            print(f"{row.name:<18} {row.value:<52} {row.expected:<46} {'ok' if row.fine else 'look'}", flush=True)
            odd += not row.fine
    print(f"{odd} of these to look at" if odd else "all as expected")


def examine(config: TrainingConfig) -> Iterator[Row]:
    """Return the lines of the table of a run, each when it is found."""
    if isinstance(config, AutoencoderTraining):
        return examine_autoencoder(config)
    return examine_image_text(config) if isinstance(config, ImageTextTraining) else examine_diffusion(config)


def examine_diffusion(config: DiffusionTraining) -> Iterator[Row]:
    """Yield the lines of the table of a diffusion run; see `check`."""
    accelerator = start_check(config)
    what = "from scratch" if config.start_from is None else f"from {config.start_from}"
    kinds = {"unet": "U-Net", "word": "a new word", "unet_and_text": "U-Net and text encoder"}
    kind = f"LoRA of rank {config.train.rank}" if isinstance(config.train, LoraConfig) else kinds[config.train.kind]
    yield from examine_folder(config, f"{kind}, {what}")
    with TemporaryDirectory(prefix="latentdiff-check-") as folder:
        out = Path(config.run.out).resolve()
        if config.cache is None or Path(config.cache).resolve().is_relative_to(out):
            config = config.model_copy(update={"cache": str(Path(folder) / "cache")})
        components = load_components(config)
        require_trainable(config, components)
        require_buildable(config, components, accelerator)
        try_prompts(config, components)
        move_networks(components, accelerator.device)
        images = open_data(config, components, Path(folder))
        yield from examine_pictures(config, images)
        if config.prior is not None:
            value = f"{config.prior.pictures} of {config.prior.prompt!r}"
            yield Row("prior pictures", value[:52], "drawn before the first step, left out here")
            config = config.model_copy(update={"prior": None})
        data = encode_data(config, components, Path(folder), images)
        warn_of_cut(data.captions, components)
        if config.consistency is None:  # which measures nothing by them
            yield examine_held_out(config, components)
        yield examine_evaluation(config, accelerator, Path(config.cache or folder))
        yield from examine_samples(config, data, components)
        teacher = make_teacher(config, components, data)
        network, components, state = assemble(config, data, components, accelerator)
        state.scaler = accelerator.scaler
        networks = (network, components.autoencoder, components.text_encoder, *weights_besides(teacher, config))
        yield from examine_memory(networks, state, accelerator, activations(network, config, data, accelerator))
        yield examine_disk(config, state)
        network.to(accelerator.device)
        yield from examine_errors(network, config, components, data, state, accelerator)
        with tuned_for_cpu(network):
            take_step = stepper(network, teacher, config, components, data, state, accelerator)
            flops = yield from examine_steps(config, take_step, state, accelerator)
            used = network if small_enough(flops, config, accelerator) else None
            yield overfit(used, config, components, data, accelerator)


def examine_held_out(config: DiffusionTraining, components: Encoders) -> Row:
    """Say whether there are pictures to measure by."""
    held_out = load_held_out(config, components)
    found = "none, so that the log has no held-out errors" if held_out is None else f"{len(held_out.latents)} looked at"
    return Row("held-out pictures", found, "a validation split, or data.held_out", held_out is not None)


def examine_samples(config: DiffusionTraining, data: LatentSet, components: Encoders) -> Iterator[Row]:
    """Say how latents are distributed, and how many captions are dropped, of the first `SAMPLES` samples of the run."""
    batch = config.run.batch_size
    batches = (draw_batch(data, config, step) for step in range(math.ceil(SAMPLES / batch)))
    drawn = [(one.latents.transpose(0, 1).flatten(1), one.dropped) for one in batches]
    pixels = torch.cat([latents for latents, _ in drawn], dim=1)  # (C, samples*h*w)
    mean, std = pixels.mean(dim=1), pixels.std(dim=1)
    in_pixels = isinstance(components.autoencoder, PixelSpace)
    near = mean.abs().max() < 0.1 and std.min() > 0.8 and std.max() < 1.25
    yield Row("latent mean", short(mean), "pixels, -1 to 1" if in_pixels else "0", bool(in_pixels or near))
    yield Row("latent std", short(std), "above 0" if in_pixels else "1", bool(std.min() > 0 and (in_pixels or near)))
    dropped = torch.cat([dropped for _, dropped in drawn])[:SAMPLES].double()
    rate, share = config.objective.caption_dropout, float(dropped.mean())
    spread = 3 * math.sqrt(rate * (1 - rate) / len(dropped))
    expected = f"caption_dropout {rate:.1%} +- {spread:.1%}"
    yield Row("null prompts", f"{share:.1%} of {len(dropped)} samples", expected, abs(share - rate) <= spread)


def examine_errors(
    network: nn.Module,
    config: DiffusionTraining,
    components: Components,
    data: LatentSet,
    state: RunState,
    accelerator: Accelerator,
) -> Iterator[Row]:
    """Say what the error of the prediction is before the first step, in each bucket of timesteps.

    What was never trained cannot be better than the best prediction of Gaussian data without structure, else it is
    shown what it is asked for; what was trained must be better.
    """
    samples = first_samples(data, config, MEASURED)
    state.to(accelerator.device)
    with state.ema.swapped_into(state.modules["model"]):
        errors = held_out_errors(network, components, config, samples, accelerator).mean(dim=1)
    bounds = gaussian_bounds(components.schedule, samples).mean(dim=1)
    new = config.start_from is None
    for name, error, bound in zip(
        bucket_names(components.schedule.num_train_timesteps), errors.tolist(), bounds.tolist()
    ):
        fine = error > 0.95 * bound if new else error < bound
        expected = f"{'above' if new else 'below'} {bound:.4f}, of Gaussian data at best"
        yield Row(f"error, t {name}", f"{error:.4f}", expected, fine)


def stepper(
    network: nn.Module,
    teacher: Teacher | None,
    config: DiffusionTraining,
    components: Components,
    data: LatentSet,
    state: RunState,
    accelerator: Accelerator,
) -> Callable[[int], Tensor]:
    """Return a function that takes the step of a number, one after the other, and returns its gradient's norm."""
    run, trained, importance = config.run, state.modules["model"], state.modules.get("importance")
    unet, optimizer = accelerator.prepare(network, state.optimizers["optimizer"])
    enough = run.model_copy(update={"steps": max(run.steps, 1 + TIMED)})  # of a run that is shorter than this look
    batches = latent_batches(data, config.model_copy(update={"run": enough}), 0, own_shares(accelerator, run))

    def take_step(step: int) -> Tensor:
        start_step(config, step, optimizer)
        accumulate_gradients(unet, teacher, config, components, batches, importance, step, accelerator)
        norm = accelerator.clip_grad_norm_(trained.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        state.average(trained)
        return norm

    return take_step


def overfit(
    network: nn.Module | None,
    config: DiffusionTraining,
    components: Components,
    data: LatentSet,
    accelerator: Accelerator,
) -> Row:
    """Train on a few samples, which whatever can learn anything has to learn, and say how far the error fell.

    Args:
        network: on its device; None for a small new one, where that would take too long.
    """
    samples, used = first_samples(data, config, OVERFIT), network
    torch.manual_seed(config.run.seed)  # of a new network, and of dropout
    if used is None:
        reduced = config.model_copy(update={"start_from": None, "train": UNetTraining(), "model": REDUCED})
        unet = network_to_train(reduced, data, components.without_unet())
        used = JointNetwork(unet, components.text_encoder) if config.encodes_each_step else unet
        used.to(accelerator.device)
    before = held_out_errors(used.eval(), components, config, samples, accelerator).mean()
    trained = [parameter for parameter in used.train().parameters() if parameter.requires_grad]
    optimizer, device = torch.optim.AdamW(trained, lr=OVERFIT_RATE, weight_decay=0.0), accelerator.device
    samples = samples.map(lambda tensor: tensor.to(device))
    for step in range(OVERFIT_STEPS):
        generator = seeded(config.run.seed, step, 0)
        timesteps = stratified_timesteps(OVERFIT, components.schedule.num_train_timesteps, generator).to(device)
        noise = sample_noise(config.run.seed, step, slice(None), OVERFIT, samples.latents.shape[1:]).to(device)
        with accelerator.autocast():
            losses = diffusion_losses(used, components, config.objective, samples, timesteps, noise)
        optimizer.zero_grad()
        losses.mean().backward()
        nn.utils.clip_grad_norm_(trained, config.optimizer.max_grad_norm)
        optimizer.step()
    after = held_out_errors(used.eval(), components, config, samples, accelerator).mean()
    who = "the network" if network is not None else "a reduced network"
    value = f"error {before:.3f} -> {after:.3f} in {OVERFIT_STEPS} steps of {who}"
    return Row(f"overfits {OVERFIT}", value, "less than half", bool(after < 0.5 * before))


def first_samples(data: LatentSet, config: DiffusionTraining, count: int) -> Batch:
    """Return the first samples of the run, with their captions."""
    run = config.run.model_copy(update={"batch_size": count})
    objective = config.objective.model_copy(update={"caption_dropout": 0.0})
    return draw_batch(data, config.model_copy(update={"run": run, "objective": objective}), 0)

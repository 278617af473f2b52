"""`latentdiff train --check`: everything a run of the diffusion stage needs, looked at on throw-away copies.

Prints a table of what was found and what is expected; "look" is for the reader to judge, what would stop the run is an
error. Nothing is written but the cache that the config names, if it names one outside the run folder.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.checkpoints import Parts
from latentdiff.devices import DTYPES, machine_memory
from latentdiff.errors import InputError
from latentdiff.models.pixels import PixelSpace
from training.batches import Batch, draw_batch, latent_batches
from training.checkpointing import checkpoint_folders, checkpoint_problem, config_differences
from training.config import DiffusionTraining, TrainingConfig
from training.dataset import CaptionedImages
from training.diffusion import (
    accumulate_gradients,
    assemble,
    encode_data,
    load_parts,
    network_to_train,
    open_data,
)
from training.distributed import own_shares, sample_noise, start_accelerator
from training.encoders import JointNetwork
from training.latents import LatentSet
from training.objective import diffusion_losses, require_trainable
from training.run import fast_attention, seeded, start_step
from training.sharding import shards_weights
from training.state import RunState
from training.timesteps import stratified_timesteps
from training.validation import bucket_names, gaussian_bounds, held_out_errors, load_held_out

SAMPLES = 1000  # whose latents and captions are looked at
LOOKED_AT = 64  # samples whose error is measured before the first step
TIMED = 3  # steps, after one that is not
OVERFIT = 8  # samples of the self-test
OVERFIT_STEPS = 300
OVERFIT_RATE = 1e-3
OVERFIT_FLOPS = {"cpu": 1e13, "cuda": 1e15}  # up to which it trains the network itself, not a reduced one
REDUCED = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
}


class Row(NamedTuple):
    """A line of the table."""

    name: str
    value: str
    expected: str
    fine: bool = True


def check(config: TrainingConfig) -> None:
    """Print what a run of a config would meet, line by line as it is found.

    Raises:
        InputError, ModelLoadError, StorageError: the run could not be started as it is.
    """
    if not isinstance(config, DiffusionTraining):
        raise InputError(f"--check is for the diffusion stage, got {config.stage}; train a few steps to see that")
    odd = 0
    for row in look(config):
        print(f"{row.name:<18} {row.value:<52} {row.expected:<46} {'ok' if row.fine else 'look'}", flush=True)
        odd += not row.fine
    print(f"{odd} of these to look at" if odd else "all as expected")


def look(config: DiffusionTraining) -> Iterator[Row]:
    """Yield the lines of the table; see `check`."""
    accelerator = start_accelerator(config.run)
    if accelerator.num_processes > 1 or shards_weights(accelerator):
        raise InputError("--check is for one process; start it without accelerate launch")
    yield from look_at_folder(config)
    with TemporaryDirectory(prefix="latentdiff-check-") as folder:
        out = Path(config.run.out).resolve()
        if config.cache is None or Path(config.cache).resolve().is_relative_to(out):
            config = config.model_copy(update={"cache": str(Path(folder) / "cache")})
        parts = load_parts(config)
        require_trainable(config, parts)
        images = open_data(config, parts, Path(folder))
        yield from look_at_pictures(config, images)
        if config.prior is not None:
            value = f"{config.prior.pictures} of {config.prior.prompt!r}"
            yield Row("prior pictures", value[:52], "drawn before the first step, left out here")
            config = config.model_copy(update={"prior": None})
        data = encode_data(config, parts, Path(folder), images)
        yield look_at_held_out(config, parts)
        yield from look_at_samples(config, data, parts)
        network, parts, state = assemble(config, data, parts, accelerator)
        state.scaler = accelerator.scaler
        yield from look_at_memory(network, parts, state, accelerator)
        yield look_at_disk(config, state)
        network.to(accelerator.device)
        yield from look_at_errors(network, config, parts, data, state, accelerator)
        with fast_attention():
            flops = yield from look_at_steps(network, config, parts, data, state, accelerator)
            small = flops / config.run.batch_size * OVERFIT * OVERFIT_STEPS < OVERFIT_FLOPS[accelerator.device.type]
            yield overfit(network if small else None, config, parts, data, accelerator)


def look_at_folder(config: DiffusionTraining) -> Iterator[Row]:
    """Say what is trained and whether the run folder has been used."""
    what = "from scratch" if config.start_from is None else f"from {config.start_from}"
    kind = "U-Net" if config.lora is None else f"LoRA of rank {config.lora.rank}"
    yield Row("config", f"{config.stage}: {kind}, {what}", "no unknown key, no wrong value")
    found, state = checkpoint_folders(Path(config.run.out)), "new"
    if found:
        state = f"{found[0].name}, {_problem(found[0], config) or 'whole and of this config'}"
    yield Row("run folder", f"{config.run.out}: {state}", "new, or whole and --resume", not found)


def _problem(checkpoint: Path, config: DiffusionTraining) -> str:
    """Say what keeps a run from going on from a checkpoint, or return the empty string."""
    if problem := checkpoint_problem(checkpoint):
        return problem
    before = json.loads((checkpoint / "state.json").read_text())["config"]
    return "; ".join(config_differences(before, config.model_dump(mode="json")))


def look_at_pictures(config: DiffusionTraining, images: CaptionedImages) -> Iterator[Row]:
    """Say how many pictures and captions there are, and which were left out."""
    run = config.run
    captions = sum(len(row["captions"]) for row in images.rows)
    passes = run.steps * run.batch_size / len(images)
    value = f"{len(images)} with {captions} captions, {passes:.1f} times each"
    yield Row("pictures", value, f"at least a batch, {run.batch_size}", len(images) >= run.batch_size)
    skipped = images.skipped
    names = ", ".join(str(one["name"]) for one in skipped)
    yield Row("skipped", f"{len(skipped)}: {names}"[:52] if skipped else "0", "0, at most 1 %", not skipped)


def look_at_held_out(config: DiffusionTraining, parts: Parts) -> Row:
    """Say whether there are pictures to measure by."""
    held_out = load_held_out(config, parts)
    found = "none, so that the log has no held-out errors" if held_out is None else f"{len(held_out.latents)} looked at"
    return Row("held-out pictures", found, "a validation split, or data.held_out", held_out is not None)


def look_at_samples(config: DiffusionTraining, data: LatentSet, parts: Parts) -> Iterator[Row]:
    """Say how latents are distributed, and how many captions are dropped, of the first `SAMPLES` samples of the run."""
    batch = config.run.batch_size
    batches = (draw_batch(data, config, step) for step in range(math.ceil(SAMPLES / batch)))
    drawn = [(one.latents.transpose(0, 1).flatten(1), one.nulls) for one in batches]
    pixels = torch.cat([latents for latents, _ in drawn], dim=1)  # (C, samples*h*w)
    mean, std = pixels.mean(dim=1), pixels.std(dim=1)
    in_pixels = isinstance(parts.autoencoder, PixelSpace)
    near = mean.abs().max() < 0.1 and std.min() > 0.8 and std.max() < 1.25
    yield Row("latent mean", _short(mean), "pixels, -1 to 1" if in_pixels else "0", bool(in_pixels or near))
    yield Row("latent std", _short(std), "above 0" if in_pixels else "1", bool(std.min() > 0 and (in_pixels or near)))
    nulls = torch.cat([nulls for _, nulls in drawn])[:SAMPLES].double()
    rate, share = config.caption_dropout, float(nulls.mean())
    spread = 3 * math.sqrt(rate * (1 - rate) / len(nulls))
    expected = f"caption_dropout {rate:.1%} +- {spread:.1%}"
    yield Row("null prompts", f"{share:.1%} of {len(nulls)} samples", expected, abs(share - rate) <= spread)


def look_at_memory(network: nn.Module, parts: Parts, state: RunState, accelerator: Accelerator) -> Iterator[Row]:
    """Say how many parameters there are and what they, gradients, optimizer and average take; activations come on top.

    Raises:
        InputError: that is more than the device has.
    """
    trained = sum(parameter.numel() for parameter in state.modules["model"].parameters())
    modules = (network, parts.autoencoder, parts.text_encoder)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    yield Row("parameters", f"{trained:,} trained", f"of {sum(p.numel() for p in parameters):,} in all", trained > 0)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    gradients, optimizer = 4 * trained, 8 * trained  # bytes, in float32; AdamW has two moments
    average = 4 * trained * (1 + len(state.profiles))
    needed = weights + gradients + optimizer + average
    on_gpu = accelerator.device.type == "cuda"
    there = torch.cuda.get_device_properties(0).total_memory if on_gpu else machine_memory()
    value = f"{_size(weights)} weights + {_size(gradients)} + {_size(optimizer)} + {_size(average)}"
    if needed > there:
        raise InputError(
            f"training needs {_size(needed)} ({value}: gradients, optimizer, average) and activations, and there are "
            f"{_size(there)}; train a lora, or a smaller model"
        )
    expected = f"{_size(needed)} and activations, of {_size(there)}"
    yield Row("memory", value, expected, needed < 0.8 * there)


def look_at_disk(config: DiffusionTraining, state: RunState) -> Row:
    """Say how large checkpoints will be and whether there is room for them.

    Raises:
        InputError: there is not.
    """
    tensors = [tensor for named in state.tensors().values() for tensor in named.values()]
    moments = 8 * sum(parameter.numel() for parameter in state.modules["model"].parameters())
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors) + moments
    needed = size * (config.run.keep_checkpoints + 1)  # old ones go when a new one is there
    value = f"{config.run.keep_checkpoints} + 1 checkpoints of {_size(size)}"
    if state.profiles:
        count, snapshot = math.ceil(config.run.steps / config.run.ema_snapshots), moments // 2  # 2 x 2 bytes a weight
        needed, value = needed + count * snapshot, f"{value}, {count} snapshots of {_size(snapshot)}"
    place = Path(config.run.out).resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"{value} need {_size(needed)}, and {place} has {_size(free)} free; free some, or lower "
            "run.keep_checkpoints"
        )
    return Row("disk", value, f"{_size(needed)} of {_size(free)} free", needed < 0.8 * free)


def look_at_errors(
    network: nn.Module,
    config: DiffusionTraining,
    parts: Parts,
    data: LatentSet,
    state: RunState,
    accelerator: Accelerator,
) -> Iterator[Row]:
    """Say what the error of the prediction is before the first step, in each bucket of timesteps.

    What was never trained cannot be better than the best prediction of Gaussian data without structure, else it is
    shown what it is asked for; what was trained must be better.
    """
    samples = first_samples(data, config, LOOKED_AT)
    state.to(accelerator.device)
    with state.ema.swapped_into(state.modules["model"]):
        errors = held_out_errors(network, parts, config, samples, accelerator).mean(dim=1)
    bounds = gaussian_bounds(parts.schedule, samples).mean(dim=1)
    new = config.start_from is None
    for name, error, bound in zip(bucket_names(parts.schedule.num_train_timesteps), errors.tolist(), bounds.tolist()):
        fine = error > 0.95 * bound if new else error < bound
        expected = f"{'above' if new else 'below'} {bound:.4f}, of Gaussian data at best"
        yield Row(f"error, t {name}", f"{error:.4f}", expected, fine)


def look_at_steps(
    network: nn.Module,
    config: DiffusionTraining,
    parts: Parts,
    data: LatentSet,
    state: RunState,
    accelerator: Accelerator,
) -> Generator[Row, None, int]:
    """Take a few steps, say what they cost, and return the FLOPs of one.

    Raises:
        InputError: the gradient is not finite.
    """
    run, trained, importance = config.run, state.modules["model"], state.modules.get("importance")
    unet, optimizer = accelerator.prepare(network, state.optimizers["optimizer"])
    enough = run.model_copy(update={"steps": max(run.steps, 1 + TIMED)})  # of a run that is shorter than this look
    batches = latent_batches(data, config.model_copy(update={"run": enough}), 0, own_shares(accelerator, run))
    counter, seconds, norms = FlopCounterMode(display=False), [], []
    for step in range(1 + TIMED):
        began = time.perf_counter()
        with counter if step == 0 else nullcontext():
            start_step(config, step, optimizer)
            accumulate_gradients(unet, config, parts, batches, importance, step, accelerator)
            norm = accelerator.clip_grad_norm_(trained.parameters(), config.optimizer.max_grad_norm)
            optimizer.step()
        state.average(trained)
        norms.append(float(norm))  # which waits for the device
        seconds.append(time.perf_counter() - began)
    if not all(map(math.isfinite, norms)) and state.scaler is None:
        raise InputError(f"the norms of the first gradients are {norms}; lower optimizer.learning_rate, or try bf16")
    took, flops = median(seconds[1:]), counter.get_total_flops()
    clipped = f"above 0, clipped at {config.optimizer.max_grad_norm:g}"
    yield Row("gradient norm", ", ".join(f"{norm:.3g}" for norm in norms), clipped, min(norms) > 0)
    compiled = ", less with run.compile" if run.compile else ""
    rate = f"{took:.3g} s, {run.batch_size / took:.3g} images/s"
    yield Row("step", rate, f"{run.steps} steps in {_duration(run.steps * took)}{compiled}")
    peak = matrix_product_rate(accelerator)
    share = f"{flops / took / peak:.0%} of what a matrix product reaches"
    yield Row("FLOPs of a step", f"{flops:.3g}, {flops / took:.3g} per second", share)
    return flops


def matrix_product_rate(accelerator: Accelerator) -> float:
    """Return the FLOP/s of a large matrix product in the precision of the run."""
    names = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
    side, device = (1024, "cpu") if accelerator.device.type == "cpu" else (8192, accelerator.device)
    matrix = torch.ones(side, side, dtype=DTYPES[names[accelerator.mixed_precision]], device=device)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # which waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


def overfit(
    network: nn.Module | None, config: DiffusionTraining, parts: Parts, data: LatentSet, accelerator: Accelerator
) -> Row:
    """Train on a few samples, which whatever can learn anything has to learn, and say how far the error fell.

    Args:
        network: on its device; None for a small new one, where that would take too long.
    """
    samples, used = first_samples(data, config, OVERFIT), network
    torch.manual_seed(config.run.seed)  # of a new network, and of dropout
    if used is None:
        reduced = config.model_copy(update={"start_from": None, "lora": None, "model": REDUCED})
        unet = network_to_train(reduced, data, replace(parts, unet=None))
        used = JointNetwork(unet, parts.text_encoder) if config.encodes_each_step else unet
        used.to(accelerator.device)
    before = held_out_errors(used.eval(), parts, config, samples, accelerator).mean()
    trained = [parameter for parameter in used.train().parameters() if parameter.requires_grad]
    optimizer, device = torch.optim.AdamW(trained, lr=OVERFIT_RATE, weight_decay=0.0), accelerator.device
    samples = samples.map(lambda tensor: tensor.to(device))
    for step in range(OVERFIT_STEPS):
        generator = seeded(config.run.seed, step, 0)
        timesteps = stratified_timesteps(OVERFIT, parts.schedule.num_train_timesteps, generator).to(device)
        noise = sample_noise(config.run.seed, step, slice(None), OVERFIT, samples.latents.shape[1:]).to(device)
        with accelerator.autocast():
            losses = diffusion_losses(used, parts, config, samples, timesteps, noise)
        optimizer.zero_grad()
        losses.mean().backward()
        nn.utils.clip_grad_norm_(trained, config.optimizer.max_grad_norm)
        optimizer.step()
    after = held_out_errors(used.eval(), parts, config, samples, accelerator).mean()
    who = "the network" if network is not None else "a reduced network"
    value = f"error {before:.3f} -> {after:.3f} in {OVERFIT_STEPS} steps of {who}"
    return Row(f"overfits {OVERFIT}", value, "less than half", bool(after < 0.5 * before))


def first_samples(data: LatentSet, config: DiffusionTraining, count: int) -> Batch:
    """Return the first samples of the run, with their captions."""
    run = config.run.model_copy(update={"batch_size": count})
    return draw_batch(data, config.model_copy(update={"run": run, "caption_dropout": 0.0}), 0)


def _short(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.2f}" for value in values[:6].tolist()) + (", ..." if len(values) > 6 else "") + "]"


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"

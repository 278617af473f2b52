"""`latentdiff train --check` of the image-text stage; see `training.check.diffusion`."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from torch import Tensor

from latentdiff.models.image_text import ImageTextModel

from ..config import ImageTextTraining
from ..data.captioned_views import CaptionedViews
from ..loop.run import start_step
from ..loop.state import RunState
from ..losses.contrastive import contrastive_loss, least_loss
from ..train_image_text import HeldOut, accumulate_gradients, activations, assemble, start_state
from .table import (
    OVERFIT,
    OVERFIT_RATE,
    OVERFIT_STEPS,
    TIMED,
    Row,
    examine_disk,
    examine_folder,
    examine_memory,
    examine_pictures,
    examine_steps,
    small_enough,
    start_check,
)


def examine_image_text(config: ImageTextTraining) -> Iterator[Row]:
    """Yield the lines of the table of a run of an image-text model; see `training.check.diffusion.check`."""
    accelerator = start_check(config)
    yield from examine_folder(config, "image-text model, from scratch")
    with TemporaryDirectory(prefix="latentdiff-check-") as folder:
        run = config.run.model_copy(update={"out": folder, "steps": max(config.run.steps, 2 + TIMED)})
        apart = config.model_copy(update={"run": run, "cache": config.cache or str(Path(folder) / "cache")})
        data, held_out, model = assemble(apart, accelerator.device)
        yield from examine_pictures(config, data.data)
        yield examine_held_out(held_out)
        state = start_state(config, model)
        yield from examine_memory([model], state, accelerator, activations(model, config, accelerator))
        yield examine_disk(config, state)
        flops = yield from try_steps(apart, data, model, state, accelerator)
        yield overfit(model, small_enough(flops, config, accelerator), apart, data, accelerator)


def examine_held_out(held_out: HeldOut | None) -> Row:
    """Say how many pictures there are to measure by."""
    expected = "a validation split, or data.held_out"
    if held_out is None:
        return Row("held-out pictures", "none: nothing will be measured", expected, False)
    return Row("held-out pictures", f"{len(held_out.images)}, among {len(held_out.texts)} texts", expected)


def try_steps(
    config: ImageTextTraining, data: CaptionedViews, model: ImageTextModel, state: RunState, accelerator: Accelerator
) -> Generator[Row, None, int]:
    """Take the first steps, say what they cost and return the FLOPs of one; see `examine_steps`."""
    network, optimizer = accelerator.prepare(model, state.optimizers["optimizer"])
    state.ema.to(accelerator.device)

    def take_step(step: int) -> Tensor:
        start_step(config, step, optimizer)
        _, norm = accumulate_gradients(network, data.batch(config, step), data.label_texts, config, accelerator)
        optimizer.step()
        state.ema.update(model)
        return norm

    return (yield from examine_steps(config, take_step, state, accelerator))


def overfit(
    model: ImageTextModel, itself: bool, config: ImageTextTraining, data: CaptionedViews, accelerator: Accelerator
) -> Row:
    """Train on a few pairs, which whatever can learn anything has to tell apart, and say how far the loss fell.

    Args:
        model: on its device.
        itself: whether that is trained, or a small new one because it would take too long.
    """
    run = config.run.model_copy(update={"batch_size": OVERFIT})
    pairs = data.batch(config.model_copy(update={"run": run}), 0).to(accelerator.device)
    least = least_loss(pairs.right)
    torch.manual_seed(run.seed)
    small = replace(model.config, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8)
    used = model if itself else ImageTextModel(small).to(accelerator.device)
    optimizer, losses = torch.optim.AdamW(used.parameters(), lr=OVERFIT_RATE, weight_decay=0.0), []
    for _ in range(OVERFIT_STEPS):
        with accelerator.autocast():
            own, theirs, scale = used(pairs.images, pairs.texts)
        loss = contrastive_loss(own.float(), theirs.float(), scale.float(), pairs.right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() - least)
    half = math.log(OVERFIT) / 2
    who = "the network" if itself else "a reduced network"
    value = f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {OVERFIT_STEPS} steps of {who}"
    return Row(f"overfits {OVERFIT}", value, f"below {half:.3f}, half of guessing", losses[-1] < half)

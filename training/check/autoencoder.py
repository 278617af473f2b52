"""`latentdiff train --check` of the autoencoder stage; see `training.check.diffusion`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.images import to_tensor
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL

from ..config import AutoencoderTraining
from ..data.augment import rgb
from ..data.dataset import CaptionedImages, composite, open_images
from ..data.pictures import WHOLE, draw_views, image_batches, load_held_out
from ..loop.distributed import own_shares
from ..loop.resources import require_small_enough
from ..loop.run import seeded, start_step
from ..loop.state import RunState
from ..losses.autoencoder import References, loss_terms
from ..train_autoencoder import (
    accumulate_gradients,
    activations,
    assemble,
    load_references,
    require_trainable,
)
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

# The network of the self-test where that of the config would take too long, and the side of its pictures in pixels.
REDUCED = {"layers_per_block": 1, "norm_num_groups": 8, "mid_block_add_attention": False}
REDUCED_CHANNELS = 32
REDUCED_SIDE = 32

Trial = Callable[[int, bool], tuple[dict[str, Tensor], dict[str, float], Tensor]]


def examine_autoencoder(config: AutoencoderTraining) -> Iterator[Row]:
    """Yield the lines of the table of an autoencoder run; see `training.check.diffusion.check`."""
    accelerator = start_check(config)
    yield from examine_folder(
        config, "KL autoencoder, " + ("from scratch" if config.start_from is None else f"from {config.start_from}")
    )
    require_trainable(config)
    shape = AutoencoderConfig.from_dict(config.model)
    require_small_enough(lambda: AutoencoderKL(shape), accelerator.device)
    references = load_references(config, accelerator.device)
    with TemporaryDirectory(prefix="latentdiff-check-") as folder:
        data = open_images(config.data, config.run.batch_size, Path(folder))
        yield from examine_pictures(config, data)
        yield examine_held_out(config, data)
        yield examine_evaluation(config, accelerator, Path(folder))
        model, state = assemble(config, references.started)
        networks = [*state.modules.values(), *references.networks]
        yield from examine_memory(networks, state, accelerator, activations(model, config, accelerator))
        yield examine_disk(config, state)
        trial = stepper(config, data, references, state, accelerator)
        yield from examine_terms(trial)
        flops = yield from examine_steps(config, lambda step: trial(1 + step, False)[2], state, accelerator)
        used = model if small_enough(flops, config, accelerator) else None
        yield overfit(used, config, data, references, accelerator)


def examine_held_out(config: AutoencoderTraining, data: CaptionedImages) -> Row:
    """Say how many pictures there are to measure by, and whether they are trained on."""
    held_out = load_held_out(config, data)
    last = to_tensor(composite(data.images[-1:], rgb(config.data.background)))
    apart = not torch.equal(held_out[-1:], last)
    value = f"{len(held_out)} looked at" if apart else f"none, so that {len(held_out)} of those trained on are taken"
    return Row("held-out pictures", value, "a validation or a test split", apart)


def stepper(
    config: AutoencoderTraining,
    data: CaptionedImages,
    references: References,
    state: RunState,
    accelerator: Accelerator,
) -> Trial:
    """Return a function that takes the step of a number, one after the other, with the discriminator from the first on.

    It is told whether to measure, and returns what `accumulate_gradients` does and the norm of the gradient.
    """
    run, plain, discriminator = config.run, state.modules["model"], state.modules["discriminator"]
    loss = config.loss.model_copy(update={"adversarial_start": 0})
    enough = run.model_copy(update={"steps": max(run.steps, 2 + TIMED)})  # of a run that is shorter than this look
    config = config.model_copy(update={"loss": loss, "run": enough})
    model, adversary, optimizer, discriminator_optimizer = accelerator.prepare(
        plain, discriminator, *state.optimizers.values()
    )
    state.ema.to(accelerator.device)
    batches = image_batches(data, config, 0, own_shares(accelerator, run))

    def take_step(step: int, measured: bool) -> tuple[dict[str, Tensor], dict[str, float], Tensor]:
        start_step(config, step, optimizer, discriminator_optimizer)
        values, scalars = accumulate_gradients(
            model, adversary, references, config, batches, step, accelerator, measured
        )
        norm = accelerator.clip_grad_norm_(plain.parameters(), config.optimizer.max_grad_norm)
        accelerator.clip_grad_norm_(discriminator.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        discriminator_optimizer.step()
        state.ema.update(plain)
        return values, scalars, norm

    return take_step


def examine_terms(trial: Trial) -> Iterator[Row]:
    """Say how large each term of the loss is in the first step, and the gradient that it alone sends."""
    values, scalars, _ = trial(0, True)
    for name, value in values.items():
        if name != "loss":
            norm = scalars[f"grad_norm/{name}"]
            yield Row(f"term {name}", f"{value:.4g}, gradient norm {norm:.3g}", "a gradient above 0", 0 < norm < inf)


def overfit(
    model: AutoencoderKL | None,
    config: AutoencoderTraining,
    data: CaptionedImages,
    references: References,
    accelerator: Accelerator,
) -> Row:
    """Train on a few pictures, which whatever can learn anything has to learn, and say how far the error fell.

    It is measured by that of the mean of the pictures, the best that a decoder can do which does not see its latents.

    Args:
        model: on its device; None for a small new one, of smaller pictures, where that would take too long.
    """
    run = config.run.model_copy(update={"batch_size": OVERFIT})
    views = draw_views(data, config.model_copy(update={"run": run}), (WHOLE,), 0)
    images, used = to_tensor(views).to(accelerator.device), model  # (B, 3, H, W)
    if used is None:
        torch.manual_seed(run.seed)
        used = _reduced(config).to(accelerator.device)
        side = min(images.shape[-1], max(REDUCED_SIDE, 2 * used.config.downsample_factor))
        images = F.interpolate(images, size=side, mode="area")
    optimizer = torch.optim.AdamW(used.parameters(), lr=OVERFIT_RATE, weight_decay=0.0)
    before, generator = _error(used, images), seeded(run.seed)
    for _ in range(OVERFIT_STEPS):
        with accelerator.autocast():
            reconstruction, posterior = used(images, generator)
        terms = loss_terms(reconstruction.float(), images, posterior, config, references)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        nn.utils.clip_grad_norm_(used.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
    after, blind = _error(used, images), float((images - images.mean(dim=0)).square().mean())
    who = "the network" if model is not None else "a reduced network"
    value = f"error {before:.3f} -> {after:.3f} in {OVERFIT_STEPS} steps of {who}"
    return Row(f"overfits {OVERFIT}", value, f"below {blind / 2:.3f}, half of their mean's", after < blind / 2)


def _reduced(config: AutoencoderTraining) -> AutoencoderKL:
    channels = [REDUCED_CHANNELS] * len(AutoencoderConfig.from_dict(config.model).block_out_channels)
    return AutoencoderKL(AutoencoderConfig.from_dict({**config.model, **REDUCED, "block_out_channels": channels}))


@torch.no_grad()
def _error(model: AutoencoderKL, images: Tensor) -> float:
    return float((model.decode(model.encode(images).mode()) - images).square().mean())

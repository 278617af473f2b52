"""Train a small image-text model on captioned pictures, beside a frozen text encoder.

Try:
    latentdiff train configs/emoji-image-text.yaml
    tensorboard --logdir runs
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentdiff.checkpoints import load_text_encoder, save_model
from latentdiff.checkpoints.hashes import network_digest
from latentdiff.devices import restored_random_state
from latentdiff.errors import InputError
from latentdiff.files import write_file
from latentdiff.images import to_tensor
from latentdiff.models.image_text import ImageTextConfig, ImageTextModel
from latentdiff.models.pixels import LabelEncoder

from .config import ImageTextTraining
from .data.augment import rgb
from .data.captioned_views import CaptionedViews, Pairs, encode_texts, label_of, prepare_views
from .data.dataset import CaptionedImages, composite, open_held_out, open_images
from .data.prefetch import prefetched
from .loop.activations import kept_by_step
from .loop.cpu import tuned_for_cpu
from .loop.distributed import start_accelerator
from .loop.ema import Ema
from .loop.optimizers import make_optimizer
from .loop.resources import require_room, require_small_enough
from .loop.run import open_run, save_run, start_step, stop_on_signal
from .loop.state import RunState
from .losses.contrastive import calibration_error, contrastive_loss, label_loss, ranks
from .monitor.log import Log
from .monitor.trackers import require_trackers
from .networks.parts import part_folder

HELD_OUT = 1024  # pictures to measure by
IMAGES_AT_ONCE = 128


@dataclass(frozen=True)
class HeldOut:
    """Pictures that are not trained on, with the texts that theirs is to be found among.

    Attributes:
        images: (N, 3, H, W).
        texts: (M, text_dim), mean states of all labels.
        right: (N,) int64, the label of each picture.
    """

    images: Tensor
    texts: Tensor
    right: Tensor


def train_image_text(config: ImageTextTraining, resume: bool = False) -> Path:
    """Run the whole stage and return the folder of the trained model.

    Raises:
        InputError: data or config cannot be used, or the loss is not finite 20 steps in a row.
        ModelLoadError: the text encoder cannot be used.
        StorageError: a checkpoint cannot be written, or there is no room for it.
    """
    accelerator = start_accelerator(config.run)
    if accelerator.num_processes > 1:
        raise InputError("a batch is contrasted with itself, in one process; start it without accelerate launch")
    require_trackers(config.run.trackers)
    folder = Path(config.run.out)
    with restored_random_state(), open_run(config, resume, accelerator, "image_text") as checkpoint:
        data, held_out, model = assemble(config, accelerator.device)
        state = start_state(config, model)
        require_room(config.run, state, [model], accelerator.device, activations(model, config, accelerator))
        first = state.restore(checkpoint)
        if run_steps(config, data, held_out, model, state, first, accelerator):
            with state.ema.swapped_into(model):
                export(model, held_out, folder)
    return folder / "image_text"


def assemble(config: ImageTextTraining, device: torch.device) -> tuple[CaptionedViews, HeldOut | None, ImageTextModel]:
    """Return the pictures and their encoded captions, those to measure by, and a new model."""
    folder = Path(config.run.out)
    cache = folder / "cache" if config.cache is None else Path(config.cache)
    place = part_folder("text_encoder", config.text_encoder)
    encoder, tokenizer = load_text_encoder(place, device=device)
    if isinstance(encoder, LabelEncoder):
        raise InputError(f"text_encoder {config.text_encoder} knows classes alone; name one with a vocabulary")
    digest = network_digest(encoder, tokenizer)
    shape = ImageTextConfig.from_dict({**config.model, "text_dim": encoder.config.hidden_size, "text_encoder": digest})
    require_small_enough(lambda: ImageTextModel(shape), device)
    torch.manual_seed(config.run.seed)
    model = ImageTextModel(shape)
    images = open_images(config.data, config.run.batch_size, folder, cache)
    views = prepare_views(config, images, encoder, tokenizer, cache)
    apart = open_held_out(config.data, cache, HELD_OUT)
    if apart is None:
        return views, None, model
    labels = [label_of(row, config.label_column) for row in apart.rows]
    known = {label: n for n, label in enumerate(dict.fromkeys([*labels, *_labels(images, config)]))}
    texts = encode_texts(list(known), encoder, tokenizer, cache).take(range(len(known)))
    pictures = to_tensor(composite(apart.images, rgb(config.data.background)))
    return views, HeldOut(pictures, texts, torch.tensor([known[label] for label in labels])), model


def activations(model: ImageTextModel, config: ImageTextTraining, accelerator: Accelerator) -> int:
    """Return about how many bytes a step keeps; see `kept_by_step`."""
    image, states = torch.empty(1, 3, config.data.size, config.data.size), torch.empty(1, model.config.text_dim)
    return kept_by_step(accelerator, config.run, model, image, states)


def start_state(config: ImageTextTraining, model: ImageTextModel) -> RunState:
    """Return the state of a run that has not begun."""
    optimizers = {"optimizer": make_optimizer(model, config.optimizer)}
    return RunState({"model": model}, optimizers, Ema(model, config.run.ema_decay))


def _labels(images: CaptionedImages, config: ImageTextTraining) -> list[str]:
    return [] if config.label_column is None else [label_of(row, config.label_column) for row in images.rows]


def run_steps(
    config: ImageTextTraining,
    data: CaptionedViews,
    held_out: HeldOut | None,
    model: ImageTextModel,
    state: RunState,
    first: int,
    accelerator: Accelerator,
) -> bool:
    """Train from step `first` to the last; say whether it was reached, not stopped by a signal."""
    run, log, stopping = config.run, Log(config.run, first, "image-text model", accelerator), False
    network, optimizer = accelerator.prepare(model, state.optimizers["optimizer"])
    state.ema.to(accelerator.device)
    batches = prefetched(lambda step: data.batch(config, step), range(first, run.steps), threads=1)
    with stop_on_signal() as stopped, tuned_for_cpu(model):
        for step in range(first, run.steps):
            start_step(config, step, optimizer)
            loss, norm = accumulate_gradients(network, next(batches), data.label_texts, config, accelerator)
            finite = state.guard.allows(loss, norm, step)
            if finite:
                optimizer.step()
                state.ema.update(model)
            scalars = {"loss": loss, "scale": model.scale.detach(), "grad_norm": norm, "skipped": not finite}
            log.step(step, {**scalars, "learning_rate": optimizer.param_groups[0]["lr"]})
            done, stopping = step + 1, bool(stopped)
            if done % run.save_every == 0 or done == run.steps or stopping:
                save_run(config, done, state, accelerator)
            if held_out is not None and (done % run.sample_every == 0 or done == run.steps):
                with state.ema.swapped_into(model):
                    log.write(done, retrieval(model, held_out))
            if stopping:
                break
    log.close()
    return not stopping


def accumulate_gradients(
    network: nn.Module, batch: Pairs, label_texts: Tensor, config: ImageTextTraining, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Add the gradients of a batch's loss to those of the network; return the loss and their norm.

    Args:
        network: an `ImageTextModel` as accelerate prepared it.
        label_texts: see `CaptionedViews`.
    """
    batch, count = batch.to(accelerator.device), len(batch.texts)
    given = torch.cat([batch.texts, label_texts.to(batch.texts)]) if config.label_weight else batch.texts
    with accelerator.autocast():
        images, texts, scale = (part.float() for part in network(batch.images, given))
    loss = contrastive_loss(images, texts[:count], scale, batch.right)
    if config.label_weight:
        loss = loss + config.label_weight * label_loss(images, texts[count:], scale, batch.labels)
    accelerator.backward(loss)
    return loss.detach(), accelerator.clip_grad_norm_(network.parameters(), config.optimizer.max_grad_norm)


@torch.no_grad()
def retrieval(model: ImageTextModel, held_out: HeldOut) -> dict[str, float]:
    """Return how often the right text of held-out pictures is the best or among the five best, and the calibration."""
    device = model.logit_scale.device
    images = torch.cat([model.embed_images(part.to(device)) for part in held_out.images.split(IMAGES_AT_ONCE)])
    texts, right = model.embed_texts(held_out.texts.to(device)), held_out.right.to(device)
    found = ranks(images, texts, right)
    shares = {f"held_out_top{most}": (found < most).float().mean().item() for most in (1, 5)}
    return {**shares, "held_out_calibration_error": calibration_error(model.scale * images @ texts.T, right)}


def export(model: ImageTextModel, held_out: HeldOut | None, folder: Path) -> None:
    """Save the model to folder/image_text, and what was measured of it to image_text.json."""
    figures = (
        {}
        if held_out is None
        else {**retrieval(model, held_out), "held_out_images": len(held_out.images), "texts": len(held_out.texts)}
    )
    save_model(model, folder / "image_text", torch.float16)
    write_file(folder / "image_text.json", (json.dumps(figures, indent=2) + "\n").encode())
    print(f"saved {folder / 'image_text'}", *(f"{name} {value:.4g}" for name, value in figures.items()))

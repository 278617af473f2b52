"""`latentdiff finetune`: a recipe chosen for a model, a set of captioned pictures and this machine, and run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentdiff.checkpoints import EMBEDDED, Components, load_pipeline
from latentdiff.devices import memory_of, resolve_device
from latentdiff.errors import InputError
from latentdiff.prompts import check_prompt

from .config import DiffusionTraining, UpscaleTask, data_config, dump_yaml, load_config, parse_config
from .data.dataset import read_captions

SMALL = 100e6  # parameters of a U-Net up to which a CPU trains it in minutes
PASSES = 40  # over the pictures
STEPS = (200, 4000)  # at least, and at most
PROMPTS = 8
# The embedded model that does each task.
TASKS = {"text_to_image": EMBEDDED, "inpaint": "embedded-inpaint", "upscale": "embedded-upscale"}


def finetune(
    dataset: str, out: str, model: str | None, rank: int | None, task: str | None = None, resume: bool = False
) -> Path:
    """Choose a recipe, print it as YAML, run it, and return what was trained.

    Args:
        dataset: folder of captioned pictures.
        out: run folder.
        model: folder, single file or hub name; None for the embedded model that does the task.
        rank: of a LoRA; None trains the whole U-Net.
        task: see `training.config.DiffusionTraining`; None for what the model does.
        resume: go on with the recipe that is in the run folder.

    Raises:
        InputError, ModelLoadError, StorageError: as of the diffusion stage.
    """
    from .train_diffusion import train_diffusion

    if resume:
        config = load_config(Path(out) / "config.yaml")
    else:
        tree = recipe(dataset, out, model or TASKS[task or "text_to_image"], rank, task)
        print(dump_yaml(tree))
        config = parse_config(tree)
    if not isinstance(config, DiffusionTraining):
        raise InputError(f"{out} is a run of stage {config.stage}; go on with it by `latentdiff train --resume`")
    return train_diffusion(config, resume)


def recipe(dataset: str, out: str, model: str, rank: int | None, task: str | None) -> dict[str, Any]:
    """Return the config for `finetune`; the model is let go of, and of the pictures only the captions are read."""
    components = load_pipeline(model)
    height, width = components.native_size
    if height != width:
        raise InputError(f"only models of square pictures are fine-tuned, got {width}x{height}; use another model")
    captions = [found[0] for found in read_captions(data_config(dataset, height), Path(out) / "cache")]
    return choose(components, dataset, captions, out, model, rank, task)


def choose(
    components: Components,
    dataset: str,
    captions: list[str],
    out: str,
    model: str,
    rank: int | None,
    task: str | None = None,
) -> dict[str, Any]:
    """Return the config of a fine-tuning run that suits a model, a set of pictures and this machine."""
    large = sum(parameter.numel() for parameter in components.unet.parameters()) > SMALL
    batch = _batch(large)
    fewest, most = STEPS
    steps = min(max(PASSES * len(captions) // batch, fewest), most)
    often = max(1, steps // 4)
    rates = {(False, False): 2e-4, (False, True): 1e-3, (True, False): 1e-5, (True, True): 1e-4}
    every = max(1, len(captions) // PROMPTS)
    run = {"out": out, "steps": steps, "batch_size": batch, "ema_decay": 0.99 if steps < 1000 else 0.999}
    run |= {"sample_every": often, "save_every": often, "log_every": max(1, steps // 40)}
    if large:
        run |= {"accumulation": batch, "gradient_checkpointing": True}
    tree: dict[str, Any] = {
        "stage": "diffusion",
        "data": {"folder": dataset, "size": components.native_size[0]},
        "run": run,
        "start_from": model,
        "optimizer": {"learning_rate": rates[large, rank is not None], "warmup_steps": max(1, steps // 20)},
        "samples": {"prompts": drawable(captions[::every]) or ["a picture"]},
    }
    task = task or components.task
    if task != "text_to_image":
        tree["task"] = {"kind": task}
    if task == "upscale":  # windows, in which details are as large as in large pictures
        tree["data"] |= {"crop": "random", "zoom": 2.0}
        tree["samples"]["guidance_scale"] = 1.0
        known = components.unet.config.num_class_embeds
        if known is not None and known <= UpscaleTask().max_noise_level:
            tree["task"]["max_noise_level"] = known - 1
    if rank is not None:
        # A small U-Net has most of its weights in convolutions, a large one learns a style by its attention.
        layers = ["attention", "feed_forward"] + ([] if large else ["convolution"])
        tree["train"] = {"kind": "lora", "rank": rank, "layers": layers}
    return tree


def drawable(captions: Sequence[str]) -> list[str]:
    """Return the first captions that can be drawn."""
    found = []
    for caption in captions:
        with suppress(InputError):
            found.append(check_prompt(caption))
    return found[:PROMPTS]


def _batch(large: bool) -> int:
    """Return how many pictures a step sees: what a GPU takes at once, or a CPU in a few seconds."""
    if not large:
        return 32
    device = resolve_device(None)
    if device.type == "cpu":
        return 2
    return 8 if memory_of(device) > 2**34 else 4

"""`latentdiff distill`: few steps for a model, by a tuned sampler, a LoRA or weights of few calls; cheap previews."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from latentdiff.checkpoints import Components, load_pipeline, read_header, save_model, save_pipeline
from latentdiff.checkpoints.components import moved
from latentdiff.checkpoints.folder import TINY_DECODER
from latentdiff.checkpoints.lora import describe_lora
from latentdiff.checkpoints.tuned_sampler import FILE, read_tuned
from latentdiff.devices import resolve_device
from latentdiff.diffusion.tuned import TUNED, TunedSampler, schedule_digest
from latentdiff.errors import InputError, shown
from latentdiff.files import is_file, write_file
from latentdiff.generation.options import check_number
from latentdiff.generation.request import Settings
from latentdiff.images import to_tensor
from latentdiff.models.autoencoder import AutoencoderKL

from .config import (
    ConsistencyConfig,
    DataConfig,
    DiffusionTraining,
    data_config,
    dump_yaml,
    load_config,
    parse_config,
)
from .data.dataset import composite, open_images, read_captions
from .destination import destination
from .finetune import choose
from .tiny_decoder import BATCH, decoded_pairs, tiny_config, train_tiny_decoder
from .train_diffusion import train_diffusion
from .tune_sampler import MEASURED_ON, TRAINED_ON, targets_of, tune

FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
FEW, GUIDED = 8, 1.0  # a model whose defaults are at most so many steps, without guidance, needs no fewer
STEPS = 2000  # of training
DECODED = 512  # pictures for a tiny decoder
# By whether the U-Net is large and whether a LoRA is trained.
RATES = {(False, False): 1e-4, (False, True): 5e-4, (True, False): 5e-6, (True, True): 1e-4}


@dataclass(frozen=True)
class Asked:
    """A model that is to draw in few steps.

    Attributes:
        model: folder, single file or hub name.
        data: captioned pictures.
        out: where the result goes.
        guidance_scale: of the many steps; None for the model's default.
        recipe: file of a config whose `keep` and `drop` choose among the pictures; None for all.
    """

    model: str
    data: str
    out: str
    guidance_scale: float | None = None
    recipe: str | None = None

    def load(self) -> Components:
        """Load the model.

        Raises:
            InputError, ModelLoadError: it is none, or none that can have fewer steps.
        """
        require_model(self.model)
        components = load_pipeline(self.model)
        require_many_steps(components, self.model)
        return components

    def pictures(self, side: int) -> DataConfig:
        """Return which captioned pictures are meant."""
        return data_config(self.data, side, self.recipe)

    def guidance(self, components: Components) -> float:
        """Return the guidance scale of the many steps."""
        if self.guidance_scale is not None:
            return check_number("--guidance", self.guidance_scale, 0, 50, "try 4")
        return own_guidance(components)


def tune_sampler(asked: Asked, steps: Sequence[int]) -> Path:
    """Tune tables of some step counts for a model and write them beside it; return the folder of the model.

    Args:
        asked: whose captions are used as prompts; its `out` is the folder of the model itself, which gets the file of
            the tables, or another one, to which the model is written too.
        steps: calls of the network, one table for each.

    Raises:
        InputError, ModelLoadError: the model is none that can have fewer steps, or the captions cannot be used.
        StorageError: the folder cannot be written.
    """
    components = asked.load()
    guidance = asked.guidance(components)
    prompts = _prompts(asked.pictures(min(components.native_size)), Path(asked.out))
    folder, own = destination(asked.model, asked.out)
    found, components = _tables_there(components, folder), moved(components, resolve_device(None))
    print(f"drawing {len(prompts)} pictures in many steps", flush=True)
    training, held_out = (
        targets_of(components, prompts[some], guidance, seed)
        for some, seed in ((slice(TRAINED_ON), 0), (slice(TRAINED_ON, None), TRAINED_ON))
    )
    components.unet.requires_grad_(False)
    for count in steps:
        table, initial = tune(components.schedule, count, training, held_out, guidance, report=_say)
        _say(f"{count} steps: {table.distance_before:.4f} from many steps by {initial}, {table.distance:.4f} tuned")
        found = found.with_table(table)
        if own or count != steps[0]:
            write_file(folder / FILE, (json.dumps(found.to_dict(), indent=2) + "\n").encode())
        else:
            save_pipeline(replace(moved(components, torch.device("cpu")), tuned=found), folder, torch.float16)
    told = f" --guidance {guidance:g}" if guidance != own_guidance(components) else ""
    call = f"latentdiff generate {shlex.quote(prompts[0] or 'a picture')} --model {shlex.quote(str(folder))}"
    print(f"saved {folder / FILE}; try: {call} --sampler {TUNED} --steps {steps[0]}{told}")
    return folder


def add_tiny_decoder(asked: Asked) -> Path:
    """Train a tiny decoder for the previews of a model and write it beside it; return the folder of the model.

    Args:
        asked: whose pictures are trained on; `out` as of `tune_sampler`.

    Raises:
        InputError, ModelLoadError: the model has no latents, or the pictures cannot be used.
        StorageError: the folder cannot be written.
    """
    require_model(asked.model)
    components = load_pipeline(asked.model)
    if not isinstance(components.autoencoder, AutoencoderKL):
        raise InputError(
            f"{shown(asked.model)} draws pixels and needs no decoder; previews of it are its own estimates"
        )
    folder, own = destination(asked.model, asked.out)
    pictures = open_images(asked.pictures(min(components.native_size)), BATCH, folder / "cache", folder / "cache")
    chosen = pictures.images[:: 1 + (len(pictures) - 1) // DECODED]
    components = moved(components, resolve_device(None))
    print(f"decoding {len(chosen)} pictures", flush=True)
    latents, wanted = decoded_pairs(components, to_tensor(composite(chosen, (255, 255, 255))))
    decoder, found = train_tiny_decoder(tiny_config(components), latents, wanted, report=_say)
    if own:
        save_model(decoder, folder / TINY_DECODER, torch.float16)
    else:
        save_pipeline(
            replace(moved(components, torch.device("cpu")), tiny_decoder=decoder.cpu()), folder, torch.float16
        )
    size = sum(parameter.numel() for parameter in decoder.parameters()) * 2 / 1e6
    print(f"saved {folder / TINY_DECODER}, {size:.2f} MB: {found:.1f} dB from what the autoencoder decodes")
    return folder


def distil(asked: Asked, calls: int, rank: int | None) -> Path:
    """Choose a recipe that makes a model draw in few calls, print it as YAML, run it, and return what was trained.

    Args:
        asked: its `out` is the run folder, and its guidance is folded in.
        calls: in which the result is to draw.
        rank: of a LoRA; None trains the whole U-Net.

    Raises:
        InputError, ModelLoadError, StorageError: as of the diffusion stage.
    """
    tree = choose_recipe(asked.load(), asked, calls, rank)
    print(dump_yaml(tree))
    return _run(parse_config(tree), asked.out, resume=False)


def go_on(out: str) -> Path:
    """Go on with the run that is in a folder, and return what was trained.

    Raises:
        InputError, ModelLoadError, StorageError: as of the diffusion stage.
    """
    return _run(load_config(Path(out) / "config.yaml"), out, resume=True)


def _run(config: object, out: str, resume: bool) -> Path:
    if not isinstance(config, DiffusionTraining) or config.consistency is None:
        raise InputError(f"{out} is a run of another kind; go on with it by `latentdiff train --resume`")
    return train_diffusion(config, resume)


def choose_recipe(components: Components, asked: Asked, calls: int, rank: int | None) -> dict[str, Any]:
    """Return the config of a run of consistency distillation that suits a model, pictures and this machine."""
    height, width = components.native_size
    if height != width:
        raise InputError(f"only models of square pictures are trained, got {width}x{height}; use another model")
    pictures, often = asked.pictures(height), STEPS // 4
    captions = [found[0] for found in read_captions(pictures, Path(asked.out) / "cache")]
    tree = choose(components, asked.data, captions, asked.out, asked.model, rank)
    large = "gradient_checkpointing" in tree["run"]
    tree["data"] |= pictures.model_dump(include={"keep", "drop"}, exclude_defaults=True)
    tree["run"] |= {"steps": STEPS, "ema_decay": 0.99, "sample_every": often, "save_every": often, "log_every": 50}
    tree["optimizer"] = {"learning_rate": RATES[large, rank is not None], "warmup_steps": 50}
    tree["objective"] = {"caption_dropout": 0.0}
    folded = ConsistencyConfig(guidance_scale=asked.guidance(components), calls=calls)
    tree["consistency"] = folded.model_dump()
    return tree


def require_model(model: str) -> None:
    """Raise InputError where a LoRA stands in place of a model."""
    if not is_file(model):
        return
    described = describe_lora(Path(model), read_header(Path(model))) if model.endswith(".safetensors") else None
    if described is not None:
        raise InputError(
            f"{shown(model)} is a LoRA and no model; merge it with latentdiff convert MODEL NEW --lora FILE"
        )


def require_many_steps(components: Components, model: str) -> None:
    """Raise InputError where a model draws in few steps already, or from more than texts."""
    defaults, config = components.defaults, components.unet.config
    steps = int(defaults.get("num_inference_steps", Settings.num_inference_steps))
    guidance = float(defaults.get("guidance_scale", Settings.guidance_scale))
    if components.task != "text_to_image":
        raise InputError(f"only text-to-image models are distilled, got one of {components.task}; use its base")
    if config.self_conditioning:
        raise InputError(f"{shown(model)} is conditioned on its own estimates, which few steps lack; use another model")
    few = steps <= FEW and guidance <= GUIDED
    embedded = config.time_cond_proj_dim is not None or components.schedule.class_name in FEW_STEP_SCHEDULERS
    if few or embedded or defaults.get("sampler") == "lcm":
        raise InputError(f"{shown(model)} is a model of few steps already; distil the one that it was made of")


def own_guidance(components: Components) -> float:
    """Return the guidance scale that a model draws with by default."""
    return float(components.defaults.get("guidance_scale", Settings.guidance_scale))


def _prompts(pictures: DataConfig, out: Path) -> list[str]:
    """Return a prompt for each sample, drawn from the captions; twice the same only where there are too few."""
    captions = [one for found in read_captions(pictures, out / "cache") for one in found]
    if not captions:
        raise InputError(f"{pictures.folder} has no captions to draw by; add metadata.jsonl, or use other pictures")
    count, rng, prompts = TRAINED_ON + MEASURED_ON, random.Random(0), list[str]()
    while len(prompts) < count:
        prompts += rng.sample(captions, min(len(captions), count - len(prompts)))
    return prompts


def _tables_there(components: Components, folder: Path) -> TunedSampler:
    """Return the tables that are in a folder or else come with a model, if they are for its noise process."""
    digest = schedule_digest(components.schedule)
    there = [one for one in (read_tuned(folder), components.tuned) if one is not None and one.schedule == digest]
    return there[0] if there else TunedSampler(digest, {})


def _say(line: str) -> None:
    print(line, flush=True)

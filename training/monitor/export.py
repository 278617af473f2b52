"""What a diffusion run trained, as files that are used like any other model."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

import torch
from torch import nn

from latentdiff.checkpoints import Components, save_pipeline
from latentdiff.checkpoints.lora import save_lora
from latentdiff.checkpoints.textual_inversion import save_embedding
from latentdiff.models.lora import LoRA
from latentdiff.models.pixels import PixelSpace
from latentdiff.pipeline import Pipeline

from ..config import DiffusionTraining, TextualInversionConfig
from ..networks.encoders import JointNetwork
from ..networks.lora import Adapted
from .process import show_process
from .samples import SampleGrids

MODEL_FOLDER = "model"
LORA_FILE = "lora.safetensors"
EMBEDDING_FILE = "embedding.safetensors"


def export_name(config: DiffusionTraining) -> str:
    """Return the name of what a run exports in its folder."""
    return {"lora": LORA_FILE, "word": EMBEDDING_FILE}.get(config.train.kind, MODEL_FOLDER)


def export(
    network: nn.Module, components: Components, config: DiffusionTraining, folder: Path, trained: bool = True
) -> None:
    """Save the model or the LoRA, say how to use it, and show what it learnt where it was trained on pixels.

    Args:
        trained: whether a step was taken since the run was opened, so that there is something new to show.
    """
    prompt = shlex.quote(config.samples.prompts[0])
    calls = {"inpaint": f"generate {prompt} --image PICTURE --mask MASK", "upscale": "upscale PICTURE"}
    call, base = calls.get(config.task.kind, f"generate {prompt}"), shlex.quote(config.start_from or "embedded")
    place = save_trained(network, components, config, model_place(config, folder))
    option = {"lora": "lora", "word": "embedding"}.get(config.train.kind)
    if option is not None:
        print(f"saved {place}; try: latentdiff {call} --model {base} --{option} {shlex.quote(str(place))}")
        return
    print(f"saved {place}; try: latentdiff {call} --model {shlex.quote(str(place))}")
    if isinstance(components.autoencoder, PixelSpace):
        if trained:
            SampleGrids().made(partial(show_process, components, config, folder))
        paths = f"{shlex.quote(str(place))} --data {shlex.quote(config.data.folder)}"
        print(f"bits per dimension: latentdiff evaluate {paths} --metrics nll")


def model_place(config: DiffusionTraining, folder: Path) -> Path:
    """Return the folder that a run's model goes to: its own for a whole model, that of the run for a single file."""
    return folder / MODEL_FOLDER if export_name(config) == MODEL_FOLDER else folder


def save_trained(network: nn.Module, components: Components, config: DiffusionTraining, place: Path) -> Path:
    """Write what a run trains into a folder, the whole model or a file of what is new; return where it is."""
    if isinstance(network, Adapted):
        file = place / LORA_FILE
        defaults = {} if config.consistency is None else components.defaults
        save_lora(LoRA({"unet": network.factors(torch.float16)}, defaults=defaults), file, components)
        return file
    words = network.words if isinstance(network, JointNetwork) else None
    if words is not None and isinstance(config.train, TextualInversionConfig):
        file = place / EMBEDDING_FILE
        save_embedding(config.train.word, words.vectors.detach().cpu(), file)
        return file
    save_pipeline(components, place, torch.float16)
    return place


def load_trained(config: DiffusionTraining, place: Path, device: torch.device) -> Components:
    """Load what `save_trained` wrote, with the model that it is for."""
    if config.train.kind not in ("lora", "word"):
        return Pipeline.from_pretrained(place, device=device).components
    base = Pipeline.from_pretrained(config.start_from, device=device)
    if isinstance(config.train, TextualInversionConfig):
        return base.with_embedding(place / EMBEDDING_FILE, config.train.word).components
    return base.with_loras({str(place / LORA_FILE): 1.0}).components

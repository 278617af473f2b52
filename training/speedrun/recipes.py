"""The configs that a speedrun trains by: recipes of the package, with data and length of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentdiff.checkpoints import Components
from latentdiff.errors import InputError

from .. import find_recipe
from ..config import AutoencoderTraining, DiffusionTraining, parse_config, read_yaml
from ..finetune import choose, drawable
from . import table
from .plan import Plan
from .table import Size

SAVING = 90.0  # seconds between two checkpoints
VARIANTS = ["plain", "flip"]  # of pictures of one's own
WITHOUT_TEXT = "a picture"  # what a model further trained without captions is shown to draw; it does not look at it
EMOJI_PROMPTS = ["a red fox", "a cat", "an owl", "a pizza", "a red car", "a sunflower", "a red heart", "a smiling face"]


@dataclass(frozen=True)
class Material:
    """What a speedrun is about.

    Attributes:
        folder: of the pictures.
        emoji: whether they are those that `latentdiff data emoji` draws.
        captions: one for all pictures; empty for their own.
        texts: all captions there are, some of which are drawn on the way; none for pictures alone.
        held_out: share of the pictures to measure by.
        start: model that is trained further, as configs name it; None for a new one.
    """

    folder: str
    emoji: bool = False
    captions: Sequence[str] = ()
    texts: Sequence[str] = ()
    held_out: float = 0.0
    start: str | None = None

    @property
    def reads_text(self) -> bool:
        """Whether there is anything to read."""
        return bool(self.texts) or self.emoji

    def data(self, side: int, recipe: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the section of a config: of emoji as their recipe chooses them.

        Args:
            recipe: a section like it.
        """
        if self.emoji:
            return {**(recipe or {}), "folder": self.folder, "size": side}
        more: dict[str, Any] = {"captions": list(self.captions)} if self.captions else {}
        return {"folder": self.folder, "size": side, "held_out": self.held_out, "variants": VARIANTS, **more}


def recipe_tree(name: str) -> dict[str, Any]:
    """Return a recipe of the package, without the model that it may go on from.

    Raises:
        InputError: this copy of the package came without it.
    """
    file = find_recipe(name)
    if file is None:
        raise InputError(f"recipe {name} is missing from this copy of latentdiff; install it again")
    tree = dict(read_yaml(file))
    if tree.pop("start_from", None) and "loss" in tree:
        tree["loss"] = {name: weight for name, weight in tree["loss"].items() if name != "latents"}
    return tree


def run_section(out: Path, steps: int, batch: int, pace: float) -> dict[str, Any]:
    """Return how long a stage runs and how often it writes.

    Args:
        pace: about the seconds of a step.
    """
    return {
        "out": str(out),
        "steps": steps,
        "batch_size": batch,
        "ema_decay": 0.99 if steps < 1000 else 0.998 if steps < 5000 else 0.999,
        **often(steps, pace),
    }


def often(steps: int, pace: float) -> dict[str, int]:
    """Return how often a stage of so many steps writes: what may change on the way."""
    return {
        "log_every": max(1, steps // 100),
        "sample_every": max(1, math.ceil(steps / table.GRIDS)),
        "save_every": max(1, min(math.ceil(steps / 4), int(SAVING / max(pace, 1e-6)))),
    }


def autoencoder_config(size: Size, material: Material, plan: Plan, out: Path, cost: float) -> AutoencoderTraining:
    """Return the config of the autoencoder.

    Args:
        cost: seconds of a sample.
    """
    tree = recipe_tree(size.autoencoder)
    batch, steps = tree["run"]["batch_size"], plan.autoencoder_steps
    data = tree["data"] if material.emoji else {}
    tree |= {
        "data": {**material.data(size.side, data), **({} if material.emoji else {"variants": ["plain"]})},
        "run": run_section(out, steps, batch, cost * batch),
        "model": {**tree["model"], "sample_size": size.side},
        "optimizer": {**tree["optimizer"], "warmup_steps": _warmup(steps)},
    }
    config = parse_config(tree, size.autoencoder)
    assert isinstance(config, AutoencoderTraining)
    return config


def unet_config(
    size: Size, material: Material, plan: Plan, out: Path, cost: float, components: Components | None = None
) -> DiffusionTraining:
    """Return the config of the U-Net.

    Args:
        cost: seconds of a sample.
        components: of the model that is trained further; None for a new one.
    """
    texts, prompts = list(material.texts), EMOJI_PROMPTS if material.emoji else prompts_of(material.texts)
    if components is not None and material.start is not None:
        tree = choose(components, material.folder, texts, str(out), material.start, None)
        tree["data"] = material.data(size.side)
        prompts = prompts or [WITHOUT_TEXT] * table.PROMPTS
    else:
        tree = recipe_tree(size.recipe)
        model = {name: value for name, value in tree["model"].items() if name != "cross_attention_dim"}
        tree |= {"data": material.data(size.side, tree["data"]), "model": {**model, **size.model}}
        tree["autoencoder"] = str(out / "autoencoder") if size.autoencoder else None
        tree["text_encoder"] = "embedded" if material.reads_text else "none"
        prompts = prompts or [""] * table.PROMPTS
    tree["run"] = run_section(out, plan.unet_steps, plan.unet_batch, cost * plan.unet_batch)
    tree["optimizer"] = {**tree["optimizer"], "warmup_steps": _warmup(plan.unet_steps)}
    tree["samples"] = {"prompts": prompts, "guidance_scale": 4.0 if material.reads_text else 1.0}
    config = parse_config(tree, size.recipe or "recipe")
    assert isinstance(config, DiffusionTraining)
    return config


def prompts_of(texts: Sequence[str]) -> list[str]:
    """Return some captions, from all over, to be drawn on the way; the same one again where there are few."""
    found = drawable(texts[:: max(1, len(texts) // table.PROMPTS)])[: table.PROMPTS]
    return (found * table.PROMPTS)[: table.PROMPTS] if found else []


def autoencoder_batch(size: Size) -> int:
    """Return how many pictures a step of the autoencoder sees."""
    return int(recipe_tree(size.autoencoder)["run"]["batch_size"]) if size.autoencoder else 1


def _warmup(steps: int) -> int:
    return max(1, min(300, steps // 20))

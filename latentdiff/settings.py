"""What a picture is drawn with: every number and name of a request, its default and its check, in one place.

Python, the command line and whatever other door there is build a `Settings`; what that accepts, the pipeline can draw.
`Settings.record` is the form in which settings travel inside a PNG, and `Settings.from_record` reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentdiff.errors import InputError
from latentdiff.prompts import check_prompt, check_prompts

__all__ = ["SIZE_MULTIPLE", "Settings", "check_integer", "check_number", "check_size", "parameters_text"]

MAX_SEED = 2**63 - 1
MAX_IMAGES = 1000
MAX_SIDE = 16384
SIZE_MULTIPLE = 8  # of height and width, or the autoencoder's factor where that is more


@dataclass(frozen=True)
class Settings:
    """One request, checked; the defaults are those of every door.

    Attributes:
        prompts: one or more texts; a single one may be given as it is.
        negative_prompt: what to steer away from; may be empty.
        num_inference_steps: 1 to 1000 calls of the network.
        guidance_scale: 0 to 50; 1 and below draw without guidance.
        guidance_rescale: 0 to 1, how far guided contrast is drawn back.
        guidance_interval: (low, high) in sigmas, guided only between them; None guides everywhere.
        sampler: see `latentdiff.diffusion.SAMPLERS`; "diffusers:" and a class name for a scheduler object.
        seed: of the first image; image i has seed + i.
        num_images: per prompt.
        strength: above 0, up to 1; how much of an initial image is drawn anew. 1 without one.
        height, width: pixels, multiples of 8; None for the model's own.

    Raises:
        InputError: a value that cannot be used, with what can.
    """

    prompts: tuple[str, ...]
    negative_prompt: str = ""
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    sampler: str = "dpmpp_2m"
    seed: int = 0
    num_images: int = 1
    strength: float = 1.0
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(check_prompts(self.prompts)))
        check_prompt(self.negative_prompt, what="negative_prompt", allow_empty=True)
        check_integer("num_inference_steps", self.num_inference_steps, 1, 1000, "try 25")
        check_number("guidance_scale", self.guidance_scale, 0, 50, "try 7.5")
        check_number("guidance_rescale", self.guidance_rescale, 0, 1, "try 0")
        check_number("strength", self.strength, 0, 1, "try 0.6")
        check_integer("num_images", self.num_images, 1, MAX_IMAGES, "try 4")
        check_integer("number of images in all", self.count, 1, MAX_IMAGES, "draw them in several runs")
        check_integer("seed", self.seed, 0, MAX_SEED + 1 - self.count, "try 0")
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                check_size(name, getattr(self, name), SIZE_MULTIPLE, MAX_SIDE)
        if self.guidance_interval is not None:
            interval = self.guidance_interval
            if not isinstance(interval, (tuple, list)) or len(interval) != 2:
                raise InputError(f"guidance_interval must be two noise levels, got {interval!r}; try (0.3, 5.0)")
            for value in interval:
                check_number("guidance_interval", value, 0, math.inf, "try (0.3, 5.0)")
        from latentdiff.diffusion.plan import FOREIGN, parse_sampler  # last, because it loads torch

        if not isinstance(self.sampler, str) or not self.sampler.startswith(FOREIGN):
            parse_sampler(self.sampler)

    @property
    def count(self) -> int:
        """How many images the request asks for."""
        return len(self.prompts) * self.num_images

    def record(self, index: int) -> dict[str, Any]:
        """Return, JSON-ready, the settings of image `index` alone."""
        return {
            "prompt": self.prompts[index // self.num_images],
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": int(self.num_inference_steps),
            "guidance_scale": float(self.guidance_scale),
            "guidance_rescale": float(self.guidance_rescale),
            "guidance_interval": None if self.guidance_interval is None else list(self.guidance_interval),
            "sampler": self.sampler,
            "seed": int(self.seed) + index,
            "strength": float(self.strength),
            "height": self.height,
            "width": self.width,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Settings:
        """Return the settings that `record` describes, checked like any others.

        Raises:
            InputError: a key is missing or a value cannot be used.
        """
        keys = ("num_inference_steps", "guidance_scale", "guidance_rescale", "sampler", "seed", "strength")
        needed = ("prompt", "negative_prompt", *keys, "height", "width", "guidance_interval")
        missing = [key for key in needed if key not in record]
        if missing:
            raise InputError(f"the settings must have {missing[0]!r}, got none; use a picture as latentdiff wrote it")
        interval = record["guidance_interval"]
        return cls(
            prompts=(record["prompt"],),
            negative_prompt=record["negative_prompt"],
            guidance_interval=tuple(interval) if isinstance(interval, list) else interval,
            height=record["height"],
            width=record["width"],
            **{key: record[key] for key in keys},
        )


def check_number(name: str, value: object, low: float, high: float, remedy: str) -> None:
    """Raise InputError unless `value` is a finite number within [low, high]."""
    span = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type, operator]
        raise InputError(f"{name} must be a finite number {span}, got {value!r:.80}; {remedy}")


def check_integer(name: str, value: Any, low: int, high: int, remedy: str) -> int:
    """Return `value`; raise InputError unless it is a whole number within [low, high]."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or not low <= value <= high:
        raise InputError(f"{name} must be a whole number from {low} to {high}, got {value!r:.80}; {remedy}")
    return int(value)


def check_size(name: str, value: Any, multiple: int, limit: int) -> None:
    """Raise InputError unless `value` pixels are a multiple of `multiple` up to `limit`; names the nearest that are."""
    pixels = check_integer(name, value, multiple, limit, f"choose a multiple of {multiple} up to {limit}")
    if pixels % multiple:
        below = pixels // multiple * multiple
        nearest = [str(side) for side in (below, below + multiple) if multiple <= side <= limit]
        raise InputError(f"{name} must be a multiple of {multiple}, got {pixels}; try {' or '.join(nearest)}")


def parameters_text(record: Mapping[str, Any]) -> str:
    """Return one image's settings as people read them, in the form other tools write and parse."""
    lines = [str(record["prompt"])]
    if record["negative_prompt"]:
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    pairs = {
        "Steps": record["num_inference_steps"],
        "Sampler": record["sampler"],
        "CFG scale": f"{record['guidance_scale']:g}",
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model": record["model"],
        "Model hash": record["model_hash"][:10],
    }
    if record.get("image"):
        pairs["Denoising strength"] = f"{record['strength']:g}"
    lines.append(", ".join(f"{key}: {value}" for key, value in pairs.items()) + f", Version: {record['version']}")
    return "\n".join(lines)

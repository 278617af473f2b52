"""What a picture is drawn with: every number and name of a request, its default and its check, in one place.

Python, the command line and whatever other door there is build a `Settings`; what that accepts, the pipeline can draw.
`Settings.record` is the form in which settings travel inside a PNG, and `Settings.from_record` reads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from latentdiff.errors import InputError, suggest
from latentdiff.prompts import check_prompt, check_prompts, parse_weights

__all__ = ["SIDES", "SIZE_MULTIPLE", "Settings", "check_integer", "check_number", "check_size", "parameters_text"]

MAX_SEED = 2**63 - 1
MAX_IMAGES = 1000
MAX_SIDE = 16384
SIZE_MULTIPLE = 8  # of height and width, or the autoencoder's factor where that is more
SIDES = ("left", "top", "right", "bottom")
# Settings from 0 to 1, each with a value to try.
SHARES = {
    "guidance_rescale": "try 0",
    "guidance_parallel": "try 0",
    "eta": "try 0",
    "strength": "try 0.6",
    "hires_strength": "try 0.5",
    "variation_strength": "try 0.3",
    "blend": "try 0.5",
}
# Settings that pictures drawn before there were such settings do without.
LATER = (
    *("guidance_schedule", "guidance_parallel", "guidance_limit", "eta", "resampling", "outpaint"),
    *("variation_strength", "variation_seed", "blend_prompt", "blend", "clip_skip", "noise_level", "prompt_weights"),
    *("feather", "scale", "correction", "hires", "hires_strength"),
)
CORRECTIONS = ("none", "colour", "full")


@dataclass(frozen=True)
class Settings:
    """One request, checked; the defaults are those of every door.

    Attributes:
        prompts: one or more texts; a single one may be given as it is. Empty ones are for what is drawn of an image.
        negative_prompt: what to steer away from; may be empty.
        num_inference_steps: 1 to 1000.
        guidance_scale: 0 to 50; 1 and below draw without guidance.
        guidance_rescale: 0 to 1, how far guided contrast is drawn back.
        guidance_interval: (low, high) in sigmas, guided only between them; None guides everywhere.
        guidance_schedule: how guidance changes over the steps, see `diffusion.guidance.GUIDANCE_SCHEDULES`.
        guidance_parallel: 0 to 1, how much of the guidance along the prediction itself is kept, which raises contrast
            and little else; 1 is classifier-free guidance, 0 the projected one of Sadat et al. 2024, arXiv 2410.02416.
        guidance_limit: above 0, largest length of the guidance in the latents of one image; None for no limit.
        sampler: see `latentdiff.diffusion.SAMPLERS`; "diffusers:" and a class name for a scheduler object.
        eta: 0 to 1, the noise of the sampler ddim.
        seed: of the first image; image i has seed + i.
        num_images: per prompt.
        strength: above 0, up to 1; how much of an initial image is drawn anew. 1 without one.
        resampling: 1 to 100, how often each step is taken; more than once lets what is drawn fit what is kept.
        outpaint: {"left": 16, ...}: pixels of the result, multiples of 8, that are drawn around the image.
        feather: 0 to 512, over how many pixels what is drawn passes into what is kept, beside the edge of a mask or of
            the picture that is outpainted, on the side that is drawn.
        variation_strength: 0 to 1, how far the initial noise is turned towards that of `variation_seed`.
        variation_seed: of the first image; image i has variation_seed + i, and while the strength is above 0 all have
            the same `seed`: they are variations of its picture.
        blend_prompt: a second text, to draw something between.
        blend: 0 to 1, how far each prompt's states are moved towards those of `blend_prompt`.
        clip_skip: 0 to 24, how many of the last layers of CLIP text encoders are left out.
        noise_level: 0 to 350, timesteps of noise on the small picture, where the model is one that enlarges it.
        scale: 4 or 2, how much larger than the small picture the result is; None for what the model draws.
        correction: of a picture that was enlarged by the small one: "none"; "colour", its colours are those of the
            small one; or "full", made smaller it is the small one, as suits one that is clean.
        hires: 1 to 4; above 1 a picture is drawn at its size and then, its latents made that much larger, once more.
        hires_strength: above 0, up to 1; how much of the larger latents is drawn anew.
        prompt_weights: read `(fox:1.3)` in the texts as a fox of weight 1.3, see `prompts.parse_weights`.
        height, width: pixels, multiples of 8; None for the model's own. Of the image, where it is outpainted; of what
            is drawn first, where that is made larger.

    Raises:
        InputError: a value that cannot be used, with what can.
    """

    prompts: tuple[str, ...]
    negative_prompt: str = ""
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    guidance_schedule: str = "constant"
    guidance_parallel: float = 1.0
    guidance_limit: float | None = None
    sampler: str = "euler_a"
    eta: float = 0.0
    seed: int = 0
    num_images: int = 1
    strength: float = 1.0
    resampling: int = 1
    outpaint: tuple[int, int, int, int] | None = None
    feather: int = 0
    variation_strength: float = 0.0
    variation_seed: int = 0
    blend_prompt: str = ""
    blend: float = 0.0
    clip_skip: int = 0
    noise_level: int = 20
    scale: int | None = None
    correction: str = "none"
    hires: float = 1.0
    hires_strength: float = 0.5
    prompt_weights: bool = True
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(check_prompts(self.prompts, allow_empty=True)))
        object.__setattr__(self, "outpaint", check_sides(self.outpaint))
        check_prompt(self.negative_prompt, what="negative_prompt", allow_empty=True)
        check_prompt(self.blend_prompt, what="blend_prompt", allow_empty=True)
        check_integer("num_inference_steps", self.num_inference_steps, 1, 1000, "try 25")
        check_number("guidance_scale", self.guidance_scale, 0, 50, "try 7.5")
        for name, remedy in SHARES.items():
            check_number(name, getattr(self, name), 0, 1, remedy)
        check_integer("resampling", self.resampling, 1, 100, "try 5")
        check_integer("feather", self.feather, 0, 512, "try 4")
        check_integer("clip_skip", self.clip_skip, 0, 24, "try 1")
        check_integer("noise_level", self.noise_level, 0, 350, "try 20")
        if self.scale not in (None, 2, 4) or isinstance(self.scale, bool):
            raise InputError(f"scale must be 2 or 4, got {self.scale!r:.80}; leave it out for what the model draws")
        if self.correction not in CORRECTIONS:
            raise InputError(
                f"correction {self.correction!r:.80} is unknown{suggest(str(self.correction), CORRECTIONS)}"
            )
        check_number("hires", self.hires, 1, 4, "try 2")
        if not isinstance(self.prompt_weights, bool):
            raise InputError(f"prompt_weights must be True or False, got {self.prompt_weights!r:.80}; leave it out")
        if self.prompt_weights:
            for text in (*self.prompts, self.negative_prompt, self.blend_prompt):
                parse_weights(text)
        check_integer("num_images", self.num_images, 1, MAX_IMAGES, "try 4")
        check_integer("number of images in all", self.count, 1, MAX_IMAGES, "draw them in several runs")
        for name in ("seed", "variation_seed"):
            check_integer(name, getattr(self, name), 0, MAX_SEED + 1 - self.count, "try 0")
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                check_size(name, getattr(self, name), SIZE_MULTIPLE, MAX_SIDE)
        if self.guidance_limit is not None:
            check_number("guidance_limit", self.guidance_limit, 1e-6, math.inf, "try 15")
        if self.guidance_interval is not None:
            interval = self.guidance_interval
            if not isinstance(interval, (tuple, list)) or len(interval) != 2:
                raise InputError(f"guidance_interval must be two noise levels, got {interval!r}; try (0.3, 5.0)")
            for value in interval:
                check_number("guidance_interval", value, 0, math.inf, "try (0.3, 5.0)")
        if self.blend and not self.blend_prompt:
            raise InputError(f"blend says how far to go towards blend_prompt, got {self.blend} without it; add it")
        from latentdiff.diffusion.guidance import guidance_scales  # last, because these load torch
        from latentdiff.diffusion.plan import EXTERNAL, parse_sampler

        guidance_scales([], 1.0, guidance_schedule=self.guidance_schedule)
        if not isinstance(self.sampler, str) or not self.sampler.startswith(EXTERNAL):
            parse_sampler(self.sampler)

    @property
    def count(self) -> int:
        """How many images the request asks for."""
        return len(self.prompts) * self.num_images

    def seeds(self, index: int) -> tuple[int, int]:
        """Return seed and variation seed of image `index`."""
        own = int(self.seed) if self.variation_strength else int(self.seed) + index
        return own, int(self.variation_seed) + (index if self.variation_strength else 0)

    def record(self, index: int) -> dict[str, Any]:
        """Return, JSON-ready, the settings of image `index` alone."""
        values: dict[str, Any] = {"prompt": self.prompts[index // self.num_images]}
        for item in fields(self):
            if item.name not in ("prompts", "num_images"):
                value = getattr(self, item.name)
                if isinstance(value, tuple):
                    value = list(value)
                elif value is not None and not isinstance(value, (str, bool)):
                    value = float(value) if item.type in ("float", "float | None") else int(value)
                values[item.name] = value
        values["seed"], values["variation_seed"] = self.seeds(index)
        return values

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Settings:
        """Return the settings that `record` describes, checked like any others.

        Raises:
            InputError: a key is missing or a value cannot be used.
        """
        values: dict[str, Any] = {"prompt_weights": False}  # brackets were plain text before there was such a setting
        for item in fields(cls):
            key = "prompt" if item.name == "prompts" else item.name
            if key in record:
                value = record[key]
                values[item.name] = tuple(value) if isinstance(value, list) else value
            elif item.name not in ("num_images", *LATER):
                raise InputError(f"the settings must have {key!r}, got none; use a picture as latentdiff wrote it")
        return cls(**values)


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


def check_sides(sides: Any) -> tuple[int, int, int, int] | None:
    """Return pixels to draw left, above, right and below, from names with numbers or four numbers; None for none.

    Raises:
        InputError: an unknown side, or a number that is no multiple of 8.
    """
    if sides is None:
        return None
    if isinstance(sides, Mapping):
        for name in sides:
            if name not in SIDES:
                raise InputError(f"outpaint has no side {name!r}{suggest(str(name), SIDES)}")
        sides = [sides.get(name, 0) for name in SIDES]
    if not isinstance(sides, (tuple, list)) or len(sides) != len(SIDES):
        raise InputError(f'outpaint must be sides with pixels, got {sides!r:.80}; try {{"left": 16, "right": 16}}')
    for name, value in zip(SIDES, sides):
        check_integer(f"outpaint {name}", value, 0, MAX_SIDE, "try 16")
        if value:
            check_size(f"outpaint {name}", value, SIZE_MULTIPLE, MAX_SIDE)
    if not any(sides):
        raise InputError('outpaint must add pixels on some side, got none; try {"left": 16, "right": 16}')
    left, top, right, bottom = map(int, sides)
    return left, top, right, bottom


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
        "Size": "{}x{}".format(*(record.get("size") or (record["width"], record["height"]))),
        "Model": record["model"],
        "Model hash": record["model_hash"][:10],
    }
    if record.get("loras"):
        names = [f"{Path(lora['path'] or 'unsaved').name} {lora['weight']}" for lora in record["loras"]]
        pairs["LoRA"] = json.dumps("; ".join(names))
    if record.get("image"):
        pairs["Denoising strength"] = f"{record['strength']:g}"
    if record.get("hires", 1) > 1:
        pairs["Hires upscale"] = f"{record['hires']:g}"
        pairs["Denoising strength"] = f"{record['hires_strength']:g}"
    if record.get("feather"):
        pairs["Mask blur"] = record["feather"]
    if record.get("variation_strength"):
        pairs["Variation seed"] = record["variation_seed"]
        pairs["Variation seed strength"] = f"{record['variation_strength']:g}"
    lines.append(", ".join(f"{key}: {value}" for key, value in pairs.items()) + f", Version: {record['version']}")
    return "\n".join(lines)

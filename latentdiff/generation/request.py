"""A request: every option of a generation, with its default, its check and its help, declared in one place.

Python, the command line and whatever other door there is build a `Settings`; the pipeline can draw what that accepts.
`Settings.record` is the form in which settings travel inside a PNG, and `Settings.from_record` reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, fields
from typing import Any

from latentdiff.errors import InputError, shown
from latentdiff.generation.options import (
    GENERATE,
    UPSCALE,
    check_integer,
    falling,
    flag,
    integer,
    interval,
    number,
    one_of,
    option,
    optional,
    options_of,
    parse_numbers,
    parse_pair,
    parse_sides,
    side,
    sides,
    text,
)
from latentdiff.generation.sampling_checks import LOADING_TORCH, guidance_schedule_name, sampler_name, try_plan
from latentdiff.prompts import check_prompts, parse_weights

__all__ = ["MAX_IMAGES", "Settings"]

MAX_SEED = 2**63 - 1
MAX_IMAGES = 1000


@dataclass(frozen=True)
class Settings:
    """A request, checked.

    Args:
        tried: whether the same sampling was done before, so that the checks of it, which load torch, are left out.

    Raises:
        InputError: a value that cannot be used, or values that do not go together.
    """

    prompts: tuple[str, ...]
    negative_prompt: str = option(
        "", text, "text to steer away from; may be empty", flag="--negative", metavar="TEXT", since=1
    )
    num_inference_steps: int = option(
        25,
        integer(1, 1000, "try 25"),
        "calls of the network (1 to 1000)",
        flag="--steps",
        metavar="N",
        from_model=True,
        since=1,
    )
    timesteps: tuple[float, ...] | None = option(
        None,
        optional(falling),
        "timesteps of the steps by hand, falling, in place of a number of steps",
        flag="--timesteps",
        metavar="T,T,...",
        parse=parse_numbers,
    )
    sigmas: tuple[float, ...] | None = option(
        None,
        optional(falling),
        "noise levels of the steps by hand, falling (a last 0 may be left out), in place of a number of steps",
        flag="--sigmas",
        metavar="X,X,...",
        parse=parse_numbers,
    )
    guidance_scale: float = option(
        7.5,
        number(0, 50, "try 7.5"),
        "how strictly to follow the prompt (0 to 50); 1 and below are not guided",
        flag="--guidance",
        metavar="X",
        from_model=True,
        since=1,
    )
    guidance_rescale: float = option(
        0.0,
        number(0, 1, "try 0"),
        "how far the contrast of the guided prediction is drawn back to the unguided one (0 to 1)",
        flag="--guidance-rescale",
        metavar="X",
        since=1,
    )
    guidance_interval: tuple[float, float] | None = option(
        None,
        optional(interval),
        "noise levels (sigma) between which guidance is on; everywhere by default",
        flag="--guidance-interval",
        metavar="LOW,HIGH",
        parse=parse_pair,
        since=1,
    )
    guidance_schedule: str = option(
        "constant",
        guidance_schedule_name,
        "how guidance changes over the steps: constant, cosine, linear or power",
        flag="--guidance-schedule",
        metavar="NAME",
    )
    guidance_parallel: float = option(
        1.0,
        number(0, 1, "try 0"),
        "share of the guidance along the prediction itself (0 to 1); 0 is projected guidance, arXiv 2410.02416",
        flag="--guidance-parallel",
        metavar="X",
    )
    guidance_limit: float | None = option(
        None,
        optional(number(1e-6, math.inf, "try 15")),
        "largest length of the guidance in the latents of one image; unlimited by default",
        flag="--guidance-limit",
        metavar="X",
    )
    deep_every: int = option(
        1,
        integer(1, 100, "try 2"),
        "call all levels of the U-Net at every Nth step and the finest alone between (DeepCache); 1 for always",
        flag="--deep-every",
        metavar="N",
        tasks=GENERATE,
    )
    sampler: str = option(
        "euler_a",
        sampler_name,
        "euler_a, dpmpp_2m, ddim, unipc, ...; docs/samplers.md has them all; tuned, the model's own if it has one",
        flag="--sampler",
        metavar="NAME",
        from_model=True,
        since=1,
    )
    eta: float = option(
        0.0,
        number(0, 1, "try 0"),
        "share of fresh noise of the sampler ddim (0 to 1)",
        flag="--eta",
        metavar="X",
    )
    seed: int = option(
        0,
        integer(0, MAX_SEED, "try 0"),
        "seed of the first image; image i has seed + i (default 0)",
        flag="--seed",
        metavar="N",
        since=1,
    )
    num_images: int = option(
        1, integer(1, MAX_IMAGES, "try 4"), "images of each prompt", flag="-n, --num-images", metavar="N"
    )
    strength: float = option(
        1.0,
        number(0, 1, "try 0.6"),
        "how much of the image is re-noised, above 0 and up to 1 (default 0.8; 1 with a mask or outpainting)",
        flag="--strength",
        metavar="X",
        tasks=GENERATE,
        needs=("image", "says how much of {} is drawn anew"),
        since=1,
    )
    resampling: int = option(
        1,
        integer(1, 100, "try 5"),
        "how often each step is repeated (RePaint), so that what is generated fits what is kept",
        flag="--resampling",
        metavar="N",
    )
    outpaint: tuple[int, int, int, int] | None = option(
        None,
        optional(sides),
        "pixels to generate around the image, multiples of 8",
        flag="--outpaint",
        metavar="left=N,top=N,...",
        parse=parse_sides,
        tasks=GENERATE,
        needs=("image", "says which part of {} is drawn anew"),
    )
    feather: int = option(
        0,
        integer(0, 512, "try 4"),
        "pixels over which what is generated fades into what is kept",
        flag="--feather",
        metavar="N",
        tasks=GENERATE,
        needs=("image", "says how softly what is drawn meets the rest of {}"),
    )
    variation_strength: float = option(
        0.0,
        number(0, 1, "try 0.3"),
        "how far the initial noise is turned towards that of the variation seed (0 to 1)",
        flag="--variation-strength",
        metavar="X",
    )
    variation_seed: int = option(
        0,
        integer(0, MAX_SEED, "try 0"),
        "seed of the first variation; image i has this + i, and all are variations of the image of --seed",
        flag="--variation-seed",
        metavar="N",
    )
    blend_prompt: str = option(
        "", text, "second text, for something between the two", flag="--blend-prompt", metavar="TEXT"
    )
    blend: float = option(
        0.0,
        number(0, 1, "try 0.5"),
        "how far towards the second text (0 to 1)",
        flag="--blend",
        metavar="X",
    )
    clip_skip: int = option(
        0,
        integer(0, 24, "try 1"),
        "last layers of a CLIP text encoder to leave out (0 to 24)",
        flag="--clip-skip",
        metavar="N",
    )
    noise_level: int = option(
        20,
        integer(0, 350, "try 20"),
        "timesteps of noise on the small picture (0 to 350); more invents more (default 20)",
        flag="--noise-level",
        metavar="N",
        tasks=UPSCALE,
    )
    scale: int | None = option(
        None,
        optional(one_of((2, 4), "leave it out for what the model draws")),
        "how many times larger the result is: 4 (default), or 2, the same reduced by half",
        flag="--scale",
        metavar="N",
        tasks=UPSCALE,
    )
    correction: str = option(
        "none",
        one_of(("none", "colour", "full")),
        "what the result must keep of the small picture: its colours (colour), all of it (full), or none",
        flag="--correction",
        metavar="NAME",
        tasks=UPSCALE,
        from_model=True,
    )
    hires: float = option(
        1.0,
        number(1, 4, "try 2"),
        "two passes: generate, then enlarge the latents so many times (1 to 4) and generate again from them",
        flag="--hires",
        metavar="X",
        tasks=GENERATE,
    )
    hires_strength: float = option(
        0.5,
        number(0, 1, "try 0.5"),
        "how much is re-noised in the second pass, above 0 and up to 1 (default 0.5)",
        flag="--hires-strength",
        metavar="X",
        tasks=GENERATE,
        needs=("hires", "says how much is drawn anew in the second pass of {}"),
    )
    prompt_weights: bool = option(
        True,
        flag,
        "read (fox:1.3) in the texts as a fox of weight 1.3; without it brackets are plain text",
        flag="--prompt-weights",
    )
    height: int | None = option(None, optional(side), "pixels, a multiple of 8; the model's own by default", since=1)
    width: int | None = option(None, optional(side), "pixels, a multiple of 8; the model's own by default", since=1)
    tried: InitVar[bool] = False

    def __post_init__(self, tried: bool) -> None:
        object.__setattr__(self, "prompts", tuple(check_prompts(self.prompts, allow_empty=True)))
        for name, declared in options_of(self).items():  # those whose check loads torch last
            if declared.check not in LOADING_TORCH:
                object.__setattr__(self, name, declared.check(name, getattr(self, name)))
        self._check_together()
        if tried:
            return
        guidance_schedule_name("guidance_schedule", self.guidance_schedule)
        sampler_name("sampler", self.sampler)
        self._check_plan()

    def _check_together(self) -> None:
        self._count_levels()
        check_integer("number of images in all", self.count, 1, MAX_IMAGES, "generate them in several runs")
        for name in ("seed", "variation_seed"):
            check_integer(name, getattr(self, name), 0, MAX_SEED + 1 - self.count, "try 0")
        if self.prompt_weights:
            for one in (*self.prompts, self.negative_prompt, self.blend_prompt):
                parse_weights(one)
        if self.blend and not self.blend_prompt:
            raise InputError(f"blend says how far to go towards blend_prompt, got {self.blend} without it; add it")

    def _count_levels(self) -> None:
        """Set the number of steps to that of the timesteps or noise levels given by hand."""
        if self.levels_given is None:
            return
        if self.timesteps is not None and self.sigmas is not None:
            raise InputError("timesteps and sigmas both say where the steps are, got both; leave one of them out")
        count = len(self.timesteps or ()) + len([sigma for sigma in self.sigmas or () if sigma > 0])
        if not count:
            raise InputError("sigmas must start above 0, got 0 alone; leave it out for even steps")
        if self.num_inference_steps not in (count, type(self).num_inference_steps):
            raise InputError(
                f"{self.levels_given} are {count} steps, got num_inference_steps {self.num_inference_steps} besides; "
                "leave one of them out"
            )
        object.__setattr__(self, "num_inference_steps", count)

    @property
    def levels_given(self) -> str | None:
        """The option that says by hand where the steps are; None where they are spaced."""
        return next((name for name in ("timesteps", "sigmas") if getattr(self, name) is not None), None)

    @property
    def levels(self) -> dict[str, Any]:
        """Where the steps are, as an argument of `make_plan`."""
        name = self.levels_given or "num_inference_steps"
        return {name: getattr(self, name)}

    def _check_plan(self) -> None:
        """Refuse what no table can be made of, whatever the model: eta without ddim, too many steps of lcm, ..."""
        for strength in (self.strength, self.hires_strength) if self.hires > 1 else (self.strength,):
            try_plan(self.sampler, self.num_inference_steps, self.levels_given, strength, self.eta, self.resampling)

    @property
    def count(self) -> int:
        """How many images the request asks for."""
        return len(self.prompts) * self.num_images

    def prompt(self, index: int) -> str:
        """Return the prompt of image `index`."""
        return self.prompts[index // self.num_images]

    def seeds(self, index: int) -> tuple[int, int]:
        """Return seed and variation seed of image `index`."""
        own = self.seed if self.variation_strength else self.seed + index
        return own, self.variation_seed + (index if self.variation_strength else 0)

    def record(self, index: int) -> dict[str, Any]:
        """Return, JSON-ready, the settings of image `index` alone."""
        values: dict[str, Any] = {"prompt": self.prompt(index)}
        for name in options_of(self):
            if name != "num_images":
                value = getattr(self, name)
                values[name] = list(value) if isinstance(value, tuple) else value
        values["seed"], values["variation_seed"] = self.seeds(index)
        return values

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Settings:
        """Return the settings that `record` describes, checked like any others.

        Raises:
            InputError: a key is missing or a value cannot be used.
        """
        if not isinstance(record.get("prompt"), str):
            got = shown(record["prompt"]) if "prompt" in record else "none"
            raise InputError(f"the settings must have a text 'prompt', got {got}; use a picture as latentdiff wrote it")
        values: dict[str, Any] = {"prompts": record["prompt"], "prompt_weights": False}  # brackets were plain text once
        for name, declared in options_of(cls).items():
            if name in record:
                value = record[name]
                values[name] = tuple(value) if isinstance(value, list) else value
            elif declared.since == 1:
                raise InputError(f"the settings must have {name!r}, got none; use a picture as latentdiff wrote it")
        return cls(**values)

    def check_task(self, task: str, factor: int) -> None:
        """Raise InputError where an option is used that is not for models of a task.

        Args:
            task: see `checkpoints.Components.task`.
            factor: how many times larger an upscaling model makes a picture along each side.
        """
        for item in fields(self):
            declared = item.metadata.get("option")
            if declared is None or task in declared.tasks or getattr(self, item.name) == item.default:
                continue
            if task == "upscale":
                raise InputError(f"this model draws a picture {factor} times as large, got {item.name}; leave it out")
            raise InputError(
                f"{item.name} is for models that enlarge a picture, got another; use embedded-upscale, or leave it out"
            )

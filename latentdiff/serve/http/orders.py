"""What a request asks of the scheduler, whatever door it came through: one set of checks, one form."""

from __future__ import annotations

import base64
import binascii
import math
import secrets
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from latentdiff.errors import shown, suggest
from latentdiff.generation.inputs import MAX_SCALE
from latentdiff.generation.options import SIZE_MULTIPLE, options_of
from latentdiff.generation.request import Settings
from latentdiff.images import decode_rgba, image_size
from latentdiff.marks import COMPOSITE, GENERATED, mark, source_type_of
from latentdiff.pipeline import DEFAULT_STRENGTH, Pipeline
from latentdiff.serve.http.errors import ApiError
from latentdiff.serve.http.fields import Extensions
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.models import Models

__all__ = ["Order", "Remarks", "decoded", "finished", "fitting_size", "from_base64", "usual_steps"]

MAX_RANDOM_SEED = 2**32  # which every client's numbers hold


@dataclass(frozen=True)
class Order:
    """A request that can be handed in.

    Attributes:
        model, pipe: what draws it.
        options: for `Scheduler.submit`, prompt and pictures included.
        steps: of a picture, about.
        preview_every: steps between previews; 0 for none.
        priority, deadline: see `Scheduler.submit`; without a deadline there is that of the server.
    """

    model: str
    pipe: Pipeline = field(repr=False)
    options: dict[str, Any] = field(repr=False)
    steps: int
    preview_every: int
    priority: int = 0
    deadline: float | None = None


@dataclass(frozen=True)
class Remarks:
    """What the answer says of a request.

    Attributes:
        ignored: names of fields that were ignored.
        mapped: what a field was taken for, where that is not what it says.
    """

    ignored: list[str] = field(default_factory=list)
    mapped: list[str] = field(default_factory=list)

    @property
    def headers(self) -> dict[str, str]:
        """Say it in headers."""
        said = {"x-latentdiff-ignored": self.ignored, "x-latentdiff-mapped": self.mapped}
        return {name: _header(", ".join(dict.fromkeys(texts))) for name, texts in said.items() if texts}


def _header(text: str) -> str:
    """Return a text that a header can hold: without other characters than ASCII's, and no space at its ends."""
    return ascii(text[:1000])[1:-1].strip()


def finished(
    model: str,
    options: dict[str, Any],
    models: Models,
    limits: Limits,
    *,
    extensions: Extensions | None = None,
    n: str = "n",
    previews: int = 0,
) -> Order:
    """Return an order, checked as far as that needs no model to run, with its LoRAs and a seed.

    Args:
        model: its name.
        options: for `Scheduler.submit`.
        models: that are served.
        limits: of requests.
        extensions: that were asked for.
        n: what the door calls the number of pictures.
        previews: of each picture.

    Raises:
        ApiError, InputError: something that cannot be used, or is too much.
    """
    limits.check("n", options.get("num_images", 1), n)
    asked = extensions or Extensions()
    if asked.deadline is not None and asked.deadline > limits.seconds:
        message = f"deadline must be within {limits.seconds} seconds, got {shown(asked.deadline)}; leave it out"
        raise ApiError(400, message, "invalid_value", "deadline")
    prompt, pipe = models.with_loras(model, f"{options.get('prompt', '')}{_lora_tags(asked.lora, models)}")
    complete = {"seed": secrets.randbelow(MAX_RANDOM_SEED), **options, "prompt": prompt}
    given = complete.get("timesteps") or complete.get("sigmas")
    steps = complete.get("num_inference_steps", usual_steps(pipe))
    steps = int(steps) if given is None else len(given) if isinstance(given, tuple) else 1
    _check_work(complete, steps, pipe, limits)
    taken = max(1, round(steps * _share(complete)))
    every = max(1, taken // (previews + 1)) if previews else 0
    return Order(model, pipe, complete, taken, every, asked.priority, asked.deadline)


def _lora_tags(given: dict[str, float] | list[str] | str | None, models: Models) -> str:
    """Return what a prompt says to have the LoRAs of a field.

    Raises:
        ApiError: there is no such LoRA.
    """
    if isinstance(given, str):
        given = [part.strip() for part in given.split(",") if part.strip()]
    if not given:
        return ""
    parts = [f"{name}:{weight}" for name, weight in given.items()] if isinstance(given, dict) else given
    files, tags = models.loras.files(), list[str]()
    for part in parts:
        name, _, weight = part.partition(":")
        if name not in files or {*name} & {*"<>:"}:  # which no prompt can name
            remedy = suggest(name[:80], files) or "; start the server with --lora-dir"
            raise ApiError(400, f"there is no LoRA {shown(name)} here{remedy}", "invalid_value", "lora")
        tags.append(f" <lora:{name}:{weight or 1}>")
    return "".join(tags)


def usual_steps(pipe: Pipeline) -> int:
    """Return how many steps a model takes unless it is told."""
    return int(pipe.components.defaults.get("num_inference_steps", Settings.num_inference_steps))


def _share(options: dict[str, Any]) -> float:
    """Return which share of the steps is taken: those of an image that is changed start in between."""
    whole = options.get("image") is None or options.get("mask") is not None or "outpaint" in options
    return float(options.get("strength", 1.0 if whole else DEFAULT_STRENGTH))


def _check_work(options: dict[str, Any], steps: int, pipe: Pipeline, limits: Limits) -> None:
    """Refuse pictures that are too large, or take too many steps."""
    for name in ("hires", "resampling", "strength"):  # which multiply both, so they must be numbers that can be used
        if name in options:
            options_of(Settings)[name].check(name, options[name])
    limits.check("steps", steps * options.get("resampling", 1), "steps")
    height, width = pipe.native_size
    width, height = options.get("width", width), options.get("height", height)
    larger, image = options.get("hires", 1.0), options.get("image")
    if pipe.components.upscales and image is not None:
        width, height = image.size
        larger = pipe.components.autoencoder.config.downsample_factor
    limits.check("pixels", width * height * larger**2, "size")


def fitting_size(size: tuple[int, int], pipe: Pipeline) -> tuple[int, int]:
    """Return the nearest width and height that a model draws; of what is too large, its own area in that shape."""
    height, width = pipe.native_size
    multiple = math.lcm(SIZE_MULTIPLE, pipe.components.autoencoder.config.downsample_factor)
    small = size[0] <= width * MAX_SCALE and size[1] <= height * MAX_SCALE
    scale = 1.0 if small else math.sqrt(width * height / (size[0] * size[1]))
    return max(1, round(size[0] * scale / multiple)) * multiple, max(1, round(size[1] * scale / multiple)) * multiple


def decoded(data: bytes, name: str, limits: Limits) -> Image.Image:
    """Return an uploaded picture, without whatever its file says of itself but that a model made it.

    Raises:
        ApiError, InputError: it is too large, or no picture.
    """
    limits.check("image_bytes", len(data), name)
    width, height = image_size(data, name)
    limits.check("image_pixels", width * height, name)
    image = decode_rgba(data, name)
    source = source_type_of(image)
    image.info = {"xmp": mark(source)} if source in (GENERATED, COMPOSITE) else {}
    return image


def from_base64(text: object, name: str) -> bytes:
    """Return the bytes of a file that came as base64, with `data:...;base64,` before it or without.

    Raises:
        ApiError: it is none.
    """
    if isinstance(text, str):
        head, comma, rest = text.partition(",")
        plain = rest if comma and head.startswith("data:") and head.endswith(";base64") else text
        try:
            return base64.b64decode("".join(plain.split()), validate=True)
        except (binascii.Error, ValueError):
            pass
    raise ApiError(400, f"{name} must be a picture in base64; no address is ever fetched", "no_file", name)

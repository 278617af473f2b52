"""One call of a pipeline: text to context, context and noise to latents, latents to pixels."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from latentdiff import __version__
from latentdiff.checkpoints import Parts
from latentdiff.diffusion import (
    Call,
    Known,
    Plan,
    SchedulerPlan,
    Step,
    as_denoiser,
    classifier_free,
    draw_noise,
    guidance_scales,
    image_generator,
    make_plan,
    sample,
    start,
)
from latentdiff.diffusion.prediction import Network
from latentdiff.errors import InputError
from latentdiff.images import fit, from_tensor, open_image, pixel_hash, to_rgb, to_tensor, to_unit_range
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.text import encode_prompts
from latentdiff.result import Result
from latentdiff.settings import SIZE_MULTIPLE, Settings, check_size

__all__ = ["OUTPUT_TYPES", "Callback", "Drawing", "device_of", "dtype_of", "native_size"]

MAX_SCALE = 4  # sides of up to this many times the model's own are drawn

# images (B, 3, H, W) in [-1, 1] -> what `Result.images` is; "latent" skips the autoencoder.
OUTPUT_TYPES: dict[str, Callable[[Tensor], Any]] = {
    "pil": from_tensor,
    "pt": to_unit_range,
    "np": lambda images: to_unit_range(images).permute(0, 2, 3, 1).cpu().numpy(),
    "latent": lambda latents: latents,
}

# (steps done, steps in all, newest estimate of the batch's clean latents (b, C, h, w)) -> None
Callback = Callable[[int, int, Tensor], None]


class Drawing:
    """One call of a pipeline: everything that is computed once, and the sampling of one batch of its images.

    Args:
        parts: of the model; `unet` is not None.
        settings: of the call.
        image, mask: see `Pipeline.__call__`.
        noise: standard normal noise to start from instead of that of the seeds, or None.
        scheduler: of diffusers, or None for the sampler of the settings.
    """

    def __init__(
        self, parts: Parts, settings: Settings, image: Any, mask: Any, noise: Tensor | None, scheduler: Any
    ) -> None:
        assert parts.unet is not None
        self.parts, self.unet, self.autoencoder = parts, parts.unet, parts.autoencoder
        self.device, self.dtype = device_of(parts), dtype_of(parts)
        self.noise, self.notes = noise, list[str]()
        picture = _open(image, "image")
        height, width = self._size(settings, picture)
        self.settings = settings = replace(settings, height=height, width=width)
        factor = parts.autoencoder.config.downsample_factor
        self.shape = (parts.autoencoder.config.latent_channels, height // factor, width // factor)
        if noise is not None and noise.shape != (settings.count, *self.shape):
            expected = (settings.count, *self.shape)
            raise InputError(f"latents must have shape {expected}, got {tuple(noise.shape)}; one for each image")
        if noise is not None and not torch.isfinite(noise).all():
            raise InputError("latents must be finite, got NaN or infinity; pass standard normal noise")
        steps, strength = settings.num_inference_steps, settings.strength
        self.plan: Plan | SchedulerPlan = (
            make_plan(parts.schedule, settings.sampler, steps, strength=strength)
            if scheduler is None
            else SchedulerPlan(scheduler, parts.schedule, steps, strength)
        )
        scales = guidance_scales(self.plan.sigmas, settings.guidance_scale, settings.guidance_interval)
        self.scales: list[float] = scales.tolist()
        encoded = {
            text: encode_prompts([text], parts.text_encoder, parts.tokenizer)
            for text in dict.fromkeys(["", settings.negative_prompt, *settings.prompts])
        }
        self.windows = {text: states[0] for text, (states, _) in encoded.items()}  # each (n, L, D)
        self.counts = {text: counts[0] for text, (_, counts) in encoded.items()}
        self.given: dict[str, Any] = {"image": None, "mask": None}
        self.pixels: Tensor | None = None  # of the image, (1, 3, H, W)
        self.image_latents: Tensor | None = None
        self.mask: Tensor | None = None  # (1, 1, H, W), 1 where the picture is drawn
        if picture is not None:
            self.pixels = to_tensor([fit(picture, width, height)]).to(self.device)
            latents = self._finite(lambda model, x: model.encode(x).mode(), self.pixels)  # (1, C, h, w)
            self.image_latents = latents * parts.autoencoder.config.scaling_factor
            self.given["image"] = _trace(image, picture)
        opened = _open(mask, "mask")
        if opened is not None:
            self.mask = self._mask(opened, picture, scheduler).to(self.device)
            self.given["mask"] = _trace(mask, opened)

    def draw(self, output_type: str, batch_size: int, callback: Callback | None, progress: bool) -> Result:
        """Return all images."""
        batches = self.batches(batch_size)
        drawn: list[Tensor] = []
        with _counted_steps(len(self.plan) * len(batches), callback, progress) as on_step:
            for batch in batches:
                latents = self.sample(batch, on_step).split(1)
                # Decoded one by one, because a decoder needs far more memory than a U-Net.
                drawn += latents if output_type == "latent" else map(self.decode, latents)
        for note in self.notes:
            warnings.warn(note, RuntimeWarning, stacklevel=4)  # shown at the line that called the pipeline
        return self.result(OUTPUT_TYPES[output_type](torch.cat(drawn)), batches)

    def batches(self, batch_size: int) -> list[list[int]]:
        """Return the numbers of the images to draw together: as many as allowed, all with equally many text windows."""
        runs = [list(run) for _, run in groupby(range(self.settings.count), key=self._window_count)]
        return [run[start : start + batch_size] for run in runs for start in range(0, len(run), batch_size)]

    def sample(self, images: Sequence[int], on_step: Callable[[Step], None]) -> Tensor:
        """Return the scaled latents (b, C, h, w) float32 of some of the images.

        Raises:
            InputError: the U-Net overflowed.
        """
        generators = [image_generator(self.settings.seed + index) for index in images]
        noise = draw_noise(generators, self.shape) if self.noise is None else self.noise[list(images)]
        noise = noise.to(self.device, torch.float32)
        latents = None if self.image_latents is None else self.image_latents.expand_as(noise)
        network = self._network(images)
        if isinstance(self.plan, SchedulerPlan):
            steps = self.plan.run(network, noise, generators, latents)
        else:
            denoise = as_denoiser(network, self.parts.schedule.prediction_type)
            x, known = start(self.plan, noise, latents), None
            if self.mask is not None and latents is not None:
                factor = self.autoencoder.config.downsample_factor
                mask = F.max_pool2d(self.mask, factor).expand(len(noise), -1, -1, -1)  # (b, 1, h, w)
                known = Known(mask, latents)
                if self.settings.strength == 1:  # nothing of the image is left where it is drawn anew
                    x = torch.lerp(x, start(self.plan, noise), mask)
            steps = sample(denoise, self.plan, x, generators, known)
        for step in steps:
            on_step(step)
        return step.x

    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W) float32 of scaled latents; where nothing is drawn, the pixels of the image."""
        scaling_factor = self.autoencoder.config.scaling_factor
        images = self._finite(lambda model, x: model.decode(x), latents / scaling_factor)
        return images if self.mask is None or self.pixels is None else torch.lerp(self.pixels, images, self.mask)

    def _finite(self, run: Callable[[AutoencoderKL, Tensor], Tensor], x: Tensor) -> Tensor:
        """Run the autoencoder, once more in float32 where its own dtype overflows, and note that."""
        autoencoder, dtype = self.autoencoder, self.dtype
        output = run(autoencoder, x.to(dtype)).float()
        if torch.isfinite(output).all():
            return output
        output = run(copy.deepcopy(autoencoder).float(), x.float())
        if not torch.isfinite(output).all():
            raise InputError("the autoencoder overflowed even in float32; use a lower guidance_scale or another model")
        self.notes.append(f"the autoencoder overflowed in {dtype} and was run again in float32")
        return output

    def result(self, pictures: Any, batches: list[list[int]]) -> Result:
        """Return the pictures with everything that makes each of them again, to the bit on the same machine."""
        places = {index: (len(batch), row) for batch in batches for row, index in enumerate(batch)}
        records = [self.settings.record(index) for index in range(self.settings.count)]
        own = [{key: record.pop(key) for key in ("prompt", "seed")} for record in records]
        for index, one in enumerate(own):
            one["batch_size"], one["batch_index"] = places[index]
        made_with = {
            **self.given,
            "latents_given": self.noise is not None,
            "model": self.parts.name,
            "model_hash": self.parts.model_hash,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "version": __version__,
        }
        return Result(
            images=pictures,
            seeds=[one["seed"] for one in own],
            settings=records[0] | made_with,
            own=own,
            token_counts=[self.counts[one["prompt"]] for one in own],
            notes=self.notes,
        )

    def _network(self, images: Sequence[int]) -> Network:
        """Return the guided network for a batch of images, text and time computed once."""
        count = len(images)
        wanted = self._window_count(images[0])
        positive = [self._context(self._prompt(index), wanted) for index in images]
        negative = [self._context(self.settings.negative_prompt, wanted)] * count
        context = torch.stack([*negative, *positive])  # (2b, n * L, D)
        prepared = self.unet.prepare(self.plan.timesteps.to(self.device, torch.float32), context)
        unguided = prepared.rows(slice(count, 2 * count))

        def network(model_input: Tensor, call: Call) -> Tensor:
            scale, inputs = self.scales[call.index], model_input.to(self.dtype)
            if scale == 1:
                return unguided(inputs, call.rows).float()
            both = prepared(torch.cat([inputs, inputs]), call.rows.repeat(2)).float()  # (2b, C, h, w)
            unconditional, conditional = both.chunk(2)
            return classifier_free(conditional, unconditional, scale, self.settings.guidance_rescale)

        return network

    def _prompt(self, index: int) -> str:
        return self.settings.prompts[index // self.settings.num_images]

    def _window_count(self, index: int) -> int:
        """Return how many text windows an image needs: as many as the longer of its two prompts."""
        return max(len(self.windows[self._prompt(index)]), len(self.windows[self.settings.negative_prompt]))

    def _context(self, text: str, wanted: int) -> Tensor:
        """Return the text states (wanted * L, D) of a text, filled up with windows of the empty one."""
        windows = self.windows[text]
        return torch.cat([windows, *[self.windows[""]] * (wanted - len(windows))]).flatten(0, 1)

    def _size(self, settings: Settings, picture: Image.Image | None) -> tuple[int, int]:
        """Return height and width in pixels: as asked for, else the shape of the picture at the model's own area."""
        native = native_size(self.parts)
        multiple = math.lcm(SIZE_MULTIPLE, self.autoencoder.config.downsample_factor)
        height, width = native
        if picture is not None and settings.height is None and settings.width is None:
            scale = math.sqrt(native[0] * native[1] / (picture.width * picture.height))
            sides = (picture.height * scale, picture.width * scale)
            limits = (native[0] * MAX_SCALE, native[1] * MAX_SCALE)
            height, width = (
                min(max(round(side / multiple), 1) * multiple, limit) for side, limit in zip(sides, limits)
            )
        height, width = settings.height or height, settings.width or width
        check_size("height", height, multiple, native[0] * MAX_SCALE)
        check_size("width", width, multiple, native[1] * MAX_SCALE)
        return height, width

    def _mask(self, mask: Image.Image, picture: Image.Image | None, scheduler: Any) -> Tensor:
        """Return a mask as (1, 1, H, W) in [0, 1], scaled and cut as the image is."""
        if picture is None:
            raise InputError("a mask says which part of an image is drawn anew, got no image; pass an image too")
        if scheduler is not None:
            raise InputError("a mask needs one of our samplers, got a scheduler object; pass its name instead")
        if mask.size != picture.size:
            sizes = [f"{one.width}x{one.height}" for one in (picture, mask)]
            raise InputError(f"the mask must have the size of the image, {sizes[0]}, got {sizes[1]}; scale it first")
        low, high = mask.convert("L").getextrema()
        if high < 128:  # type: ignore[operator]  # one band
            raise InputError("the mask is black everywhere, so nothing would be drawn; paint white what is to be")
        if low > 127:  # type: ignore[operator]
            raise InputError("the mask is white everywhere, so nothing of the image is kept; leave image and mask out")
        fitted = fit(mask, self.settings.width or 0, self.settings.height or 0)
        return to_unit_range(to_tensor([fitted])).mean(dim=1, keepdim=True)


def device_of(parts: Parts) -> torch.device:
    """Return where the networks of a model are."""
    assert parts.unet is not None
    return parts.unet.conv_in.weight.device


def dtype_of(parts: Parts) -> torch.dtype:
    """Return what the networks of a model compute in."""
    assert parts.unet is not None
    return parts.unet.conv_in.weight.dtype


def native_size(parts: Parts) -> tuple[int, int]:
    """Return height and width, in pixels, that a model was trained at."""
    assert parts.unet is not None
    side, factor = parts.unet.config.sample_size or 64, parts.autoencoder.config.downsample_factor
    height, width = side if isinstance(side, tuple) else (side, side)
    return height * factor, width * factor


@contextmanager
def _counted_steps(total: int, callback: Callback | None, progress: bool) -> Iterator[Callable[[Step], None]]:
    """Yield what is called after each step; it moves the bar and calls the callback."""
    done = 0
    with tqdm(total=total, unit="step", leave=False, disable=not progress) as bar:

        def on_step(step: Step) -> None:
            nonlocal done
            done += 1
            bar.update()
            if callback is not None:
                callback(done, total, step.denoised)

        yield on_step


def _trace(given: Any, picture: Image.Image) -> dict[str, Any]:
    """Return what a record keeps of a picture that was passed in: its path, where it has one, and the hash of it."""
    return {"path": None if isinstance(given, Image.Image) else os.fspath(given), "hash": pixel_hash(picture)}


def _open(image: object, name: str) -> Image.Image | None:
    if image is None:
        return None
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, (str, os.PathLike)):
        return open_image(image)
    raise InputError(f"{name} must be a PIL image or a path, got {type(image).__name__}; convert it first")

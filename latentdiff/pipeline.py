"""From prompt to pixels. Text-to-image and image-to-image differ only in what is passed in.

    pipe = Pipeline.from_pretrained()
    pipe("a red fox", seed=7).save("fox.png")

A pipeline keeps no state between calls, so threads may share one.
"""

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
from tqdm import tqdm

from latentdiff import __version__
from latentdiff.checkpoints import Parts, load_pipeline
from latentdiff.devices import resolve_device, resolve_dtype
from latentdiff.diffusion import (
    Call,
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
from latentdiff.errors import InputError, suggest
from latentdiff.images import fit, from_tensor, open_image, pixel_hash, to_rgb, to_tensor, to_unit_range
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.text import encode_prompts
from latentdiff.models.unet import UNet2DConditionModel
from latentdiff.result import Result
from latentdiff.settings import FOREIGN, SIZE_MULTIPLE, Settings, check_integer, check_size

__all__ = ["OUTPUT_TYPES", "Callback", "Pipeline"]

DEFAULT_STRENGTH = 0.8
BATCH_SIZE = 4
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


class Pipeline:
    """A text-to-image model, ready to draw.

    Args:
        parts: see `latentdiff.checkpoints.load_pipeline`; they stay on the device and in the dtype they have.
    """

    def __init__(self, parts: Parts) -> None:
        if parts.unet is None:
            raise InputError("a pipeline needs a U-Net, got none; pass all parts")
        self.parts = parts
        self.unet: UNet2DConditionModel = parts.unet
        self.autoencoder = parts.autoencoder
        self.text_encoder = parts.text_encoder

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> Pipeline:
        """Load a model.

        Args:
            model: folder in diffusers' layout; None for the model that comes with the package.
            device: "cpu", "cuda", "cuda:1", "mps"; None or "auto" for the fastest there is.
            dtype: "float32" (unless given), "float16" or "bfloat16".

        Raises:
            InputError: there is no such folder, device or dtype.
            ModelLoadError: the model was refused; the subclass says why.
        """
        return cls(load_pipeline(model, resolve_dtype(dtype), resolve_device(device)))

    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Pipeline:
        """Move the networks to a device, cast them, or both, in place; None leaves that as it is."""
        place = self.device if device is None else resolve_device(device)
        kind = self.dtype if dtype is None else resolve_dtype(dtype)
        for network in (self.unet, self.autoencoder, self.text_encoder):
            network.to(place, kind)
        return self

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in; the arithmetic between their calls is always float32."""
        return self.unet.conv_in.weight.dtype

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width, in pixels, that the model was trained at."""
        side, factor = self.unet.config.sample_size or 64, self.autoencoder.config.downsample_factor
        height, width = side if isinstance(side, tuple) else (side, side)
        return height * factor, width * factor

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = Settings.negative_prompt,
        image: str | os.PathLike[str] | Image.Image | None = None,
        strength: float | None = None,
        num_inference_steps: int = Settings.num_inference_steps,
        guidance_scale: float = Settings.guidance_scale,
        guidance_rescale: float = Settings.guidance_rescale,
        guidance_interval: tuple[float, float] | None = Settings.guidance_interval,
        sampler: Any = Settings.sampler,
        seed: int = Settings.seed,
        num_images: int = Settings.num_images,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback: Callback | None = None,
        progress: bool = False,
        batch_size: int = BATCH_SIZE,
    ) -> Result:
        """Draw `num_images` pictures of each prompt; image i, counted over all prompts, has seed + i.

        Args, besides those of `Settings`:
            image: a picture, or its path, to start from; it is scaled to cover the size and cut evenly. Without height
                and width the result has its shape and the model's own area. `strength` is then 0.8 unless given.
            sampler: a name, or any scheduler object of diffusers; pictures of those cannot be replayed.
            latents: standard normal noise (B, C, h, w) to start from instead of that of the seeds.
            output_type: "pil", "pt", "np" or "latent"; see `Result.images`.
            callback: called after each step, see `Callback`; what it raises ends the call.
            progress: show a bar on stderr.
            batch_size: how many images are drawn at once at most.

        Raises:
            InputError: something that cannot be used, with what can.
        """
        check_integer("batch_size", batch_size, 1, 1024, f"try {BATCH_SIZE}")
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type {output_type!r} is unknown{suggest(str(output_type), OUTPUT_TYPES)}")
        settings = Settings(
            prompts=prompt,  # type: ignore[arg-type]  # checked and made a tuple there
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            sampler=sampler if isinstance(sampler, str) else FOREIGN + type(sampler).__name__,
            seed=seed,
            num_images=num_images,
            strength=_strength(strength, image),
            height=height,
            width=width,
        )
        scheduler = None if isinstance(sampler, str) else sampler
        return _Drawing(self, settings, image, latents, scheduler).draw(output_type, batch_size, callback, progress)


class _Drawing:
    """One call of a pipeline: everything that is computed once, and the sampling of one batch of its images."""

    def __init__(self, pipe: Pipeline, settings: Settings, image: Any, noise: Tensor | None, scheduler: Any) -> None:
        self.pipe, self.noise, self.notes = pipe, noise, list[str]()
        picture = _open(image)
        height, width = self._size(settings, picture)
        self.settings = settings = replace(settings, height=height, width=width)
        factor = pipe.autoencoder.config.downsample_factor
        self.shape = (pipe.autoencoder.config.latent_channels, height // factor, width // factor)
        if noise is not None and noise.shape != (settings.count, *self.shape):
            expected = (settings.count, *self.shape)
            raise InputError(f"latents must have shape {expected}, got {tuple(noise.shape)}; one for each image")
        if noise is not None and not torch.isfinite(noise).all():
            raise InputError("latents must be finite, got NaN or infinity; pass standard normal noise")
        schedule = pipe.parts.schedule
        steps, strength = settings.num_inference_steps, settings.strength
        self.plan: Plan | SchedulerPlan = (
            make_plan(schedule, settings.sampler, steps, strength=strength)
            if scheduler is None
            else SchedulerPlan(scheduler, schedule, steps, strength)
        )
        scales = guidance_scales(self.plan.sigmas, settings.guidance_scale, settings.guidance_interval)
        self.scales: list[float] = scales.tolist()
        encoded = {
            text: encode_prompts([text], pipe.text_encoder, pipe.parts.tokenizer)
            for text in dict.fromkeys(["", settings.negative_prompt, *settings.prompts])
        }
        self.windows = {text: states[0] for text, (states, _) in encoded.items()}  # each (n, L, D)
        self.counts = {text: counts[0] for text, (_, counts) in encoded.items()}
        self.image_latents, self.picture = None, None
        if picture is not None:
            pixels = to_tensor([fit(picture, width, height)]).to(pipe.device)
            latents = self._finite(lambda model, x: model.encode(x).mode(), pixels)  # (1, C, h, w)
            self.image_latents = latents * pipe.autoencoder.config.scaling_factor
            path = None if isinstance(image, Image.Image) else os.fspath(image)
            self.picture = {"path": path, "hash": pixel_hash(picture)}

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
        pipe = self.pipe
        generators = [image_generator(self.settings.seed + index) for index in images]
        noise = draw_noise(generators, self.shape) if self.noise is None else self.noise[list(images)]
        noise = noise.to(pipe.device, torch.float32)
        latents = None if self.image_latents is None else self.image_latents.expand_as(noise)
        network = self._network(images)
        if isinstance(self.plan, SchedulerPlan):
            steps = self.plan.run(network, noise, generators, latents)
        else:
            denoise = as_denoiser(network, pipe.parts.schedule.prediction_type)
            steps = sample(denoise, self.plan, start(self.plan, noise, latents), generators)
        for step in steps:
            on_step(step)
        x = step.x
        if not torch.isfinite(x).all():
            raise InputError(f"the U-Net overflowed in {pipe.dtype}; use dtype float32 or a lower guidance_scale")
        return x

    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W) float32 of scaled latents."""
        return self._finite(lambda model, x: model.decode(x), latents / self.pipe.autoencoder.config.scaling_factor)

    def _finite(self, run: Callable[[AutoencoderKL, Tensor], Tensor], x: Tensor) -> Tensor:
        """Run the autoencoder, once more in float32 where its own dtype overflows, and note that."""
        autoencoder, dtype = self.pipe.autoencoder, self.pipe.dtype
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
        pipe = self.pipe
        places = {index: (len(batch), row) for batch in batches for row, index in enumerate(batch)}
        records = [self.settings.record(index) for index in range(self.settings.count)]
        own = [{key: record.pop(key) for key in ("prompt", "seed")} for record in records]
        for index, one in enumerate(own):
            one["batch_size"], one["batch_index"] = places[index]
        made_with = {
            "image": self.picture,
            "latents_given": self.noise is not None,
            "model": pipe.parts.name,
            "model_hash": pipe.parts.model_hash,
            "device": pipe.device.type,
            "dtype": str(pipe.dtype).removeprefix("torch."),
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
        pipe, count = self.pipe, len(images)
        wanted = self._window_count(images[0])
        positive = [self._context(self._prompt(index), wanted) for index in images]
        negative = [self._context(self.settings.negative_prompt, wanted)] * count
        context = torch.stack([*negative, *positive])  # (2b, n * L, D)
        prepared = pipe.unet.prepare(self.plan.timesteps.to(pipe.device, torch.float32), context)
        unguided = prepared.rows(slice(count, 2 * count))

        def network(model_input: Tensor, call: Call) -> Tensor:
            scale, inputs = self.scales[call.index], model_input.to(pipe.dtype)
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
        native = self.pipe.native_size
        multiple = math.lcm(SIZE_MULTIPLE, self.pipe.autoencoder.config.downsample_factor)
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


def _strength(strength: float | None, image: object) -> float:
    if image is None and strength is not None:
        raise InputError("strength says how much of an image is drawn anew, got no image; pass an image too")
    return 1.0 if image is None else DEFAULT_STRENGTH if strength is None else strength


def _open(image: object) -> Image.Image | None:
    if image is None:
        return None
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, (str, os.PathLike)):
        return open_image(image)
    raise InputError(f"image must be a PIL image or a path, got {type(image).__name__}; convert it first")

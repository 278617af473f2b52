"""One call of a pipeline: text to context, context and noise to latents, latents to pixels."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from latentdiff import __version__
from latentdiff.checkpoints import Components
from latentdiff.diffusion import (
    KnownRegion,
    Plan,
    SchedulerPlan,
    Step,
    draw_noise,
    image_generator,
    make_inversion_plan,
    make_plan,
    sample,
    slerp,
    start,
)
from latentdiff.diffusion.prediction import Network
from latentdiff.engine.offload import Offload
from latentdiff.engine.tiled_decoding import ENLARGED_MAP, LARGE_MAP, decode
from latentdiff.engine.tiled_denoising import Windows
from latentdiff.errors import InputError
from latentdiff.generation.guided_unet import guided_network
from latentdiff.generation.inputs import enlarged_canvas, make_canvas
from latentdiff.generation.request import Settings, check_integer
from latentdiff.generation.result import Result
from latentdiff.generation.text import Conditioning
from latentdiff.generation.upscale import corrected, plan_upscale, reduced, with_alpha
from latentdiff.images import from_tensor, to_unit_range

__all__ = ["OUTPUT_TYPES", "Callback", "Drawing"]

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
        components: of the model; `unet` is not None.
        settings: of the call.
        image, mask: see `Pipeline.__call__`.
        noise: standard normal noise to start from instead of that of the seeds, or None.
        scheduler: of diffusers, or None for the sampler of the settings.
        opaque: refuse an image with transparent parts.
        offload: lends the networks their device; None where they are on it.
        tile_size: see `Pipeline`.
    """

    def __init__(
        self,
        components: Components,
        settings: Settings,
        image: Any,
        mask: Any = None,
        noise: Tensor | None = None,
        scheduler: Any = None,
        *,
        opaque: bool = False,
        offload: Offload | None = None,
        tile_size: int | None = None,
    ) -> None:
        self.components, self.unet, self.autoencoder = components, components.unet, components.autoencoder
        self.device, self.dtype = components.device if offload is None else offload.device, components.dtype
        self.lend = (lambda *networks: nullcontext()) if offload is None else offload.lend
        self.tile_size = tile_size
        self.windows: Windows | None = None  # through which a picture that is enlarged is looked at
        self.first: Drawing | None = None  # draws what this one draws again, larger
        factor, native = components.autoencoder.config.downsample_factor, components.native_size
        if settings.hires > 1 and image is None and not components.upscales:
            alone = replace(settings, hires=1.0)
            self.first, noise = Drawing(components, alone, None, mask, noise, scheduler, offload=offload), None
        if components.upscales:
            levels = components.unet.config.num_class_embeds or 1000
            check_integer("noise_level", settings.noise_level, 0, levels - 1, f"try {min(20, levels - 1)}")
            self.canvas = enlarged_canvas(settings, image, mask, factor)
        else:
            self.canvas = make_canvas(settings, image, mask, native, factor, opaque=opaque)
        canvas, self.notes = self.canvas, list(self.canvas.notes)
        self.settings = settings = self._settled(settings)
        self.strength = settings.strength if self.first is None else settings.hires_strength
        self.shape = (components.autoencoder.config.latent_channels, canvas.height // factor, canvas.width // factor)
        self.noise = None if noise is None else _checked_noise(noise, (settings.count, *self.shape))
        self.plan = self._plan(scheduler)
        with self.lend(components.text_encoder, components.text_encoder_2):
            self.conditioning = Conditioning(components, settings, (canvas.height, canvas.width), self.device)
        self.pixels = None if canvas.pixels is None else canvas.pixels.to(self.device)
        self.mask = None if canvas.edit is None else canvas.edit.mask.to(self.device)  # (1, 1, H, W)
        # A network that sees what to keep needs nothing else of a picture where all noise is its own.
        seen = components.inpaints and self.mask is not None and self.strength == 1
        self.image_latents: Tensor | None = None
        if self.pixels is not None and not components.upscales and not seen:
            self.image_latents = self._encode(self.pixels)  # (1, C, h, w)
        self.kept = self._kept() if components.inpaints else None
        self.small = self.pixels if components.upscales else None  # (1, 3, h, w)

    def _settled(self, settings: Settings) -> Settings:
        """Return the settings with the size that was chosen for what they ask for, as records keep them."""
        canvas = self.canvas
        if self.components.upscales:
            return replace(settings, height=None, width=None)
        if self.first is not None:
            return replace(settings, height=self.first.settings.height, width=self.first.settings.width)
        left, top, right, bottom = settings.outpaint or (0, 0, 0, 0)
        return replace(settings, height=canvas.height - top - bottom, width=canvas.width - left - right)

    def _encode(self, pixels: Tensor) -> Tensor:
        """Return the scaled latents (1, C, h, w) of pixels (1, 3, H, W)."""
        latents = self._finite(lambda model, x: model.encode(x).mode(), pixels)
        return latents * self.autoencoder.config.scaling_factor

    def _kept(self) -> Tensor:
        """Return what an inpainting network sees besides x: the mask and the latents of what is kept, (1, 1 + C, h, w).

        Source: Rombach et al. 2022, arXiv 2112.10752, section 4.5, as the published inpainting models have it.
        """
        factor, size = self.autoencoder.config.downsample_factor, (1, 1, self.canvas.height, self.canvas.width)
        mask = torch.ones(size, device=self.device) if self.mask is None else self.mask
        pixels = torch.zeros(1, 3, *size[2:], device=self.device) if self.pixels is None else self.pixels
        small = F.interpolate(mask, scale_factor=1 / factor, mode="nearest")  # (1, 1, h, w)
        return torch.cat([small, self._encode(pixels * (mask == 0))], dim=1)

    def _noised(self, small: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Return the small picture with noise of each image's own, (b, 3, h, w), as an upscaling network sees it.

        Source: Ho et al. 2021, arXiv 2106.15282, section 3 (noise conditioning augmentation).
        """
        schedule = self.components.low_res_schedule
        assert schedule is not None
        noise = draw_noise(generators, tuple(small.shape[1:])).to(small)
        level = torch.full((len(generators),), self.settings.noise_level, device=small.device)
        return schedule.add_noise(small.expand_as(noise), noise, level)

    def _plan(self, scheduler: Any) -> Plan | SchedulerPlan:
        settings, schedule, steps = self.settings, self.components.schedule, self.settings.num_inference_steps
        if scheduler is None:
            options: dict[str, Any] = {"eta": settings.eta, "resampling": settings.resampling}
            return make_plan(schedule, settings.sampler, steps, strength=self.strength, **options)
        needing = {
            "a mask": self.canvas.edit is not None,
            "resampling": settings.resampling > 1,
            "eta": settings.eta > 0,
            "this self-conditioned model": self.unet.config.self_conditioning,
        }
        for what in (name for name, given in needing.items() if given):
            raise InputError(f"{what} needs one of our samplers, got a scheduler object; pass its name instead")
        return SchedulerPlan(scheduler, schedule, steps, self.strength)

    def draw(self, output_type: str, batch_size: int, callback: Callback | None, progress: bool) -> Result:
        """Return all images."""
        batches = self.batches(batch_size)
        if self.components.upscales:
            _, height, width = self.shape
            self.windows = plan_upscale(self.components, (width, height), self.device, max(map(len, batches))).windows
        drawn: list[Tensor] = []
        steps = len(self.plan) + (0 if self.first is None else len(self.first.plan))
        with _counted_steps(steps * len(batches), callback, progress) as on_step:
            for batch in batches:
                with self.lend(self.unet):
                    latents = self.sample(batch, on_step).split(1)
                # Decoded one by one, because a decoder needs far more memory than a U-Net.
                drawn += latents if output_type == "latent" else map(self.decode, latents)
        for note in self.notes:
            warnings.warn(note, RuntimeWarning, stacklevel=4)  # shown at the line that called the pipeline
        pictures = OUTPUT_TYPES[output_type](torch.cat(drawn))
        if output_type == "pil":
            pictures = [self._with_opacity(picture) for picture in pictures]
        return self.result(pictures, batches)

    def _with_opacity(self, picture: Image.Image) -> Image.Image:
        """Return a picture as transparent as the one it was drawn from is where it is kept, or enlarged."""
        if self.canvas.alpha is not None:
            return with_alpha(picture, self.canvas.alpha)
        if self.canvas.edit is not None and self.canvas.edit.alpha is not None:
            picture.putalpha(self.canvas.edit.alpha)
        return picture

    def batches(self, batch_size: int) -> list[list[int]]:
        """Return the numbers of the images to draw together: as many as allowed, all with equally many text windows."""
        runs = [list(run) for _, run in groupby(range(self.settings.count), key=self.conditioning.window_count)]
        return [run[start : start + batch_size] for run in runs for start in range(0, len(run), batch_size)]

    def sample(
        self,
        images: Sequence[int],
        on_step: Callable[[Step], None],
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Return the scaled latents (b, C, h, w) float32 of some of the images.

        Args:
            images: their numbers.
            on_step: called after each step.
            generators: of these images, which then draw more; None for new ones.

        Raises:
            InputError: the network's output was not finite.
        """
        generators = generators or [image_generator(self.settings.seeds(index)[0]) for index in images]
        before = None if self.first is None else self.first.sample(images, on_step, generators)
        beside = self.kept if self.small is None else self._noised(self.small, generators)
        noise = self._initial_noise(images, generators).to(self.device, torch.float32)
        latents = None if self.image_latents is None else self.image_latents.expand_as(noise)
        if before is not None:
            latents = F.interpolate(before, self.shape[1:], mode="bicubic")
        elif self.kept is not None and self.strength == 1:
            latents = None  # the network itself sees what to keep
        network = self._network(images, self.plan, beside)
        if isinstance(self.plan, SchedulerPlan):
            steps = self.plan.run(network, noise, generators, latents)
        else:
            x, known = start(self.plan, noise, latents), None
            if self.mask is not None and latents is not None and self.kept is None:
                factor = self.autoencoder.config.downsample_factor
                mask = F.max_pool2d(self.mask, factor).expand(len(noise), -1, -1, -1)  # (b, 1, h, w)
                known = KnownRegion(mask, latents)
                if self.strength == 1:  # nothing of the image is left where it is drawn anew
                    x = torch.lerp(x, start(self.plan, noise), mask)
            steps = sample(self.components.denoiser(network), self.plan, x, generators, known)
        for step in steps:
            on_step(step)
        return step.x

    def invert(self, iterations: int) -> Tensor:
        """Return the noise (1, C, h, w) float32 from which the sampler ddim draws the image."""
        if self.image_latents is None:
            raise InputError(
                "only pictures of text-to-image models are inverted, got a model that enlarges; use another"
            )
        plan = make_inversion_plan(self.components.schedule, self.settings.num_inference_steps, iterations)
        with self.lend(self.unet):
            network = self._network([0], plan, self.kept)
            *_, step = sample(self.components.denoiser(network), plan, self.image_latents)
        return step.x

    def _initial_noise(self, images: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
        settings, noise = self.settings, draw_noise(generators, self.shape)
        if self.noise is not None:
            noise = self.noise[list(images)]
        if not settings.variation_strength or self.first is not None:
            return noise
        others = [image_generator(settings.seeds(index)[1]) for index in images]
        return slerp(noise, draw_noise(others, self.shape), settings.variation_strength)

    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W) float32 of scaled latents; where nothing is drawn, the pixels of the image."""
        scaling_factor = self.autoencoder.config.scaling_factor
        large = ENLARGED_MAP if self.components.upscales else LARGE_MAP
        images = self._finite(lambda model, x: decode(model, x, self.tile_size, large), latents / scaling_factor)
        edit, size = self.canvas.edit, self.canvas.size
        if self.small is not None:
            images = corrected(images.clamp(-1, 1), self.small, self.settings.correction)
        if edit is None:
            return images if size is None else reduced(images.clamp(-1, 1), size[1], size[0])
        return torch.lerp(edit.kept.to(images), images.clamp(-1, 1), edit.share.to(images))

    def _finite(self, run: Callable[[Any, Tensor], Tensor], x: Tensor) -> Tensor:
        """Run the autoencoder, once more in float32 where its own dtype overflows, and note that."""
        autoencoder, dtype = self.autoencoder, self.dtype
        with self.lend(autoencoder):
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
        own = [{key: record.pop(key) for key in ("prompt", "seed", "variation_seed")} for record in records]
        for index, one in enumerate(own):
            one["batch_size"], one["batch_index"] = places[index]
        made_with = {
            **self.canvas.given,
            **({} if self.canvas.size is None else {"size": list(self.canvas.size)}),
            "latents_given": (self.first or self).noise is not None,
            "model": self.components.name,
            "model_hash": self.components.model_hash,
            "prediction_type": self.components.schedule.prediction_type,
            "embeddings": [dict(embedding) for embedding in self.components.embeddings],
            "loras": [lora.record() for lora in self.components.loras],
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
            token_counts=[self.conditioning.encoded[one["prompt"]].tokens for one in own],
            window_counts=[len(self.conditioning.encoded[one["prompt"]].states) for one in own],
            notes=self.notes,
        )

    def _network(self, images: Sequence[int], plan: Plan | SchedulerPlan, beside: Tensor | None) -> Network:
        told = self.conditioning.of(images)
        return guided_network(self.components, self.settings, told, plan, beside, self.windows)


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


def _checked_noise(noise: Tensor, expected: tuple[int, ...]) -> Tensor:
    if noise.shape != expected:
        raise InputError(f"latents must have shape {expected}, got {tuple(noise.shape)}; one for each image")
    if not torch.isfinite(noise).all():
        raise InputError("latents must be finite, got NaN or infinity; pass standard normal noise")
    return noise

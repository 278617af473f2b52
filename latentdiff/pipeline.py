"""From prompt to pixels. Text-to-image, image-to-image and inpainting differ only in what is passed in.

    pipe = Pipeline.from_pretrained()
    pipe("a red fox", seed=7).save("fox.png")

A pipeline keeps no state between calls, so threads may share one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentdiff.checkpoints import Components, load_pipeline, save_pipeline
from latentdiff.checkpoints.lora import Weight, apply_loras
from latentdiff.checkpoints.textual_inversion import add_embedding
from latentdiff.diffusion.plan import EXTERNAL
from latentdiff.engine.attention import find_attention, use_attention
from latentdiff.engine.offload import Offload
from latentdiff.engine.place import resolve_device, resolve_dtype
from latentdiff.errors import InputError, suggest
from latentdiff.generation.masks import MaskLike, open_picture
from latentdiff.generation.request import Settings, check_integer
from latentdiff.generation.result import Result
from latentdiff.generation.run import OUTPUT_TYPES, Callback, Drawing
from latentdiff.generation.upscale import UpscalePlan, plan_upscale
from latentdiff.models.unet import UNet2DConditionModel

__all__ = ["OUTPUT_TYPES", "Callback", "Pipeline"]

DEFAULT_STRENGTH = 0.8
BATCH_SIZE = 4


class Pipeline:
    """A text-to-image model, ready to draw.

    Args:
        components: see `latentdiff.checkpoints.load_pipeline`; they stay on the device and in the dtype they have.
        offload: lends the networks, which are in CPU memory, their device; None where they are on it.
        tile_size: side of the tiles, in latents, in which pictures are decoded; they are the same to rounding and need
            a fraction of the memory. None for tiles only where a decoder would need several gigabytes.
    """

    def __init__(self, components: Components, *, offload: Offload | None = None, tile_size: int | None = None) -> None:
        if components.unet is None:
            raise InputError("a pipeline needs a U-Net, got none; pass all components")
        self.components = components
        self.offload = offload
        self.tile_size = None if tile_size is None else check_integer("tile_size", tile_size, 8, 4096, "try 32")
        self.unet: UNet2DConditionModel = components.unet
        self.autoencoder = components.autoencoder
        self.text_encoder = components.text_encoder

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        prediction_type: str | None = None,
        attention: str = "sdpa",
        offload: bool = False,
        tile_size: int | None = None,
    ) -> Pipeline:
        """Load a model.

        Args:
            model: folder in diffusers' layout, single safetensors file of the original one, or `owner/name` on a hub;
                None for the model that comes with the package.
            device: "cpu", "cuda", "cuda:1", "mps"; None or "auto" for the fastest there is.
            dtype: "float32" (unless given), "float16" or "bfloat16".
            prediction_type: "epsilon" or "v_prediction", where the files do not say what the model predicts.
            attention: "sdpa", torch's own, or "xformers", which must be installed and runs on CUDA only.
            offload: keep all networks in CPU memory and have each on the device only while it runs.
            tile_size: see `Pipeline`.

        Raises:
            InputError: there is no such folder, device, dtype, prediction type or attention, or no need to offload.
            MissingDependencyError: xformers is not installed.
            ModelLoadError: the model was refused; the subclass says why.
        """
        place = resolve_device(device)
        attend = find_attention(attention, place)
        lender = Offload(place) if offload else None
        components = load_pipeline(model, resolve_dtype(dtype), "cpu" if offload else place, prediction_type)
        pipe = cls(components, offload=lender, tile_size=tile_size)
        use_attention(attend, pipe.unet, pipe.autoencoder)
        return pipe

    @classmethod
    def from_diffusers(cls, pipe: Any) -> Pipeline:
        """Return a pipeline that shares the weights of one of diffusers, see `checkpoints.bridge.from_diffusers`."""
        from latentdiff.checkpoints.bridge import from_diffusers

        return cls(from_diffusers(pipe))

    def to_diffusers(self) -> Any:
        """Return a pipeline of diffusers that shares these weights, see `checkpoints.bridge.to_diffusers`."""
        from latentdiff.checkpoints.bridge import to_diffusers

        return to_diffusers(self.components)

    def save_pretrained(self, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Write the model as a folder that `from_pretrained`, here and in diffusers, loads.

        Args:
            folder: new, or one that a model was saved to before.
            dtype: of the weights in the files; None keeps what they have.

        Raises:
            InputError: the folder holds something that is no model.
            StorageError: the folder cannot be written.
        """
        save_pipeline(self.components, folder, dtype)

    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Pipeline:
        """Move the networks to a device, cast them, or both, in place; None leaves that as it is."""
        if self.offload is not None and device is not None:
            given = str(device)[:80]
            raise InputError(f"offload keeps its networks in CPU memory, got {given!r}; load without offload")
        place = self.components.device if device is None else resolve_device(device)
        kind = self.dtype if dtype is None else resolve_dtype(dtype)
        for network in filter(None, (self.unet, self.autoencoder, self.text_encoder, self.components.text_encoder_2)):
            network.to(place, kind)
        return self

    @property
    def device(self) -> torch.device:
        """Where the networks run."""
        return self.components.device if self.offload is None else self.offload.device

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in; the arithmetic between their calls is always float32."""
        return self.components.dtype

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width, in pixels, that the model was trained at."""
        return self.components.native_size

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        *,
        negative_prompt: str = Settings.negative_prompt,
        image: str | os.PathLike[str] | Image.Image | None = None,
        mask: MaskLike | None = None,
        strength: float | None = None,
        num_inference_steps: int = Settings.num_inference_steps,
        guidance_scale: float = Settings.guidance_scale,
        guidance_rescale: float = Settings.guidance_rescale,
        guidance_interval: tuple[float, float] | None = Settings.guidance_interval,
        guidance_schedule: str = Settings.guidance_schedule,
        guidance_parallel: float = Settings.guidance_parallel,
        guidance_limit: float | None = Settings.guidance_limit,
        sampler: Any = Settings.sampler,
        eta: float = Settings.eta,
        seed: int = Settings.seed,
        num_images: int = Settings.num_images,
        resampling: int = Settings.resampling,
        outpaint: Mapping[str, int] | Sequence[int] | None = Settings.outpaint,
        feather: int = Settings.feather,
        variation_strength: float = Settings.variation_strength,
        variation_seed: int = Settings.variation_seed,
        blend_prompt: str = Settings.blend_prompt,
        blend: float = Settings.blend,
        clip_skip: int = Settings.clip_skip,
        noise_level: int = Settings.noise_level,
        scale: int | None = Settings.scale,
        correction: str = Settings.correction,
        hires: float = Settings.hires,
        hires_strength: float = Settings.hires_strength,
        prompt_weights: bool = Settings.prompt_weights,
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
            prompt: one text or several; may be empty where there is an image.
            image: a picture, or its path, to start from; it is scaled to cover the size and cut evenly. Without height
                and width the result has its shape and the model's own area. `strength` is then 0.8 unless given. For a
                model that enlarges, the small picture, of any size and shape; if it is transparent, so is the result.
            mask: what of `image` is drawn anew (inpainting): what is white in a picture of its size, or a path of one;
                "alpha" for what is transparent in it; or left, top, right and bottom of a box in it. All else keeps
                its pixels, bit for bit, and without height and width the image its size, if its sides are multiples of
                8 within the model's limit. `strength` is then 1 unless given, as it is with `outpaint`. A model trained
                for it (9 input channels) sees what is kept; with any other it is put into every step.
            sampler: a name, or any scheduler object of diffusers; pictures of those cannot be replayed.
            latents: standard normal noise (B, C, h, w) to start from instead of that of the seeds.
            output_type: "pil", "pt", "np" or "latent"; see `Result.images`.
            callback: called after each step, see `Callback`; what it raises ends the call.
            progress: show a bar on stderr.
            batch_size: how many images are drawn at once at most.

        Raises:
            InputError: something that cannot be used, with what can.
        """
        given = locals()
        check_integer("batch_size", batch_size, 1, 1024, f"try {BATCH_SIZE}")
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type {output_type!r} is unknown{suggest(str(output_type), OUTPUT_TYPES)}")
        chosen = {item.name: given[item.name] for item in fields(Settings) if item.name in given}
        whole = self.components.upscales or mask is not None or outpaint is not None
        chosen["strength"] = _strength(strength, image, whole)
        scheduler = None if isinstance(sampler, str) else sampler
        if scheduler is not None:
            chosen["sampler"] = EXTERNAL + type(scheduler).__name__
        settings = Settings(prompts=prompt, **chosen)  # type: ignore[arg-type]  # checked and made a tuple there
        components, lender, tile = self.components, self.offload, self.tile_size
        drawing = Drawing(components, settings, image, mask, latents, scheduler, offload=lender, tile_size=tile)
        return drawing.draw(output_type, batch_size, callback, progress)

    @torch.no_grad()
    def invert(
        self,
        image: str | os.PathLike[str] | Image.Image,
        prompt: str,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        iterations: int = 3,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """Find the noise that draws a picture (DDIM inversion), to draw it again with another prompt.

        noise = pipe.invert("fox.png", "a red fox")
        pipe("a blue fox", latents=noise, sampler="ddim", num_inference_steps=50, guidance_scale=1.0)

        Args:
            image: the picture, or its path; opaque.
            prompt: what it shows.
            num_inference_steps: of the run that will draw it.
            guidance_scale: of that run; above 1 it is found less exactly.
            iterations: calls of the network for each step; more are more exact.
            height, width: in pixels; None for the shape of the picture at the model's own area.

        Returns:
            Noise (1, C, h, w) float32, for `latents`.

        Raises:
            InputError: something that cannot be used, with what can.
        """
        settings = Settings(
            prompts=(prompt,),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            sampler="ddim",
            height=height,
            width=width,
        )
        return Drawing(self.components, settings, image, opaque=True, offload=self.offload).invert(iterations)

    def upscale_plan(self, image: str | os.PathLike[str] | Image.Image) -> UpscalePlan:
        """Return in how many windows a model that enlarges would draw a picture, and with how much memory.

        Raises:
            InputError: it takes more memory than there is, or the model does not enlarge.
        """
        picture = open_picture(image, "image")
        if picture is None or not self.components.upscales:
            raise InputError("a plan is for a picture and a model that enlarges, got another; try embedded-upscale")
        return plan_upscale(self.components, picture.size, self.device)

    def with_embedding(self, path: str | os.PathLike[str], word: str | None = None) -> Pipeline:
        """Return a pipeline whose prompts may use one more word, of a textual-inversion file; this one stays as it is.

        pipe.with_embedding("fox-toy.safetensors")("a photo of fox-toy")

        Args:
            path: see `latentdiff.checkpoints.textual_inversion` for the files that are read.
            word: what stands for it in prompts; None for what the file calls it, or for its name.

        Raises:
            InputError: the word is one of the vocabulary already.
            ModelLoadError: the file was refused, or is for another model.
        """
        return self._with(add_embedding(self.components, path, word))

    def with_loras(self, loras: Mapping[Any, Weight]) -> Pipeline:
        """Return a pipeline with these LoRAs in its weights, in place of those it has; this one stays as it is.

        styled = pipe.with_loras({"style.safetensors": 0.8, "fox.safetensors": (1.0, 0.5)})
        plain = styled.with_loras({})  # the weights of before, bit for bit

        Args:
            loras: files (see `latentdiff.checkpoints.lora.load_lora`), each with its weight: one number, or one for the
                U-Net and one for the text encoders. All other weights are shared, not copied.

        Raises:
            InputError: a weight is no finite number.
            ModelLoadError: a file was refused, or is for another model.
        """
        return self._with(apply_loras(self.components, loras))

    def _with(self, components: Components) -> Pipeline:
        return Pipeline(components, offload=self.offload, tile_size=self.tile_size)


def _strength(strength: float | None, image: object, whole: bool) -> float:
    """Return how much of an image is drawn anew: what was asked for, else all of it without an image or if `whole`."""
    if image is None and strength is not None:
        raise InputError("strength says how much of an image is drawn anew, got no image; pass an image too")
    if strength is not None:
        return strength
    return 1.0 if image is None or whole else DEFAULT_STRENGTH

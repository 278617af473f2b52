"""From prompt to pixels. Text-to-image, image-to-image and inpainting differ only in what is passed in.

    pipe = Pipeline.from_pretrained()
    pipe("a red fox", seed=7).save("fox.png")

A pipeline keeps no state between calls, so threads may share one.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.checkpoints import Components, load_pipeline, save_pipeline
from latentdiff.checkpoints.components import moved
from latentdiff.checkpoints.lora import apply_loras
from latentdiff.checkpoints.textual_inversion import add_embedding
from latentdiff.devices import resolve_device, resolve_dtype
from latentdiff.diffusion.plan import EXTERNAL
from latentdiff.diffusion.tuned import TUNED
from latentdiff.engine.attention import find_attention, use_attention
from latentdiff.engine.engines import Eager, Engine
from latentdiff.engine.execution import Execution, find_engine, settle
from latentdiff.engine.offload import Offload
from latentdiff.errors import InputError, shown
from latentdiff.generation.batches import BATCH_SIZE
from latentdiff.generation.decode import OUTPUT_TYPES
from latentdiff.generation.documentation import document
from latentdiff.generation.inputs import prepare_image, prepare_small_image
from latentdiff.generation.masks import MaskLike, open_picture
from latentdiff.generation.options import check_integer, one_of
from latentdiff.generation.request import Settings
from latentdiff.generation.result import GeneratedImage, Result
from latentdiff.generation.rules import check_defaults, check_inputs, check_names, given_of
from latentdiff.generation.run import Callback, invert, run
from latentdiff.generation.stages import Job
from latentdiff.generation.upscale import UpscalePlan, plan_upscale
from latentdiff.lora_tags import Weight
from latentdiff.models.unet import UNet2DConditionModel

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["OUTPUT_TYPES", "Callback", "Pipeline"]

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray

DEFAULT_STRENGTH = 0.8


class Pipeline:
    """A text-to-image model, ready to draw.

    Args:
        components: see `latentdiff.checkpoints.load_pipeline`; they stay on the device and in the dtype they have.
        offload: moves networks from CPU memory to the device while they run; None where they are on it.
        tile_size: side of the tiles, in latents, in which pictures are decoded; they are the same to rounding and need
            a fraction of the memory. None for tiles only where a decoder would need several gigabytes.
        engine: what runs U-Net and decoder; None for PyTorch as it is.
    """

    def __init__(
        self,
        components: Components,
        *,
        offload: Offload | None = None,
        tile_size: int | None = None,
        engine: Engine | None = None,
    ) -> None:
        check_defaults(components.defaults)
        self.components = components
        self.offload = offload
        self.engine = Eager() if engine is None else engine
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
        vae: str | os.PathLike[str] | None = None,
        attention: str = "sdpa",
        offload: bool = False,
        tile_size: int | None = None,
        engine: str = "eager",
        local: bool = False,
    ) -> Pipeline:
        """Load a model.

        Args:
            model: folder in diffusers' layout, single safetensors file of the original one, or `owner/name` on a hub;
                None for the model that comes with the package.
            device: "cpu", "cuda", "cuda:1", "mps"; None or "auto" for the fastest there is.
            dtype: "float32" (unless given), "float16" or "bfloat16".
            prediction_type: "epsilon" or "v_prediction", where the files do not say what the model predicts.
            vae: autoencoder in place of the model's own: a safetensors file or a folder; see `load_pipeline`.
            attention: "sdpa", torch's own, or "xformers", which must be installed and runs on CUDA only.
            offload: keep networks in CPU memory, and each on the device only while it runs.
            tile_size: see `Pipeline`.
            engine: what runs U-Net and decoder: "eager", PyTorch as it is; "compile", PyTorch compiled; "graphs", on
                NVIDIA GPUs; "openvino", on a CPU; "auto" for the fastest that begins at once. See docs/engines.md.
            local: of models on a hub, take only what is in the cache already.

        Raises:
            InputError: there is no such folder, device, dtype, prediction type, attention or engine, or some do not go
                together.
            MissingDependencyError: the attention or engine is not installed.
            ModelLoadError: the model was refused; the subclass says why.
        """
        how = settle(device, dtype, engine, offload=offload)
        attend = find_attention(attention, how.device)
        home = "cpu" if offload else how.device
        components = load_pipeline(model, how.dtype, home, prediction_type, vae, local=local)
        pipe = cls(components, offload=how.offload, tile_size=tile_size, engine=how.engine)
        use_attention(attend, pipe.unet, pipe.autoencoder)
        return pipe

    @classmethod
    def from_diffusers(cls, pipe: DiffusionPipeline) -> Pipeline:
        """Return a pipeline that shares the weights of one of diffusers, see `checkpoints.bridge.from_diffusers`."""
        from latentdiff.checkpoints.bridge import from_diffusers

        return cls(from_diffusers(pipe))

    def to_diffusers(self) -> DiffusionPipeline:
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
        """Return a pipeline with the networks on a device, cast, or both; None leaves that as it is.

        This one stays as it is, and so do those that share its weights: `pipe = pipe.to("cuda")` lets go of it.

        Raises:
            InputError: there is no such device or dtype, the networks are offloaded, or the engine does not run there.
        """
        if self.offload is not None and device is not None:
            given = shown(str(device))
            raise InputError(f"offload keeps its networks in CPU memory, got {given}; load without offload")
        place = self.components.device if device is None else resolve_device(device)
        kind = self.dtype if dtype is None else resolve_dtype(dtype)
        engine = find_engine(self.engine.name, place, kind, offload=self.offload is not None)
        return self._with(moved(self.components, place, kind), engine)

    @property
    def parts(self) -> Components:
        """Deprecated name of `components`."""
        warnings.warn("Pipeline.parts is called components now; parts goes in 0.3", DeprecationWarning, stacklevel=2)
        return self.components

    @property
    def device(self) -> torch.device:
        """Where the networks run."""
        return self.components.device if self.offload is None else self.offload.device

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in; the arithmetic between their calls is always float32."""
        return self.components.dtype

    @property
    def execution(self) -> Execution:
        """How the networks are run."""
        return Execution(self.device, self.dtype, self.offload, self.tile_size, self.engine)

    def make_ready(self) -> Pipeline:
        """Let the engine convert the networks now that it would convert for the first picture, and return this."""
        self.engine.predict(self.unet)
        self.engine.texts(self.unet)
        self.engine.decode(self.autoencoder)
        self.engine.encode(self.components.prompt_encoder)
        return self

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width, in pixels, that the model was trained at."""
        return self.components.native_size

    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        *,
        image: ImageLike | None = None,
        mask: MaskLike | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback: Callback | None = None,
        progress: bool = False,
        batch_size: int = BATCH_SIZE,
        **options: object,
    ) -> Result:
        images = self.stream(
            prompt,
            image=image,
            mask=mask,
            latents=latents,
            output_type=output_type,
            callback=callback,
            progress=progress,
            batch_size=batch_size,
            **options,
        )
        result = Result.of(list(images))
        for note in result.notes:
            warnings.warn(note, RuntimeWarning, stacklevel=2)
        return result

    def stream(
        self,
        prompt: str | Sequence[str] = "",
        *,
        image: ImageLike | None = None,
        mask: MaskLike | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback: Callback | None = None,
        progress: bool = False,
        batch_size: int = BATCH_SIZE,
        **options: object,
    ) -> Iterator[GeneratedImage]:
        """Yield the images of a request, each as soon as it is decoded, so that any number fits into memory.

        for number, one in enumerate(pipe.stream("a red fox", num_images=1000)):
            one.save(f"foxes/{number}.png")

        Arguments and errors are those of `__call__`; what cannot be used is refused before the first image.
        """
        check_integer("batch_size", batch_size, 1, 1024, f"try {BATCH_SIZE}")
        one_of(tuple(OUTPUT_TYPES))("output_type", output_type)
        if callback is not None and not callable(callback):
            raise InputError(f"callback must be a function of three arguments, got {shown(callback)}; see Callback")
        job = self.make_job(prompt, image=image, mask=mask, latents=latents, **options)
        return run(job, output_type, batch_size, callback, progress)

    def make_job(
        self,
        prompt: str | Sequence[str] = "",
        *,
        image: ImageLike | None = None,
        mask: MaskLike | None = None,
        latents: Tensor | None = None,
        **options: object,
    ) -> Job:
        """Return a request with this model, checked, its pictures opened: what `stream` draws, and a server later.

        Arguments and errors are those of `__call__`.
        """
        components = self.components
        chosen, scheduler = self._chosen(options, image, mask)
        settings = Settings(prompts=prompt, **chosen)  # type: ignore[arg-type]  # checked and made a tuple there
        factor = components.autoencoder.config.downsample_factor
        settings.check_task(components.task, factor)
        if settings.sampler == TUNED:
            components.tuned_table(settings.num_inference_steps)  # refuses steps it does not take
        if settings.deep_every > 1:
            self.execution.engine.require_levels()
        check_inputs(given_of(options), image=image is not None, mask=mask is not None)
        if components.upscales:
            inputs = prepare_small_image(settings, image, mask, factor)
        else:
            inputs = prepare_image(settings, image, mask, components.native_size, factor)
        return Job(components, self.execution, settings, inputs, latents, scheduler)

    def _chosen(self, options: Mapping[str, object], image: object, mask: object) -> tuple[dict[str, Any], Any]:
        """Return the options with the defaults of the model, and the scheduler object among them."""
        check_names(options)
        given = given_of(options)
        chosen = {**self.components.defaults, **given}
        if not given.keys().isdisjoint({"timesteps", "sigmas"}) and "num_inference_steps" not in given:
            chosen.pop("num_inference_steps", None)  # the model's own
        whole = image is None or mask is not None or "outpaint" in given or self.components.upscales
        chosen.setdefault("strength", 1.0 if whole else DEFAULT_STRENGTH)
        sampler = chosen.get("sampler", "")
        if isinstance(sampler, str):
            return chosen, None
        return chosen | {"sampler": EXTERNAL + type(sampler).__name__}, sampler

    def invert(
        self,
        image: ImageLike,
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
        check_integer("iterations", iterations, 1, 100, "try 3")
        factor = self.components.autoencoder.config.downsample_factor
        prepared = prepare_image(settings, image, None, self.native_size, factor, opaque=True)
        return invert(Job(self.components, self.execution, settings, prepared), iterations)

    def upscale_plan(self, image: ImageLike) -> UpscalePlan:
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

    def _with(self, components: Components, engine: Engine | None = None) -> Pipeline:
        engine = self.engine if engine is None else engine
        return Pipeline(components, offload=self.offload, tile_size=self.tile_size, engine=engine)


document(Pipeline.__call__)

"""The components of a pipeline, and whether they fit together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch

from latentdiff.checkpoints.hashes import model_hash, vae_hash
from latentdiff.diffusion.prediction import Denoiser, Network, as_denoiser
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.diffusion.tuned import TunedSampler, TunedTable
from latentdiff.errors import InputError, ModelConfigError
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.autoencoder_tiny import AutoencoderTiny
from latentdiff.models.clip import CLIPTextConfig, CLIPTextModel
from latentdiff.models.encoding import PenultimateStates, PromptEncoder, TokenEncoder, TokenStates
from latentdiff.models.image_text import ImageTextModel
from latentdiff.models.lora import WeightedLoRA, share_weights
from latentdiff.models.pixels import LabelConfig, LabelEncoder, PixelSpace, PixelSpaceConfig
from latentdiff.models.tokenizer import Tokenizer
from latentdiff.models.unet import UNet2DConditionModel

__all__ = [
    "AnyNetwork",
    "Autoencoder",
    "Components",
    "Encoders",
    "ModelSource",
    "Task",
    "TextEncoder",
    "check_fit",
    "moved",
]

LARGEST_SIDE = 2048  # of the pictures that a model draws unless told otherwise, in pixels
Autoencoder = AutoencoderKL | PixelSpace
Task = Literal["text_to_image", "inpaint", "upscale"]
TextEncoder = TokenEncoder | LabelEncoder
AnyNetwork = UNet2DConditionModel | Autoencoder | AutoencoderTiny | TextEncoder | ImageTextModel


@dataclass(frozen=True)
class ModelSource:
    """The folder or file that a model was loaded from.

    Attributes:
        vae: file or folder of the autoencoder that was loaded in place of the model's own; None for that.
    """

    path: Path
    vae: Path | None = None

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the files, read when first asked for."""
        own = model_hash(self.path)
        return own if self.vae is None else sha256((own + vae_hash(self.vae)).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The frozen components that a U-Net is trained against: latent space, text encoders, noise schedules.

    Attributes:
        tokenizer: None where the text encoder needs none.
        text_encoder_2, tokenizer_2: the second ones of Stable Diffusion XL; its refiner's only ones are the first here.
        low_res_schedule: noise schedule of the small picture, for a model that upscales one; None for others.
        force_zeros: whether the empty negative prompt is the zero vector instead of its encoded states.
    """

    autoencoder: Autoencoder
    text_encoder: TextEncoder
    schedule: NoiseSchedule
    tokenizer: Tokenizer | None = None
    text_encoder_2: CLIPTextModel | None = None
    tokenizer_2: Tokenizer | None = None
    low_res_schedule: NoiseSchedule | None = None
    force_zeros: bool = False

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """The encoder from prompts to context that the U-Net is trained with."""
        if isinstance(self.text_encoder, LabelEncoder):
            return self.text_encoder
        if self.tokenizer is None:
            raise ModelConfigError(f"a {type(self.text_encoder).__name__} needs a tokenizer, got none; pass its own")
        return TokenStates(self.text_encoder, self.tokenizer)

    @property
    def expects_pooled_text(self) -> bool:
        """Whether the U-Net takes a pooled text vector and sizes besides the text states, as Stable Diffusion XL's."""
        return False

    def with_unet(self, unet: UNet2DConditionModel) -> Components:
        """Return these components with a U-Net, in place of the one there may be."""
        return Components(unet=unet, **self._shared())

    def without_unet(self) -> Encoders:
        """Return these components alone, without the U-Net there may be."""
        return Encoders(**self._shared())

    def _shared(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(Encoders)}


@dataclass(frozen=True, kw_only=True)
class Components(Encoders):
    """The components of a pipeline.

    Attributes:
        name: how settings refer to the model.
        source: where they were loaded from; None when they were not, or are no longer what is there.
        embeddings: learned words, with the files they are from; see `checkpoints.textual_inversion`.
        loras: LoRAs in the weights, in this order; see `checkpoints.lora.apply_loras`.
        base: the components with the networks as they are without LoRAs; None where there are none.
        defaults: of generation options, where the model has its own; see `checkpoints.generation_config`.
        tuned: sampler of its own; None where it has none. See `checkpoints.tuned_sampler`.
        tiny_decoder: for previews; None where it has none.
    """

    unet: UNet2DConditionModel
    name: str = "unsaved"
    source: ModelSource | None = None
    embeddings: tuple[Mapping[str, str], ...] = ()
    loras: tuple[WeightedLoRA, ...] = ()
    base: Components | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tuned: TunedSampler | None = None
    tiny_decoder: AutoencoderTiny | None = None

    @property
    def expects_pooled_text(self) -> bool:
        return self.unet.config.expects_sizes

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """The encoder from prompts to context that the U-Net was trained with."""
        if not self.expects_pooled_text:
            return super().prompt_encoder
        pairs: tuple[Any, ...] = ((self.text_encoder, self.tokenizer), (self.text_encoder_2, self.tokenizer_2))
        return PenultimateStates([pair for pair in pairs if pair[0] is not None])

    def with_unet(self, unet: UNet2DConditionModel) -> Components:
        """Return these components with another U-Net."""
        return replace(self, unet=unet)

    @property
    def task(self) -> Task:
        """What the U-Net was trained for, which shows in what it takes besides noisy latents."""
        if self.low_res_schedule is not None:
            return "upscale"
        config, channels = self.unet.config, self.autoencoder.config.latent_channels
        masked = not config.self_conditioning and config.in_channels == 2 * channels + 1
        return "inpaint" if masked else "text_to_image"

    @property
    def inpaints(self) -> bool:
        """Whether the U-Net takes a mask and masked image latents besides noisy latents."""
        return self.task == "inpaint"

    @property
    def upscales(self) -> bool:
        """Whether the U-Net takes a small picture besides noisy latents."""
        return self.task == "upscale"

    @property
    def reads_text(self) -> bool:
        """Whether prompts say what is generated; an unconditional model, trained without labels, knows none."""
        return not isinstance(self.text_encoder, LabelEncoder) or bool(self.text_encoder.config.labels)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the networks compute in."""
        return self.unet.conv_in.weight.dtype

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width, in pixels, that the model was trained at."""
        side, factor = self.unet.config.sample_size or 64, self.autoencoder.config.downsample_factor
        height, width = side if isinstance(side, tuple) else (side, side)
        return height * factor, width * factor

    @property
    def upcasts(self) -> bool:
        """Whether the autoencoder overflows in float16 and runs in float32 instead.

        As in diffusers, `force_upcast` is heeded of Stable Diffusion XL and of what enlarges, where it is known to be
        true or false; others have it as a default.
        """
        config = self.autoencoder.config
        heeded = self.upscales or self.expects_pooled_text
        return heeded and not isinstance(config, PixelSpaceConfig) and config.force_upcast

    def denoiser(self, network: Network) -> Denoiser:
        """Return `network`, this model's U-Net guided or not, as the function from x to x0 that samplers call."""
        limit = 1.0 if isinstance(self.autoencoder, PixelSpace) else None
        schedule, self_conditioning = self.schedule, self.unet.config.self_conditioning
        return as_denoiser(network, schedule.prediction_type, self_conditioning, limit, schedule.thresholding)

    def tuned_table(self, steps: int) -> TunedTable:
        """Return the table of the model's own sampler.

        Raises:
            InputError: it has none of so many steps.
        """
        if self.tuned is None:
            raise InputError(
                "this model has no tuned sampler; make one with `latentdiff distill MODEL --data DIR --out DIR`, "
                "or choose dpmpp_2m"
            )
        return self.tuned.table(self.schedule, steps)

    @property
    def vae(self) -> Path | None:
        """File or folder of the autoencoder that was loaded in place of the model's own; None for that."""
        return None if self.source is None else self.source.vae

    @property
    def model_hash(self) -> str:
        """SHA-256 of the files that the model was loaded from; "" where it was not."""
        return "" if self.source is None else self.source.hash


def moved(components: Components, device: torch.device, dtype: torch.dtype | None = None) -> Components:
    """Return the components of a model with its networks on a device, and in a dtype if one is given.

    `components` stay as they are. What has both already is shared, not copied.
    """
    names = ("unet", "autoencoder", "text_encoder", "text_encoder_2", "tiny_decoder")
    networks = {name: network for name in names if (network := getattr(components, name)) is not None}
    shared = {name: share_weights(network).to(device, dtype) for name, network in networks.items()}
    return replace(components, **shared)


def check_fit(folder: Path, components: Components) -> None:
    """Raise ModelConfigError where the components cannot work together."""
    unet, channels = components.unet.config, components.autoencoder.config.latent_channels
    learned = components.schedule.variance_type == "learned_range"
    width = unet.cross_attention_dim if isinstance(unet.cross_attention_dim, int) else unet.cross_attention_dim[0]
    encoders = [encoder for encoder in (components.text_encoder, components.text_encoder_2) if encoder is not None]
    expected = 2 * channels + 1 if components.inpaints else channels * (1 + unet.self_conditioning)
    if components.upscales:
        expected = channels + 3
        if unet.num_class_embeds is None:
            raise ModelConfigError(f"{folder}: a unet that enlarges a picture needs num_class_embeds, its noise levels")
    pairs = {
        "input channels of unet and those of vae": (unet.in_channels, expected),
        "output channels of unet and those of vae": (unet.out_channels, channels * (1 + learned)),
        "width of unet's context and of text_encoder": (width, sum(encoder.config.hidden_size for encoder in encoders)),
    }
    for what, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise ModelConfigError(f"{folder}: {what} must be equal for text-to-image, got {ours} and {theirs}")
    sides = unet.sample_size if isinstance(unet.sample_size, tuple) else (unet.sample_size or 64,) * 2
    factor = components.autoencoder.config.downsample_factor
    if len(sides) != 2 or not all(1 <= side * factor <= LARGEST_SIDE for side in sides):
        shown = str(unet.sample_size)[:40]
        raise ModelConfigError(
            f"{folder}: sample_size of unet must be one side or two, of {LARGEST_SIDE // factor} latents at most, "
            f"got {shown}"
        )
    pooled = encoders[-1].config
    if unet.expects_sizes and not (isinstance(pooled, CLIPTextConfig) and pooled.with_projection):
        raise ModelConfigError(f"{folder}: unet expects pooled text, so the last text encoder must have a projection")
    for encoder, tokenizer in zip(encoders, (components.tokenizer, components.tokenizer_2)):
        if tokenizer is None or isinstance(encoder.config, LabelConfig):
            continue
        if tokenizer.size > encoder.config.vocab_size:
            raise ModelConfigError(
                f"{folder}: the tokenizer has {tokenizer.size} tokens, its text encoder {encoder.config.vocab_size}"
            )
        window, longest = tokenizer.model_max_length, encoder.config.max_position_embeddings
        if window > longest:
            raise ModelConfigError(
                f"{folder}: tokenizer windows of {window} tokens exceed the text encoder's {longest}"
            )

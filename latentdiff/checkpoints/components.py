"""The components of a pipeline, and whether they fit together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from latentdiff.checkpoints.hashes import model_hash, vae_hash
from latentdiff.diffusion.prediction import Denoiser, Network, as_denoiser
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import ModelConfigError
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.bert import BertModel
from latentdiff.models.clip import CLIPTextConfig, CLIPTextModel
from latentdiff.models.encoding import PenultimateStates, PromptEncoder, TokenStates
from latentdiff.models.lora import WeightedLoRA
from latentdiff.models.pixels import LabelConfig, LabelEncoder, PixelSpace
from latentdiff.models.t5 import T5EncoderModel
from latentdiff.models.tokenizer import Tokenizer
from latentdiff.models.unet import UNet2DConditionModel

__all__ = ["Autoencoder", "Components", "TextEncoder", "check_fit"]

LARGEST_SIDE = 2048  # of the pictures that a model draws unless told otherwise, in pixels
Autoencoder = AutoencoderKL | PixelSpace
TextEncoder = BertModel | CLIPTextModel | LabelEncoder | T5EncoderModel


@dataclass(frozen=True)
class Components:
    """Everything a pipeline is made of.

    Attributes:
        unet: None only while it is being made.
        tokenizer: None where the text encoder needs none.
        text_encoder_2, tokenizer_2: the second ones of Stable Diffusion XL; its refiner's only ones are the first here.
        low_res_schedule: how noise is put on the small picture, for a model that enlarges one; None for others.
        force_zeros: whether the empty negative prompt is the zero vector, not what the encoders make of it.
        name: how settings refer to the model.
        folder: folder or file that they were loaded from; None when they were not, or are no longer what is there.
        vae: file or folder that the autoencoder was loaded from in place of the model's own; None for that.
        embeddings: learned words besides, with the files they are from; see `checkpoints.textual_inversion`.
        loras: what is in the weights besides, in this order; see `latentdiff.checkpoints.lora.apply_loras`.
        base: the components with the networks as they are without; None where there is nothing besides.
    """

    unet: UNet2DConditionModel | None
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    tokenizer: Tokenizer | None
    schedule: NoiseSchedule
    text_encoder_2: CLIPTextModel | None = None
    tokenizer_2: Tokenizer | None = None
    low_res_schedule: NoiseSchedule | None = None
    force_zeros: bool = False
    name: str = "unsaved"
    folder: Path | None = None
    vae: Path | None = None
    embeddings: tuple[Mapping[str, str], ...] = ()
    loras: tuple[WeightedLoRA, ...] = ()
    base: Components | None = None

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """What turns prompts into context, with the encoders that the U-Net was trained with."""
        if isinstance(self.text_encoder, LabelEncoder):
            return self.text_encoder
        assert self.tokenizer is not None
        if self.unet is None or self.unet.config.addition_embed_type is None:
            return TokenStates(self.text_encoder, self.tokenizer)
        pairs: tuple[Any, ...] = ((self.text_encoder, self.tokenizer), (self.text_encoder_2, self.tokenizer_2))
        return PenultimateStates([pair for pair in pairs if pair[0] is not None])

    @property
    def inpaints(self) -> bool:
        """Whether the U-Net sees a mask and the latents of what is kept beside its own."""
        assert self.unet is not None
        config = self.unet.config
        return not config.self_conditioning and config.in_channels == 2 * self.autoencoder.config.latent_channels + 1

    @property
    def upscales(self) -> bool:
        """Whether the U-Net sees a small picture beside its latents, which the result shows enlarged."""
        return self.low_res_schedule is not None

    def denoiser(self, network: Network) -> Denoiser:
        """Return a function that gives this model's U-Net's outputs, guided or not, as samplers call it."""
        assert self.unet is not None
        limit = 1.0 if isinstance(self.autoencoder, PixelSpace) else None
        return as_denoiser(network, self.schedule.prediction_type, self.unet.config.self_conditioning, limit)

    @cached_property
    def model_hash(self) -> str:
        """SHA-256 of the files, read when first asked for; "" for those that were not loaded from a folder."""
        if self.folder is None:
            return ""
        own = model_hash(self.folder)
        return own if self.vae is None else sha256((own + vae_hash(self.vae)).encode()).hexdigest()


def check_fit(folder: Path, components: Components) -> None:
    """Raise ModelConfigError where the components cannot work together."""
    assert components.unet is not None
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
    if unet.addition_embed_type is not None and not (isinstance(pooled, CLIPTextConfig) and pooled.with_projection):
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

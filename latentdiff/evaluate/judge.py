"""The image-text model with its text encoder: how well pictures and texts fit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.checkpoints import embedded_model, load_text_encoder
from latentdiff.checkpoints.components import TextEncoder
from latentdiff.checkpoints.folder import reading
from latentdiff.checkpoints.hashes import network_digest
from latentdiff.checkpoints.loader import load_network
from latentdiff.errors import InputError, ModelMismatchError
from latentdiff.models.image_text import ImageTextModel, mean_states
from latentdiff.models.tokenizer import Tokenizer

__all__ = ["Judge", "load_judge"]

FOLDER = "image-text"  # in assets/
IMAGES_AT_ONCE = 64


@dataclass(frozen=True)
class Judge:
    """An image-text model and the text encoder beside it.

    Attributes:
        digest: of both.
    """

    model: ImageTextModel
    encoder: TextEncoder
    tokenizer: Tokenizer
    digest: str

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """Return unit vectors (N, D) of images (N, 3, H, W) in [-1, 1]."""
        device = self.model.logit_scale.device
        return torch.cat([self.model.embed_images(part.to(device)) for part in images.split(IMAGES_AT_ONCE)])

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (M, D) of texts."""
        parts = [texts[first : first + IMAGES_AT_ONCE] for first in range(0, len(texts), IMAGES_AT_ONCE)]
        return torch.cat([self.model.embed_texts(mean_states(self.encoder, self.tokenizer, one)) for one in parts])

    def fits(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Return how well each image (N, 3, H, W) in [-1, 1] fits its text, (N,), -1 to 1."""
        return (self.images(images) * self.texts(texts)).sum(dim=1)


def load_judge(
    folder: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    text_encoder: str | os.PathLike[str] | None = None,
) -> Judge:
    """Load an image-text model that `latentdiff train` made, with the text encoder that it was trained beside.

    Args:
        folder: of the model; that of the package, or of a checkout, when None.
        text_encoder: model folder with text_encoder/ and tokenizer/; the embedded model when None.

    Raises:
        InputError: this copy of the package came without the model.
        ModelLoadError: the model is refused, or was trained beside another text encoder.
    """
    place = _shipped() if folder is None else Path(folder)
    with reading(place):
        model: ImageTextModel = load_network(place.parent, place.name, ("ImageTextModel",), torch.float32, device)
    encoder, tokenizer = load_text_encoder(embedded_model() if text_encoder is None else text_encoder, device=device)
    wanted, found = model.config.text_encoder, network_digest(encoder, tokenizer)
    if wanted != found:
        raise ModelMismatchError(
            f"{place} was trained beside the text encoder {wanted}, got {found}; pass the folder of that one"
        )
    return Judge(model.eval(), encoder, tokenizer, network_digest(model))


def _shipped() -> Path:
    place = embedded_model().parent / FOLDER
    if not place.is_dir():
        raise InputError(
            "this copy of latentdiff came without the image-text model; train one with `latentdiff train "
            "configs/emoji-image-text.yaml` and pass its folder as --judge, or leave out what needs it"
        )
    return place

"""The losses of an image-text model, and what it is measured by."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, right: Tensor) -> Tensor:
    """Return the mean cross entropy of finding the texts of an image among a batch's, and the images of a text.

    Args:
        images, texts: (B, D) unit vectors.
        scale: of their similarities.
        right: (B, B) bool, whether the text of each column says what the image of a row shows; True on the diagonal.

    Source: Radford et al. 2021, arXiv 2103.00020, Fig. 3; several right answers as in Khosla et al. 2020,
    arXiv 2004.11362, Eq. 2.
    """
    logits = scale * images @ texts.T  # (B, B)
    parts = ((logits, right.to(logits)), (logits.T, right.T.to(logits)))
    by_image, by_text = (F.cross_entropy(found, own / own.sum(dim=1, keepdim=True)) for found, own in parts)
    return (by_image + by_text) / 2


def least_loss(right: Tensor) -> float:
    """Return the least that `contrastive_loss` can be, where some texts are right for several images."""
    return float((right.sum(dim=0).double().log().mean() + right.sum(dim=1).double().log().mean()) / 2)


def label_loss(images: Tensor, labels: Tensor, scale: Tensor, right: Tensor) -> Tensor:
    """Return the mean cross entropy of finding the label of an image among all labels; 0 where no image has one.

    Args:
        images: (B, D) unit vectors.
        labels: (M, D) unit vectors of the texts of all labels.
        scale: of their similarities.
        right: (B,) int64, the label of each image; -1 for one that has none.
    """
    logits = scale * images @ labels.T  # (B, M)
    losses = F.cross_entropy(logits, right, ignore_index=-1, reduction="sum")
    return losses / (right >= 0).sum().clamp(min=1)


@torch.no_grad()
def ranks(images: Tensor, texts: Tensor, right: Tensor) -> Tensor:
    """Return for each image how many texts fit better than the right one, (N,) int64: 0 where that is the first.

    Args:
        images: (N, D) unit vectors.
        texts: (M, D) unit vectors.
        right: (N,) int64, number of the right text of each image.
    """
    similarities = images @ texts.T  # (N, M)
    own = similarities.gather(1, right[:, None])
    return (similarities > own).sum(dim=1)


@torch.no_grad()
def calibration_error(logits: Tensor, right: Tensor, bins: int = 10) -> float:
    """Return how far a model's confidence in its first choice is from how often that is right, 0 to 1.

    Args:
        logits: (N, M).
        right: (N,) int64, number of the right one of M.
        bins: of confidence, equally wide, in each of which the two are compared.

    Source: Guo et al. 2017, arXiv 1706.04599, Eq. 5.
    """
    confidence, chosen = logits.float().softmax(dim=1).max(dim=1)
    gaps = confidence - (chosen == right).float()
    groups = (confidence * bins).long().clamp(max=bins - 1)
    return float(torch.zeros(bins).to(gaps).index_add(0, groups, gaps).abs().sum()) / len(gaps)

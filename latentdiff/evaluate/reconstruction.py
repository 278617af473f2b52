"""Metrics of a model's autoencoder: how like real pictures are to what comes back of them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from latentdiff.checkpoints.hashes import weights_digest
from latentdiff.errors import InputError, MissingDependencyError
from latentdiff.evaluate.distances import frechet_of
from latentdiff.evaluate.evaluation import Evaluation
from latentdiff.evaluate.figure import Figure
from latentdiff.evaluate.intervals import Estimate, Floats, grouped_jackknife, mean
from latentdiff.evaluate.sets import blurred

__all__ = ["lpips", "psnr", "psnr_of", "rfid", "ssim", "ssim_of"]

RANGE = 255  # of the 8-bit values that are compared
WINDOW, SIGMA = 11, 1.5  # in pixels, of SSIM
SSIM_PROTOCOL: Mapping[str, float | str] = {"window": WINDOW, "sigma": SIGMA, "data_range": RANGE, "border": "left out"}
SMALLEST = 16  # in pixels, the side of a picture that LPIPS can look at
GROUPS = 10  # of the jackknife
IMAGES_AT_ONCE = 16

Compare = Callable[[Tensor, Tensor], Tensor]
"""Images (B, 3, H, W) in [-1, 1] and others -> a value of each pair, (B,)."""


def rfid(evaluation: Evaluation) -> list[Figure]:
    """Measure the Frechet distance of test pictures and what the autoencoder makes of the same ones.

    Ceiling: of the pictures blurred. The interval leaves out a picture of both sets at once.
    """
    returned = evaluation.features("returned", evaluation.returned)
    real = evaluation.features("real", evaluation.real)
    damaged = evaluation.features("damaged", blurred(evaluation.real))
    if len(real) < 2:
        raise InputError(f"rfid needs at least 2 test pictures, got {len(real)}; pass more")

    def statistic(rows: Floats) -> float:
        chosen = rows.astype(int)
        return frechet_of(returned[chosen], real[chosen])

    groups = min(GROUPS, len(real) // 2)  # two pictures at least are left in
    estimate = grouped_jackknife(statistic, np.arange(float(len(real))), groups=groups)
    ceiling = frechet_of(damaged, real)
    return [evaluation.figure("rfid", estimate, "lower", evaluation.network.protocol, drawn=False, ceiling=ceiling)]


def psnr(evaluation: Evaluation) -> list[Figure]:
    """Measure the mean over test pictures of the peak signal-to-noise ratio, in 8 bits; infinite where all agree."""
    skimage_metrics(evaluation)
    return [_figure(evaluation, "psnr", psnr_of, "higher", {"data_range": RANGE}, unit="dB")]


def psnr_of(images: Tensor, others: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of each pair of images (B, 3, H, W) in [-1, 1], (B,)."""
    compare = skimage_metrics().peak_signal_noise_ratio
    with np.errstate(divide="ignore"):  # of pairs that agree, whose ratio is infinite
        return torch.tensor([compare(*pair, data_range=RANGE) for pair in zip(_levels(images), _levels(others))])


def ssim(evaluation: Evaluation) -> list[Figure]:
    """Measure the mean over test pictures of the structural similarity, with a Gaussian window.

    Source: Wang et al. 2004, IEEE TIP 13(4), Eq. 13.
    """
    skimage_metrics(evaluation)
    return [_figure(evaluation, "ssim", ssim_of, "higher", SSIM_PROTOCOL)]


def ssim_of(images: Tensor, others: Tensor) -> Tensor:
    """Return the structural similarity of each pair of images (B, 3, H, W) in [-1, 1], (B,).

    Raises:
        InputError: they are smaller than its window.
    """
    if min(images.shape[-2:]) < WINDOW:
        raise InputError(f"ssim needs pictures of {WINDOW} pixels or more, got {min(images.shape[-2:])}")
    compare = partial(
        skimage_metrics().structural_similarity,  # which leaves out the edge, where the window stands over
        gaussian_weights=True,
        sigma=SIGMA,
        use_sample_covariance=False,  # as in the paper
        data_range=RANGE,
        channel_axis=0,
    )
    return torch.tensor([compare(*pair) for pair in zip(_levels(images), _levels(others))], dtype=torch.float64)


def lpips(evaluation: Evaluation) -> list[Figure]:
    """Measure the mean over test pictures of LPIPS, with the weights of VGG16 that the request names.

    Source: Zhang et al. 2018, arXiv 1801.03924, Eq. 1.
    """
    network = evaluation.perceptual
    device = next(network.parameters()).device
    if min(evaluation.real.shape[-2:]) < SMALLEST:
        raise InputError(f"lpips needs pictures of {SMALLEST} pixels or more, got {min(evaluation.real.shape[-2:])}")

    def compare(returned: Tensor, real: Tensor) -> Tensor:
        with torch.no_grad():
            return network(returned.to(device), real.to(device)).cpu()

    return [_figure(evaluation, "lpips", compare, "lower", {"lpips_hash": weights_digest(network)})]


def _figure(
    evaluation: Evaluation,
    name: str,
    compare: Compare,
    better: Literal["lower", "higher"],
    protocol: Mapping[str, float | str],
    **more: str,
) -> Figure:
    """Return the mean of a comparison of pictures with what comes back of them; ceiling: with them blurred."""
    real = evaluation.real
    values, ceiling = _compared(compare, evaluation.returned, real), _compared(compare, blurred(real), real)
    named = [f"{number} {caption}" for number, caption in zip(evaluation.chosen, evaluation.captions)]
    items = dict(zip(named, map(float, values)))
    if np.isinf(values).any():  # of which there is no interval
        estimate = Estimate(math.inf, math.nan, math.nan, len(values))
    else:
        estimate = mean(values)
    bound = float(ceiling.mean())
    return evaluation.figure(name, estimate, better, protocol, drawn=False, ceiling=bound, items=items, **more)


def _compared(compare: Compare, images: Tensor, others: Tensor) -> Floats:
    parts = zip(images.split(IMAGES_AT_ONCE), others.split(IMAGES_AT_ONCE))
    return torch.cat([compare(*pair) for pair in parts]).double().numpy()


def _levels(images: Tensor) -> Floats:
    """Return images in [-1, 1] as levels 0 .. 255, in float64: variances are differences of large numbers."""
    return images.double().add(1).mul(RANGE / 2).round().cpu().numpy()


def skimage_metrics(_: Evaluation | None = None) -> ModuleType:
    """Return the metrics of scikit-image.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module("skimage.metrics")
    except ImportError as error:
        raise MissingDependencyError(
            "this metric needs scikit-image, which is not installed; `pip install 'latentdiff[evaluate]'`"
        ) from error

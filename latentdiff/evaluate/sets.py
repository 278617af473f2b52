"""Metrics of a whole set of pictures against real ones: FID, KID, MMD, precision and recall."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from PIL import ImageFilter
from torch import Tensor

from latentdiff.evaluate import distances
from latentdiff.evaluate.evaluation import Evaluation
from latentdiff.evaluate.figure import Figure
from latentdiff.evaluate.intervals import Estimate, Floats
from latentdiff.images import from_tensor, to_tensor

__all__ = ["fid", "kid", "mmd", "precision_recall"]

Distance = Callable[[Floats, Floats], Estimate]
"""Features of two sets, (n, D) and (m, D) -> their distance."""

BLUR = 1 / 32  # sigma of the damaged pictures, as a share of the side


def fid(evaluation: Evaluation) -> list[Figure]:
    """Measure the Frechet distance at this n, and extrapolated to infinitely many pictures."""
    plain, extrapolated = distances.frechet, distances.frechet_extrapolated
    return [
        _distance(evaluation, "fid", plain, partial(plain, groups=1)),
        _distance(evaluation, "fid_infinite", extrapolated, partial(extrapolated, groups=1)),
    ]


def kid(evaluation: Evaluation) -> list[Figure]:
    """Measure the unbiased kernel distance with the cubic kernel."""
    return [_distance(evaluation, "kid", distances.kernel_distance)]


def mmd(evaluation: Evaluation) -> list[Figure]:
    """Measure the unbiased kernel distance with a Gaussian kernel as wide as real pictures are apart."""
    bandwidth = distances.median_distance(_real(evaluation))
    measure = partial(distances.gaussian_distance, bandwidth=bandwidth)
    return [_distance(evaluation, "mmd", measure, bandwidth=round(bandwidth, 6))]


def precision_recall(evaluation: Evaluation) -> list[Figure]:
    """Measure the share of pictures that could be real, and of real ones that could be drawn."""
    real = _real(evaluation)
    found = distances.precision_recall(_generated(evaluation), real)
    same = distances.precision_recall(real[::2], real[1::2])
    damaged = distances.precision_recall(_damaged(evaluation), real)
    protocol = {**evaluation.network.protocol, "neighbour": distances.NEAREST, "n_real": len(real)}
    return [
        evaluation.figure(
            name,
            getattr(found, name),
            "higher",
            protocol,
            floor=getattr(same, name).value,
            ceiling=getattr(damaged, name).value,
        )
        for name in ("precision", "recall")
    ]


def _distance(
    evaluation: Evaluation, name: str, measure: Distance, bound: Distance | None = None, **more: float
) -> Figure:
    """Return a distance of generated and real pictures, with that of real ones in two halves and of blurred ones.

    Args:
        bound: the same without an interval, where that takes time.
    """
    real, bound = _real(evaluation), bound or measure
    return evaluation.figure(
        name,
        measure(_generated(evaluation), real),
        "lower",
        {**evaluation.network.protocol, "n_real": len(real), **more},
        floor=bound(real[::2], real[1::2]).value,
        ceiling=bound(_damaged(evaluation), real).value,
    )


def _generated(evaluation: Evaluation) -> Floats:
    return evaluation.features("generated", evaluation.generated)


def _real(evaluation: Evaluation) -> Floats:
    return evaluation.features("real", evaluation.real)


def _damaged(evaluation: Evaluation) -> Floats:
    return evaluation.features("damaged", blurred(evaluation.real))


def blurred(images: Tensor) -> Tensor:
    """Return images (N, 3, H, W) blurred by a Gaussian of `BLUR` of their height."""
    filtered = ImageFilter.GaussianBlur(BLUR * images.shape[-2])
    return to_tensor([image.filter(filtered) for image in from_tensor(images)])

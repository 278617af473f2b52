"""Metric of memorisation: are generated pictures nearer to training pictures than held-out pictures are?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from latentdiff.errors import InputError
from latentdiff.evaluate.evaluation import Evaluation, Reference
from latentdiff.evaluate.features import features_of
from latentdiff.evaluate.figure import Figure
from latentdiff.evaluate.intervals import LEVEL, Estimate, Floats, share
from latentdiff.evaluate.latents import encode, has_latents
from latentdiff.evaluate.sets import blurred
from latentdiff.files import make_folder
from latentdiff.images import from_tensor, sheet, write_png
from latentdiff.marks import COMPOSITE

__all__ = ["Nearest", "memorised", "nearest", "share_below"]

QUANTILE = 0.05  # of held-out pictures' distances, below which a generated picture is called near
QUANTILES = (0.01, 0.05, 0.5)  # that are reported
LEAST = 20  # held-out pictures, of which the first quantile is one
BLOCK = 256  # training pictures that are in memory at once
SIDE = 64  # in pixels, at which larger pictures are compared
PAIRS = 8  # on the picture of the nearest ones

Space = Callable[[Tensor], Floats]
"""Images (B, 3, H, W) in [-1, 1] -> vectors (B, D)."""


@dataclass(frozen=True)
class Nearest:
    """The nearest of some vectors to each of others: how far away it is, (n,), and which it is, (n,)."""

    distances: Floats
    places: NDArray[np.int64]


def memorised(evaluation: Evaluation) -> list[Figure]:
    """Measure the share of generated pictures nearer to a training picture than 5 % of held-out ones are.

    Of a model that has not memorised it is near 0.05, of one that copies near 1. Floor: of held-out pictures, one half
    against the other. Ceiling: of blurred training pictures, which are near copies. Distances are of pixels, of the
    autoencoder's latents where there is one, and of features; their quantiles stand beside, with those of held-out
    pictures as floor. The nearest pairs are drawn into the folder of the report: generated above, training below.
    """
    held_out, training = evaluation.reference("test"), evaluation.reference("train")
    _require(evaluation, held_out, training)
    damaged = blurred(training.load(training.sample(len(evaluation.real))))
    queries = {"generated": evaluation.generated, "held out": evaluation.real, "damaged": damaged}
    spaces = _spaces(evaluation)
    vectors = {(space, name): spaces[space](images) for space in spaces for name, images in queries.items()}
    found = nearest(vectors, _training_vectors(evaluation, training, spaces))
    if quantile_of(found["pixels", "held out"].distances, QUANTILE).value == 0:
        raise InputError(
            f"memorised needs held-out pictures that the model has not seen: {QUANTILE:.0%} of the test pictures or "
            "more are training pictures too; leave them out of either"
        )
    figures: list[Figure] = []
    for space in spaces:
        one = {name: found[space, name] for name in queries}
        figures += _figures(evaluation, space, one, training)
        _draw_pairs(evaluation, space, one["generated"], training)
    return figures


def nearest(
    queries: Mapping[tuple[str, str], Floats], blocks: Iterator[Mapping[str, Floats]]
) -> dict[tuple[str, str], Nearest]:
    """Return the nearest of many vectors, which come block by block, to each of some.

    Args:
        queries: vectors (n, D) by space and name.
        blocks: vectors (b, D) of each space.

    Returns:
        Root mean square differences, and places counted over all blocks.
    """
    best = {key: np.full(len(rows), math.inf) for key, rows in queries.items()}
    places = {key: np.zeros(len(rows), np.int64) for key, rows in queries.items()}
    start = 0
    for block in blocks:
        for key, rows in queries.items():
            others = block[key[0]]
            squares = np.square(rows).sum(axis=1)[:, None] + np.square(others).sum(axis=1) - 2 * rows @ others.T
            closest = squares.argmin(axis=1)
            # The difference itself: what the sum above leaves of nearly equal vectors is rounding.
            distances = np.sqrt(np.square(rows - others[closest]).mean(axis=1))
            nearer = distances < best[key]
            best[key][nearer], places[key][nearer] = distances[nearer], start + closest[nearer]
        start += len(others)
    return {key: Nearest(best[key], places[key]) for key in queries}


def share_below(values: Floats, others: Floats, quantile: float) -> Estimate:
    """Return the share of values below a quantile of others, with an interval that counts the noise of both.

    The ends of Wilson's interval at the quantile, and the shares at the ends of the quantile's own interval, are put
    together as those of two independent parts.

    Source: Zou and Donner 2008, Statistics in Medicine 27.
    """
    threshold = quantile_of(others, quantile)
    at = share(values < threshold.value)
    below, above = float((values < threshold.low).mean()), float((values < threshold.high).mean())
    low = at.value - math.hypot(at.value - at.low, at.value - below)
    high = at.value + math.hypot(at.high - at.value, above - at.value)
    return Estimate(at.value, max(0.0, low), min(1.0, high), len(values))


def quantile_of(values: Floats, quantile: float) -> Estimate:
    """Return a quantile of independent distances with its interval: no distribution is assumed.

    It is at rank (n + 1) q, so that a share q of the distribution is below it on average. Ends at whole ranks would
    make the interval too wide; between two values a line stands in for the distribution.

    Source: Hutson 1999, Journal of Applied Statistics 26.
    """
    ordered, n = np.sort(values), len(values)
    low, high = (_rank(n, quantile, end) for end in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    lowest = 0.0 if low < 1 else float(np.interp(low, range(1, n + 1), ordered))  # without a value below it
    value = float(np.quantile(ordered, quantile, method="weibull"))
    return Estimate(value, lowest, float(np.interp(high, range(1, n + 1), ordered)), n)


def _rank(n: int, quantile: float, probability: float) -> float:
    """Return the rank, a fraction, of the value that lies above a quantile of n with a probability.

    The share of a distribution below the value of rank r is of the beta distribution (r, n + 1 - r).
    """
    from scipy.optimize import brentq
    from scipy.special import betainc

    return float(brentq(lambda rank: betainc(rank, n + 1 - rank, quantile) - 1 + probability, 1e-9, n + 1 - 1e-9))


def _require(evaluation: Evaluation, held_out: Reference, training: Reference) -> None:
    """Raise InputError where there is no yardstick, or pictures of other sizes."""
    if held_out.split == training.split:
        raise InputError(
            f"memorised needs test pictures beside those trained on, got both of the split {training.split}; pass "
            "--split test"
        )
    if len(evaluation.real) < LEAST:
        raise InputError(
            f"memorised measures by at least {LEAST} held-out pictures, got {len(evaluation.real)}; pass more, or "
            "raise --n"
        )
    sizes = [images.shape[-1:-3:-1] for images in (evaluation.real, training.load([0]), evaluation.generated)]
    for size in sizes[1:]:
        if size != sizes[0]:
            wanted, got = ("x".join(map(str, one)) for one in (sizes[0], size))
            raise InputError(f"memorised compares pictures of one size, got {got} beside {wanted}; scale them to that")


def _spaces(evaluation: Evaluation) -> dict[str, Space]:
    """Return what distances are measured in, by name."""
    spaces: dict[str, Space] = {"pixels": lambda images: _rows(_reduced(images))}
    if evaluation.pipe is not None and has_latents(components := evaluation.pipe.components):
        spaces["latents"] = lambda images: _rows(encode(components, images))
    spaces["features"] = lambda images: features_of(images, evaluation.network)
    return spaces


def _training_vectors(
    evaluation: Evaluation, training: Reference, spaces: Mapping[str, Space]
) -> Iterator[dict[str, Floats]]:
    """Yield the vectors of training pictures in every space, a block of pictures at a time."""
    starts = range(0, len(training), BLOCK)
    for start in tqdm(starts, unit="block", disable=not evaluation.request.progress):
        images = training.load(range(start, min(start + BLOCK, len(training))))
        yield {name: space(images) for name, space in spaces.items()}


def _figures(evaluation: Evaluation, space: str, found: Mapping[str, Nearest], training: Reference) -> Iterator[Figure]:
    """Yield the share of near pictures and the quantiles of distances in a space."""
    generated, held_out, damaged = (found[name].distances for name in ("generated", "held out", "damaged"))
    measured = {
        "pixels": {"resize": f"bilinear antialiased to {SIDE}"},
        "latents": {},
        "features": evaluation.network.protocol,
    }
    protocol = {"training_hash": training.digest, "n_training": len(training), "n_held_out": len(held_out)}
    protocol |= measured[space]
    items = {f"{number} nearest {place}": float(distance) for number, (place, distance) in enumerate(_pairs(found))}
    yield evaluation.figure(
        f"memorised/{space}",
        share_below(generated, held_out, QUANTILE),
        "lower",
        {**protocol, "quantile": QUANTILE},
        floor=share_below(held_out[1::2], held_out[::2], QUANTILE).value,
        ceiling=share_below(damaged, held_out, QUANTILE).value,
        items=items,
    )
    for quantile in QUANTILES:
        yield evaluation.figure(
            f"memorised/{space}/distance_{quantile:.0%}",
            quantile_of(generated, quantile),
            None,
            protocol,
            floor=quantile_of(held_out, quantile).value,
            ceiling=quantile_of(damaged, quantile).value,
        )


def _pairs(found: Mapping[str, Nearest]) -> list[tuple[int, float]]:
    one = found["generated"]
    return list(zip(one.places.tolist(), one.distances.tolist()))


def _draw_pairs(evaluation: Evaluation, space: str, found: Nearest, training: Reference) -> None:
    """Write a picture of the nearest pairs into the folder of the report: generated above, training below."""
    first = found.distances.argsort(kind="stable")[:PAIRS]
    neighbours = torch.cat([training.load([place]) for place in found.places[first].tolist()])
    pictures = from_tensor(torch.cat([evaluation.generated[first.tolist()], neighbours]))
    make_folder(evaluation.request.out)
    far = ", ".join(f"{distance:.4g}" for distance in found.distances[first])
    grid = sheet(pictures, len(first))
    write_png(evaluation.request.out / f"memorised-{space}.png", grid, {"distances": far}, COMPOSITE)


def _reduced(images: Tensor) -> Tensor:
    """Return images (N, 3, H, W) with no side above `SIDE`."""
    longest = max(images.shape[-2:])
    if longest <= SIDE:
        return images
    size = [max(1, round(side * SIDE / longest)) for side in images.shape[-2:]]
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def _rows(values: Tensor) -> Floats:
    return values.flatten(1).double().numpy()

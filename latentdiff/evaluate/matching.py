"""Metrics of how well pictures fit their texts, by an image-text model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentdiff.errors import InputError
from latentdiff.evaluate.evaluation import Evaluation
from latentdiff.evaluate.features import features_of
from latentdiff.evaluate.figure import Figure
from latentdiff.evaluate.intervals import Floats, mean, share
from latentdiff.evaluate.pictures import Item, load_pictures
from latentdiff.evaluate.sets import blurred
from latentdiff.evaluate.tasks import own_task
from latentdiff.images import open_image

__all__ = ["clip", "label_of", "neighbours", "retrieval"]

BEST = (1, 5)
NEAREST = 5
BLOCK = 1024  # real pictures in memory at once
PROMPTS = 200


def clip(evaluation: Evaluation) -> list[Figure]:
    """Measure the mean similarity, times 100, of pictures and the captions that they were drawn from.

    Floor: of real pictures and their captions. Ceiling: of pictures and the captions of others.

    Source: Hessel et al. 2021, arXiv 2104.08718, without their factor and cut at 0.
    """
    judge, drawn = evaluation.judge, _with_prompts(evaluation)
    prompts = [item.prompt for _, item in drawn]
    fits = 100 * judge.fits(evaluation.generated, prompts).cpu().double().numpy()
    others = 100 * judge.fits(evaluation.generated, [prompts[-1], *prompts[:-1]])
    return [
        evaluation.figure(
            "clip",
            mean(fits),
            "higher",
            {"judge": judge.digest},
            floor=_fit_of_real(evaluation) if "test" in evaluation.references else None,
            ceiling=float(others.mean()),
            **evaluation.by_item(drawn, fits.tolist()),
        )
    ]


def _fit_of_real(evaluation: Evaluation) -> float:
    return float(100 * evaluation.judge.fits(evaluation.real, evaluation.captions).mean())


def retrieval(evaluation: Evaluation) -> list[Figure]:
    """Measure how often a picture fits the text that it was drawn from best of all texts, or is among the five best.

    The texts are the different labels of the test pictures (their `thing`, or first caption); prompts are drawn from
    them with the seed. A model that inpaints or enlarges has captions of test pictures as prompts, with their remains.
    Floor: of a real picture of each text instead, so what is missing there to 1 the judge gets wrong.
    """
    judge, labels = evaluation.judge, _labels(evaluation)
    if len(labels) < 2:
        raise InputError(f"retrieval needs at least 2 different texts, got {len(labels)}; pass more captioned pictures")
    found = _labelled(evaluation, labels)
    labels = sorted({*labels, *(one.label for one in found)})
    drawn = [one.drawn for one in found]
    texts = judge.texts(labels)

    def ranks_of(images: Tensor, shown: list[str]) -> NDArray[np.int64]:
        """Return how many texts fit each image better than its own, (N,)."""
        similarities = judge.images(images) @ texts.T  # (N, M)
        numbers = torch.tensor([labels.index(label) for label in shown], device=similarities.device)
        own = similarities.gather(1, numbers[:, None])
        return (similarities > own).sum(dim=1).cpu().numpy()

    ranks = ranks_of(load_pictures([path for path, _ in drawn]), [one.label for one in found])
    real = _real_ones(evaluation, [one.label for one in found])
    of_real = None if real is None else ranks_of(*real)
    protocol = {"judge": judge.digest, "texts": len(labels)}
    return [
        evaluation.figure(
            f"retrieval_top{best}",
            share(ranks < best),
            "higher",
            protocol,
            floor=None if of_real is None else float((of_real < best).mean()),
            **evaluation.by_item(drawn, (ranks < best).tolist()),
        )
        for best in BEST
    ]


def _real_ones(evaluation: Evaluation, labels: list[str]) -> tuple[Tensor, list[str]] | None:
    """Return a real picture of each label that there are any of, drawn with the seed, and these labels."""
    reference, random = evaluation.references.get("test"), np.random.default_rng(evaluation.request.seed)
    if reference is None:
        return None
    names = np.array(["" if row.get("variant") else label_of(row) for row in reference.rows])
    there = [(label, places) for label in labels if len(places := np.flatnonzero(names == label))]
    if not there:
        return None
    images = reference.load([int(random.choice(places)) for _, places in there])
    return images, [label for label, _ in there]


def neighbours(evaluation: Evaluation) -> list[Figure]:
    """Measure how often one of the five nearest real pictures has the text that a picture was drawn from as its label.

    The pictures are those of `retrieval`; they are looked up among all test pictures by Euclidean distance of features,
    without the one whose remains a picture was made of.
    Floor: of as many real pictures, each left out of those it is looked up among. Ceiling: of these, blurred.
    """
    reference, network = evaluation.reference("test"), evaluation.network
    found = _labelled(evaluation, _labels(evaluation))
    drawn, own = [one.drawn for one in found], np.array([one.place for one in found])
    features = features_of(load_pictures([path for path, _ in drawn]), network)
    real = np.concatenate([features_of(reference.load(block), network) for block in _blocks(len(reference))])
    names = np.array([label_of(row) for row in reference.rows])
    hits = _near(features, np.array([one.label for one in found]), real, names, own)
    apart = np.array(reference.sample(len(drawn)))
    damaged = features_of(blurred(reference.load(apart.tolist())), network)
    floor, ceiling = (_near(some, names[apart], real, names, apart).mean() for some in (real[apart], damaged))
    protocol = {**network.protocol, "n_real": len(real), "nearest": NEAREST}
    items = evaluation.by_item(drawn, hits.tolist())
    return [
        evaluation.figure(
            "neighbours", share(hits), "higher", protocol, floor=float(floor), ceiling=float(ceiling), **items
        )
    ]


def _near(
    features: Floats,
    texts: NDArray[np.str_],
    real: Floats,
    names: NDArray[np.str_],
    without: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Return whether one of the nearest real pictures of each has its text, (N,).

    Args:
        features, texts: (N, D) and (N,).
        real, names: of all real pictures.
        without: place of the real picture that is left out for each, (N,); -1 for none.
    """
    squares = np.square(features).sum(axis=1)[:, None] - 2 * features @ real.T + np.square(real).sum(axis=1)
    left_out = np.flatnonzero(without >= 0)
    squares[left_out, without[left_out]] = np.inf
    nearest = np.argsort(squares, axis=1, kind="stable")[:, :NEAREST]
    there = np.isfinite(np.take_along_axis(squares, nearest, axis=1))  # where others are fewer
    return ((names[nearest] == texts[:, None]) & there).any(axis=1)


def _blocks(count: int) -> Iterator[range]:
    return (range(first, min(first + BLOCK, count)) for first in range(0, count, BLOCK))


def label_of(row: Mapping[str, Any]) -> str:
    """Return what a picture is of: its `thing`, or its first caption."""
    return str(row.get("thing") or row["captions"][0])


@dataclass(frozen=True)
class Labelled:
    """A picture that is to be found again.

    Attributes:
        drawn: it, and what was asked for.
        label: of what it shows.
        place: of the real picture whose remains it was made of; -1 if it was made of a text alone.
    """

    drawn: tuple[Path, Item]
    label: str
    place: int = -1


def _labelled(evaluation: Evaluation, labels: list[str]) -> list[Labelled]:
    """Return pictures of different labels, or those that were given, or those made of what is left of real ones."""
    if evaluation.given is not None:
        return [Labelled(one, one[1].prompt) for one in _with_prompts(evaluation)]
    task, seed = own_task(evaluation.model.components), evaluation.request.seed
    if task is not None:
        places, rows = evaluation.sample(PROMPTS), evaluation.reference("test").rows
        drawn = evaluation.draw_best("captions", evaluation.spoilt_items(task, places))
        return [Labelled(one, label_of(rows[place]), place) for one, place in zip(drawn, places)]
    chosen = np.random.default_rng(seed).permutation(len(labels))[: evaluation.count(PROMPTS)]
    items = [Item(labels[number], seed + place) for place, number in enumerate(chosen)]
    return [Labelled(one, one[1].prompt) for one in evaluation.draw_best("retrieval", items)]


def _with_prompts(evaluation: Evaluation) -> list[tuple[Path, Item]]:
    drawn = evaluation.drawn
    for path, item in drawn:
        if not item.prompt.strip() and evaluation.given is not None:
            open_image(path)  # a broken one is refused as such
            raise InputError(f"this metric needs the prompt of each picture, got none of {path}; pass --prompts")
    return drawn


def _labels(evaluation: Evaluation) -> list[str]:
    """Return the different labels of the test pictures, and the prompts of given ones, sorted."""
    test = evaluation.references.get("test")
    rows = [] if test is None else test.rows
    given = [] if evaluation.given is None else [item.prompt for _, item in _with_prompts(evaluation)]
    return sorted({*given, *(label_of(row) for row in rows if not row.get("variant"))})

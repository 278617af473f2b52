"""Metrics of how well pictures fit their texts, by an image-text model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from latentdiff.errors import InputError
from latentdiff.evaluate.evaluation import Evaluation
from latentdiff.evaluate.figure import Figure
from latentdiff.evaluate.intervals import mean, share
from latentdiff.evaluate.pictures import Item, load_pictures
from latentdiff.images import open_image

__all__ = ["clip", "retrieval"]

BEST = (1, 5)
PROMPTS = 200


def clip(evaluation: Evaluation) -> list[Figure]:
    """Measure the mean similarity, times 100, of pictures and the captions that they were drawn from.

    Floor: of real pictures and their captions. Ceiling: of pictures and the captions of others.

    Source: Hessel et al. 2021, arXiv 2104.08718, without their factor and cut at 0.
    """
    judge, drawn = evaluation.judge, _with_prompts(evaluation)
    images = judge.images(evaluation.generated)
    texts = judge.texts([item.prompt for _, item in drawn])
    fits = 100 * (images * texts).sum(dim=1).cpu().double().numpy()
    others = 100 * (images * texts.roll(1, dims=0)).sum(dim=1)
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
    judge = evaluation.judge
    real = judge.images(evaluation.real)
    return float(100 * (real * judge.texts(evaluation.captions)).sum(dim=1).mean())


def retrieval(evaluation: Evaluation) -> list[Figure]:
    """Measure how often a picture fits the text that it was drawn from best of all texts, or is among the five best.

    The texts are the different labels of the test pictures (their `thing`, or first caption); prompts are drawn from
    them with the seed.
    """
    judge, labels = evaluation.judge, _labels(evaluation)
    if len(labels) < 2:
        raise InputError(f"retrieval needs at least 2 different texts, got {len(labels)}; pass more captioned pictures")
    drawn = _of_labels(evaluation, labels)
    images = judge.images(load_pictures([path for path, _ in drawn]))
    numbers = torch.tensor([labels.index(item.prompt) for _, item in drawn])
    similarities = images @ judge.texts(labels).T  # (N, M)
    own = similarities.gather(1, numbers[:, None].to(similarities.device))
    ranks = (similarities > own).sum(dim=1).cpu().numpy()
    protocol = {"judge": judge.digest, "texts": len(labels)}
    return [
        evaluation.figure(
            f"retrieval_top{best}",
            share(ranks < best),
            "higher",
            protocol,
            **evaluation.by_item(drawn, (ranks < best).tolist()),
        )
        for best in BEST
    ]


def _of_labels(evaluation: Evaluation, labels: list[str]) -> list[tuple[Path, Item]]:
    """Return pictures of labels, a different one each, or those that were given."""
    if evaluation.given is not None:
        return _with_prompts(evaluation)
    chosen = np.random.default_rng(evaluation.request.seed).permutation(len(labels))[: evaluation.count(PROMPTS)]
    items = [Item(labels[number], evaluation.request.seed + place) for place, number in enumerate(chosen)]
    return list(zip(evaluation.draw("retrieval", items), items))


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
    return sorted({*given, *(str(row.get("thing") or row["captions"][0]) for row in rows if not row.get("variant"))})

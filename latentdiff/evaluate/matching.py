"""Metrics of how well pictures fit their texts, by an image-text model."""

from __future__ import annotations

import numpy as np
import torch

from latentdiff.errors import InputError
from latentdiff.evaluate.evaluation import Evaluation
from latentdiff.evaluate.figure import Figure
from latentdiff.evaluate.intervals import mean, share
from latentdiff.evaluate.pictures import Item, load_pictures

__all__ = ["clip", "retrieval"]

BEST = (1, 5)
PROMPTS = 200


def clip(evaluation: Evaluation) -> list[Figure]:
    """Measure the mean similarity, times 100, of pictures and the captions that they were drawn from.

    Floor: of real pictures and their captions. Ceiling: of pictures and the captions of others.

    Source: Hessel et al. 2021, arXiv 2104.08718, without their factor and cut at 0.
    """
    judge, reference = evaluation.judge, evaluation.reference("test")
    images = judge.images(evaluation.generated)
    captions = _captions(evaluation)[: len(images)]
    texts = judge.texts(captions)
    fits = 100 * (images * texts).sum(dim=1).cpu().double().numpy()
    others = 100 * (images * texts.roll(1, dims=0)).sum(dim=1)
    real = judge.images(evaluation.real)
    own = 100 * (real * judge.texts(reference.captions[: len(real)])).sum(dim=1)
    protocol = {"judge": judge.digest}
    return [
        evaluation.figure(
            "clip",
            mean(fits),
            "higher",
            protocol,
            floor=float(own.mean()),
            ceiling=float(others.mean()),
            items=dict(zip(captions, fits.tolist())),
        )
    ]


def retrieval(evaluation: Evaluation) -> list[Figure]:
    """Measure how often a picture fits the text that it was drawn from best of all texts, or is among the five best.

    The texts are the different labels of the test and training pictures (their `thing`, or first caption); prompts are
    drawn from them with the seed.
    """
    judge, labels = evaluation.judge, _labels(evaluation)
    if len(labels) < 2:
        raise InputError(f"retrieval needs at least 2 different texts, got {len(labels)}; pass more captioned pictures")
    chosen = np.random.default_rng(evaluation.request.seed).permutation(len(labels))
    chosen = chosen[: evaluation.count(PROMPTS)]
    items = [Item(labels[number], evaluation.request.seed + place) for place, number in enumerate(chosen)]
    images = judge.images(load_pictures(evaluation.draw("retrieval", items)))
    similarities = images @ judge.texts(labels).T  # (N, M)
    own = similarities.gather(1, torch.from_numpy(chosen)[:, None].to(similarities.device))
    ranks = (similarities > own).sum(dim=1).cpu().numpy()
    protocol = {"judge": judge.digest, "texts": len(labels)}
    return [
        evaluation.figure(
            f"retrieval_top{best}",
            share(ranks < best),
            "higher",
            protocol,
            items={item.prompt: float(rank < best) for item, rank in zip(items, ranks)},
        )
        for best in BEST
    ]


def _captions(evaluation: Evaluation) -> list[str]:
    if evaluation.given is not None:
        return [item.prompt for _, item in evaluation.given]
    return list(evaluation.reference("test").captions)


def _labels(evaluation: Evaluation) -> list[str]:
    """Return the different labels of all real pictures, sorted."""
    rows = [row for reference in evaluation.references.values() for row in reference.rows]
    return sorted({str(row.get("thing") or row["captions"][0]) for row in rows if not row.get("variant")})

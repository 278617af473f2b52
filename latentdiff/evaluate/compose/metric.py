"""The metric: how often pictures show what compositional prompts ask for, beside the checker's own error rates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from latentdiff.errors import InputError
from latentdiff.evaluate.compose.checker import VERSION, Checker, look
from latentdiff.evaluate.compose.prompts import CATEGORIES, Prompt, make_prompts, prompt_from_json, write_prompts
from latentdiff.evaluate.compose.validation import Rates, error_rates, truth_of
from latentdiff.evaluate.evaluation import Evaluation
from latentdiff.evaluate.figure import Figure, digest_of
from latentdiff.evaluate.intervals import share
from latentdiff.evaluate.pictures import Item
from latentdiff.images import from_tensor, open_image

__all__ = ["compose"]

PROMPTS = 120  # unless a request says otherwise, of all categories together
SCENES = 100  # real ones of each category that the checker's error rates are measured on
FILE = "prompts.jsonl"  # in the folder of the report


def compose(evaluation: Evaluation) -> list[Figure]:
    """Measure which share of pictures show what their prompts ask for, by category and of all.

    The prompts are those of the benchmark, as many of each category, and are written into the folder of the report, so
    that any other model can draw them; of pictures that are given they are those of the given prompts file.

    Floor: of real scenes of the test pictures with what they show. Ceiling: of those scenes with something else. Both
    are missing where the test pictures are no scenes with their truth.
    """
    drawn, prompts = _drawn(evaluation) if evaluation.given is None else _given(evaluation)
    checker = Checker(evaluation.judge)
    hits = [checker.check(look(open_image(path)), one.truth).right for (path, _), one in zip(drawn, prompts)]
    rates = error_rates(_scenes(evaluation), checker)
    tree = [[one.text, one.category, one.truth.to_json()] for one in prompts]
    protocol = {"judge": evaluation.judge.digest, "checker": VERSION, "prompts": digest_of({"prompts": tree})}
    figures = []
    for name, category, own in _parts(prompts):
        items = evaluation.by_item([drawn[n] for n in own], [hits[n] for n in own])
        floor, ceiling = _bounds(rates, category)
        estimate = share([hits[n] for n in own])
        figures.append(evaluation.figure(name, estimate, "higher", protocol, floor=floor, ceiling=ceiling, **items))
    return figures


def _drawn(evaluation: Evaluation) -> tuple[list[tuple[Path, Item]], list[Prompt]]:
    """Return pictures that the model draws of the prompts of the benchmark, and these."""
    request = evaluation.request
    prompts = make_prompts(max(1, evaluation.count(PROMPTS) // len(CATEGORIES)), request.seed)
    items = [Item(one.text, request.seed + number) for number, one in enumerate(prompts)]
    drawn = evaluation.draw_best("compose", items)
    write_prompts(prompts, request.out / FILE, request.seed)
    return drawn, prompts


def _given(evaluation: Evaluation) -> tuple[list[tuple[Path, Item]], list[Prompt]]:
    """Return the given pictures and what each must show.

    Raises:
        InputError: one does not come with that.
    """
    prompts = []
    for path, item in evaluation.drawn:
        try:
            prompts.append(prompt_from_json({**item.truth, "prompt": item.prompt}))
        except InputError as error:
            raise InputError(f"compose checks {path.name} by its line of --prompts: {error}") from error
    return evaluation.drawn, prompts


def _parts(prompts: Sequence[Prompt]) -> Iterator[tuple[str, str | None, list[int]]]:
    """Yield the figures: name, category and numbers of prompts; first that of all."""
    yield "compose", None, list(range(len(prompts)))
    for category in CATEGORIES:
        if own := [n for n, one in enumerate(prompts) if one.category == category]:
            yield f"compose/{category}", category, own


def _bounds(rates: Mapping[str, Rates], category: str | None) -> tuple[float | None, float | None]:
    """Return floor and ceiling of a category; of all, as all categories count alike, their means."""
    own = [rate for name, rate in rates.items() if category in (None, name)]
    if not own or not all(rate.accepted.n for rate in own):
        return None, None
    accepted, broken = ([getattr(rate, name).value for rate in own] for name in ("accepted", "broken_accepted"))
    return sum(accepted) / len(own), sum(broken) / len(own)


def _scenes(evaluation: Evaluation) -> Iterator[tuple[Image.Image, Mapping[str, Any]]]:
    """Yield scenes of the test pictures, with their rows."""
    reference = evaluation.references.get("test")
    rows = [] if reference is None else reference.rows
    found: Counter[str] = Counter()
    for number, row in enumerate(rows):
        own = [name for name in CATEGORIES if "truth" in row and truth_of(row, name) is not None]
        if reference is not None and any(found[name] < SCENES for name in own):
            found.update(own)
            yield from_tensor(reference.load([number]))[0], row

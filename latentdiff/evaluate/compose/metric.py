"""The metric: how often pictures show what compositional prompts ask for, beside the checker's own error rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from latentdiff.errors import InputError
from latentdiff.evaluate.compose.checker import VERSION, Checker, ImageText, look
from latentdiff.evaluate.compose.prompts import CATEGORIES, Prompt, make_prompts, read_prompts
from latentdiff.evaluate.compose.validation import Rates, error_rates
from latentdiff.evaluate.evaluation import Evaluation
from latentdiff.evaluate.figure import Figure, digest_of
from latentdiff.evaluate.intervals import share
from latentdiff.evaluate.pictures import Item
from latentdiff.images import from_tensor, open_image

__all__ = ["check_folder", "compose"]

EACH = 20  # prompts of every category
SCENES = 400  # real ones that the checker's error rates are measured on


def compose(evaluation: Evaluation) -> list[Figure]:
    """Measure which share of pictures show what their prompts ask for, by category and of all.

    Floor: of real scenes of the test pictures with what they show. Ceiling: of those scenes with something else. Both
    are missing where the test pictures are no scenes with their truth.
    """
    prompts = make_prompts(evaluation.count(EACH), evaluation.request.seed)
    items = [
        Item(one.text, evaluation.request.seed + number, one.truth.to_json()) for number, one in enumerate(prompts)
    ]
    paths = evaluation.draw("compose", items)
    checker = Checker(evaluation.judge)
    hits = [checker.check(look(open_image(path)), one.truth).right for path, one in zip(paths, prompts)]
    rates = error_rates(_scenes(evaluation), checker)
    tree = [[one.text, one.category, one.truth.to_json()] for one in prompts]
    protocol = {"judge": evaluation.judge.digest, "checker": VERSION, "prompts": digest_of({"prompts": tree})}
    return [
        evaluation.figure(name, share([hits[n] for n in own]), "higher", protocol, **_bounds(rates, category),
                          items={f"{n:04d} {prompts[n].text}": float(hits[n]) for n in own})
        for name, category, own in _parts(prompts)
    ]  # fmt: skip


def check_folder(folder: Path, prompts_file: Path, judge: ImageText | None) -> list[tuple[Prompt, bool, str]]:
    """Check pictures of any model: those of a folder, sorted by name, are of the lines of a prompts file, in order.

    Returns:
        Each prompt with whether its picture is right, and the reason where it is not.

    Raises:
        InputError: there are not as many pictures as prompts, or one of either is refused.
    """
    prompts = read_prompts(prompts_file)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; pass one of pictures")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if len(paths) != len(prompts):
        raise InputError(f"{folder} must have a picture for each of {len(prompts)} prompts, got {len(paths)}")
    checker = Checker(judge)
    verdicts = [checker.check(look(open_image(path)), one.truth) for path, one in zip(paths, prompts)]
    return [(one, verdict.right, verdict.reason) for one, verdict in zip(prompts, verdicts)]


def _parts(prompts: Sequence[Prompt]) -> Iterator[tuple[str, str | None, list[int]]]:
    """Yield the figures: name, category and numbers of prompts; first that of all."""
    yield "compose", None, list(range(len(prompts)))
    for category in CATEGORIES:
        yield f"compose/{category}", category, [n for n, one in enumerate(prompts) if one.category == category]


def _bounds(rates: Mapping[str, Rates], category: str | None) -> dict[str, float | None]:
    """Return floor and ceiling of a category; of all, as all categories count alike, their means."""
    own = [rate for name, rate in rates.items() if category in (None, name)]
    if not own or not all(rate.accepted.n for rate in own):
        return {"floor": None, "ceiling": None}
    return {
        "floor": sum(rate.accepted.value for rate in own) / len(own),
        "ceiling": sum(rate.broken_accepted.value for rate in own) / len(own),
    }


def _scenes(evaluation: Evaluation) -> Iterator[tuple[Image.Image, Mapping[str, Any]]]:
    """Yield scenes of the test pictures, with their rows."""
    reference = evaluation.references.get("test")
    rows = [] if reference is None else reference.rows
    chosen = [number for number, row in enumerate(rows) if "truth" in row][:SCENES]
    for number in chosen:
        if reference is not None:
            yield from_tensor(reference.load([number]))[0], reference.rows[number]

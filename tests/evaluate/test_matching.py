"""How pictures fit their texts: nearest real pictures, and the best of several."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from latentdiff import Pipeline
from latentdiff.cli import main
from latentdiff.evaluate import Evaluation, Reference, Request
from latentdiff.evaluate.features import features_of
from latentdiff.evaluate.judge import load_judge
from latentdiff.evaluate.latents import encode
from latentdiff.evaluate.matching import NEAREST
from latentdiff.evaluate.pictures import Item, load_pictures
from latentdiff.evaluate.run import measure
from tests.evaluate.small import images

LABELS = [f"thing {number % 6}" for number in range(24)]


def things() -> Reference:
    pictures, rows = images(24), [{"captions": [f"a picture of {label}"], "thing": label} for label in LABELS]
    captions = [row["captions"][0] for row in rows]
    return Reference("small", "test", captions, rows, captions, lambda numbers: pictures[list(numbers)])


def test_neighbours_are_those_of_scikit_learn(pipe: Pipeline, tmp_path: Path) -> None:
    asked = Evaluation(
        Request(tmp_path, features="latents", settings={"num_inference_steps": 2}), pipe, {"test": things()}
    )
    (figure,) = measure(asked, ["neighbours"])
    assert figure.estimate.n == len(figure.items) == 6 and figure.protocol["features"] == "latents"
    real = encode(pipe.components, images(24)).flatten(1).numpy()
    drawn = load_pictures([tmp_path / place for place in figure.pictures.values()])
    found = NearestNeighbors(n_neighbors=NEAREST).fit(real)
    nearest = found.kneighbors(features_of(drawn, asked.network), return_distance=False)
    prompts = [name.rpartition(" #")[0] for name in figure.items]
    assert sorted(prompts) == sorted({*LABELS})
    expected = [prompt in {LABELS[place] for place in row} for prompt, row in zip(prompts, nearest)]
    assert list(figure.items.values()) == expected
    places = things().sample(6)
    besides = found.kneighbors(real[places], NEAREST + 1, return_distance=False)[:, 1:]
    floor = np.mean([LABELS[place] in {LABELS[one] for one in row} for place, row in zip(places, besides)])
    assert figure.floor == pytest.approx(floor)


def test_the_floor_of_retrieval_is_that_of_real_pictures(pipe: Pipeline, judge: Path, tmp_path: Path) -> None:
    network, reference = load_judge(judge), things()
    best = network.images(images(24)) @ network.texts(sorted({*LABELS})).T
    fits = {label: best[LABELS.index(label)] for label in sorted({*LABELS})}  # of its first picture alone
    alone = [LABELS.index(label) for label in fits]
    only = replace(
        reference,
        rows=[{**row, "variant": "" if place in alone else "hue"} for place, row in enumerate(reference.rows)],
    )
    asked = Evaluation(Request(tmp_path, judge=judge, settings={"num_inference_steps": 2}), pipe, {"test": only})
    top1, top5 = measure(asked, ["retrieval"])
    ranks = np.array([int((row > row[place]).sum()) for place, row in enumerate(fits.values())])
    assert top1.floor == pytest.approx((ranks < 1).mean()) and top5.floor == pytest.approx((ranks < 5).mean())


def test_the_best_of_several_is_what_fits_best(pipe: Pipeline, judge: Path, tmp_path: Path) -> None:
    def asked(best_of: int) -> Evaluation:
        request = Request(
            tmp_path, seed=5, judge=judge, best_of=best_of, settings={"num_inference_steps": 2}, batch_size=3
        )
        return Evaluation(request, pipe, {"test": things()})

    (plain, best), network = (measure(asked(among), ["clip"])[0] for among in (1, 3)), load_judge(judge)
    assert best.estimate.value > plain.estimate.value and "best_of" not in plain.protocol
    assert best.protocol["best_of"] == 3 and best.protocol["chosen_by"] == network.digest
    items = [Item(f"a picture of {LABELS[asked(3).chosen[2]]}", seed) for seed in (11, 12, 13)]  # of the third caption
    fits = network.fits(load_pictures(asked(3).draw("captions", items)), [item.prompt for item in items])
    kept = items[int(fits.argmax())].name
    assert kept in best.items and best.items[kept] == pytest.approx(100 * float(fits.max()), abs=1e-3)
    assert not {item.name for item in items} - {kept} & best.items.keys()
    assert torch.isfinite(fits).all()


def test_a_report_says_how_pictures_were_chosen(call: list[str], tmp_path: Path) -> None:
    options = ["--best-of", "2", "--n", "4", "--out", str(tmp_path)]
    assert main([*call, "--metrics", "clip,retrieval", *options]) == 0
    report: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    assert report["subject"]["best_of"] == 2
    assert all(figure["protocol"]["best_of"] == 2 for figure in report["figures"])

"""Scenes of drawings: the same whoever makes them, captions that tell the truth, and what no training scene has."""

import json
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentdiff.training.datasets.emoji import dominant_color
from latentdiff.training.datasets.scenes import build
from latentdiff.training.datasets.scenes.build import SHARE, add_scenes, paint_scene
from latentdiff.training.datasets.scenes.plan import Scene, held_out_combinations, plan_scene
from latentdiff.training.datasets.scenes.things import Catalogue, catalogue, possible_turns
from PIL import Image, ImageDraw

from latentdiff.cli import main
from latentdiff.errors import InputError
from latentdiff.evaluate.compose.grounds import GROUNDS, paint_ground
from latentdiff.evaluate.compose.words import (
    HUES,
    NUMBERS,
    STYLE_PHRASES,
    Things,
    is_held_out,
    listed,
    plural,
    with_article,
)

NAMES = ("fox", "dog", "car", "tree", "house", "fish", "mouse", "glass of milk", "ball", "leaf", "boat", "cake", "hat")
COLORS = ("red", "orange", "green", "blue")
SIZE = 32


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    """A set as `training.datasets.emoji.build` leaves it: discs and squares, in one colour each, in two styles."""
    rows: list[dict[str, Any]] = []
    for split in ("train", "validation", "test"):
        (tmp_path / split).mkdir()
    for number, (style, name) in enumerate((style, name) for style in ("noto", "twemoji") for name in NAMES):
        color = COLORS[number % len(COLORS)]
        image = Image.new("RGBA", (SIZE, SIZE))
        draw = ImageDraw.Draw(image)
        turned = tuple(round(255 * part) for part in _rgb(HUES[color]))
        (draw.ellipse if number % 2 else draw.rectangle)((4, 8, 27, 23), fill=(*turned, 255))
        file = f"{style}--{name.replace(' ', '-')}.png"
        image.save(tmp_path / "train" / file)
        rows.append(
            {
                "file_name": file, "text": with_article(name), "captions": [with_article(name)], "concept": name,
                "variant": "", "tags": ["thing"], "group": "animals-nature", "subgroup": "animal-mammal",
                "style": style, "color": color, "flip": True, "source": style, "author": "a", "license": "MIT",
            }
        )  # fmt: skip
    for split, own in {"train": rows, "validation": [], "test": []}.items():
        (tmp_path / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    (tmp_path / "report.json").write_text(json.dumps({"size": SIZE}))
    return tmp_path


def _rgb(hue: float) -> tuple[float, float, float]:
    import colorsys

    return colorsys.hsv_to_rgb(hue, 0.9, 0.95)


@pytest.fixture
def things(drawings: Path) -> Catalogue:
    rows = map(json.loads, (drawings / "train/metadata.jsonl").read_text().splitlines())
    return catalogue(list(rows), drawings / "train", workers=1)


def scenes_of(out: Path, split: str = "train") -> list[dict[str, Any]]:
    rows = map(json.loads, (out / split / "metadata.jsonl").read_text().splitlines())
    return [row for row in rows if "truth" in row]


def combinations_in(truth: dict[str, Any], natural: dict[str, set[str]]) -> list[tuple[Any, ...]]:
    """Return what `is_held_out` is asked about, of the truth of a scene."""
    found: list[tuple[Any, ...]] = []
    for thing in truth["things"]:
        if thing["color"] and thing["color"] not in natural[thing["concept"]]:
            found.append(("color", thing["color"], thing["concept"]))
        if thing["count"] > 1:
            found.append(("count", thing["count"], thing["concept"]))
    names = sorted({thing["concept"] for thing in truth["things"]})
    return [*found, *(("pair", *pair) for pair in combinations(names, 2))]


def test_scenes_do_not_depend_on_processes_or_on_how_many_there_are(drawings: Path, tmp_path: Path) -> None:
    add_scenes(drawings, 6, workers=2)
    two = {row["file_name"]: row for row in scenes_of(drawings)}
    pictures = {name: (drawings / "train" / name).read_bytes() for name in two}
    for name in pictures:
        (drawings / "train" / name).unlink()
    add_scenes(drawings, 9, workers=1)
    nine = {row["file_name"]: row for row in scenes_of(drawings)}
    assert len(two) == 6 and len(nine) == 9 and two.items() <= nine.items()
    assert {name: (drawings / "train" / name).read_bytes() for name in pictures} == pictures
    assert len(set(pictures.values())) > 1


@pytest.mark.long
def test_processes_need_not_be_copies_of_the_one_that_starts_them(
    drawings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS and Windows, where a new interpreter is started for each."""
    afresh = partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn"))
    monkeypatch.setattr(build, "ProcessPoolExecutor", afresh)
    add_scenes(drawings, 2, workers=1)
    assert len(scenes_of(drawings)) == 2


def test_what_was_interrupted_goes_on(drawings: Path) -> None:
    add_scenes(drawings, 3, workers=1)
    first, second, third = (drawings / "train" / row["file_name"] for row in scenes_of(drawings))
    stamp, whole = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    third.unlink()
    third.with_name(f"{third.name}.tmp").write_bytes(b"half of one")
    add_scenes(drawings, 3, workers=1)
    assert first.stat().st_mtime_ns == stamp and second.read_bytes() == whole
    assert not list(drawings.rglob("*.tmp"))


def test_scenes_stand_beside_the_drawings(drawings: Path) -> None:
    report = add_scenes(drawings, SHARE * 2, workers=1)
    assert {split: sum(report[split].values()) for split in ("train", "validation", "test")} == {
        "train": SHARE * 2, "validation": 2, "test": 2,
    }  # fmt: skip
    lines = (drawings / "train/metadata.jsonl").read_text().splitlines()
    assert len(lines) == 2 * len(NAMES) + SHARE * 2
    row = scenes_of(drawings)[0]
    assert row["group"] == "scenes" and row["license"] == "MIT" and row["text"] == row["captions"][0]
    with Image.open(drawings / "train" / row["file_name"]) as image:
        assert image.size == (SIZE, SIZE) and image.mode == "RGB"
    names = [{row["file_name"] for row in scenes_of(drawings, split)} for split in ("train", "validation", "test")]
    assert not set.intersection(*names)


def test_held_out_combinations_are_in_no_training_scene_and_in_every_other(drawings: Path, things: Catalogue) -> None:
    add_scenes(drawings, 160, workers=1)
    natural = things.natural
    for split in ("train", "validation", "test"):
        held_out = [any(map(is_held_out, combinations_in(row["truth"], natural))) for row in scenes_of(drawings, split)]
        assert held_out and set(held_out) == {split != "train"}
    listed_ones = {tuple(one) for one in json.loads((drawings / "held_out.json").read_text())}
    assert listed_ones == set(held_out_combinations(things)) and {one[0] for one in listed_ones} == {
        "color", "count", "pair",
    }  # fmt: skip
    seen = {one for row in scenes_of(drawings) for one in combinations_in(row["truth"], natural)}
    assert seen and not seen & listed_ones


def test_captions_say_what_is_there_and_nothing_else(things: Catalogue) -> None:
    """Of every group the phrase; of the ground one of its own, of the relation the order of the things in the words."""
    for number in range(300):
        scene = plan_scene(things, 0, number)
        for caption in scene.captions:
            rest = caption
            for phrase in sorted((group.said.phrase for group in scene.groups), key=len, reverse=True):
                assert len(re.findall(rf"\b{phrase}\b", rest)) == 1, (caption, phrase)
                rest = re.sub(rf"\b{phrase}\b", "#", rest)
            where = [phrase for phrase in GROUNDS[scene.ground].phrases if phrase in rest]
            assert bool(where) == (scene.ground != "white"), caption
            for phrase in [*where, STYLE_PHRASES[scene.style], "a drawing of", "a picture of", "thing"]:
                rest = rest.replace(phrase, "")
            assert not set(re.findall("[a-z]+", rest)) & {*HUES, *NUMBERS.values(), *NAMES}, (caption, rest)
            assert_relation(scene, caption)
            if scene.is_read_in_order:
                assert_order(scene, caption)
        assert len(set(scene.captions)) == 3


def assert_order(scene: Scene, caption: str) -> None:
    """See that things are named as one reads: in rows from above, in each from left to right."""
    named = sorted(scene.groups, key=lambda group: caption.index(group.said.phrase))
    places = [((left + right) / 2, (top + bottom) / 2) for group in named for left, top, right, bottom in group.boxes]
    if len(places) == 2:
        assert places[0][0] < places[1][0] - 0.2, caption
    for (x, y), (next_x, next_y) in pairwise(places):
        assert x < next_x or y < next_y, caption


def assert_relation(scene: Scene, caption: str) -> None:
    """See that what a caption says of the places of two things is so in the picture."""
    if scene.relation is None:
        assert not re.search(r"\b(left|right|above|below|over|underneath|next|beside)\b", caption)
        return
    places = {}
    for group in scene.groups:
        ((left, top, right, bottom),) = group.boxes
        places[group.said.phrase] = ((left + right) / 2, (top + bottom) / 2)
    ordered = sorted(places, key=caption.index)
    (x, y), (other_x, other_y) = (places[phrase] for phrase in ordered)
    between = caption[caption.index(ordered[0]) + len(ordered[0]) : caption.index(ordered[1])]
    if "left" in between:
        assert x < other_x - 0.2
    elif "right" in between:
        assert x > other_x + 0.2
    elif re.search("above|over", between):
        assert y < other_y - 0.2
    elif re.search("under|below", between):
        assert y > other_y + 0.2
    else:
        assert scene.relation == "next to" and x < other_x - 0.2


def test_what_is_named_in_order_is_not_mirrored(drawings: Path) -> None:
    add_scenes(drawings, 40, workers=1)
    for row in scenes_of(drawings):
        truth = row["truth"]
        assert row["flip"] == (len(truth["things"]) == 1 or truth["relation"] not in (None, "next to"))


def test_pictures_hold_as_many_things_as_the_truth_says(things: Catalogue) -> None:
    """On white, things are islands that do not touch; each has the colour that is said of it."""
    ndimage = pytest.importorskip("scipy.ndimage")
    seen = 0
    for number in range(200):
        scene = plan_scene(things, 1, number)
        if scene.ground != "white":
            continue
        pixels = np.asarray(paint_scene(things, scene, 96))
        islands, count = ndimage.label((pixels < 200).any(axis=-1))
        assert count == sum(thing["count"] for thing in scene.truth()["things"])
        for group in scene.groups:
            for left, top, right, bottom in group.boxes:
                at = islands[round((top + bottom) * 48), round((left + right) * 48)]
                shown = np.dstack([pixels, np.where(islands == at, 255, 0)]).astype(np.uint8)
                assert at and group.said.color in (None, dominant_color(shown))
        seen += 1
    assert seen > 30


def test_big_things_are_bigger_than_small_ones(things: Catalogue) -> None:
    seen = 0
    for number in range(400):
        scene = plan_scene(things, 0, number)
        if scene.kind == "sizes":
            sides = {
                group.said.size: max(group.boxes[0][2] - group.boxes[0][0], group.boxes[0][3] - group.boxes[0][1])
                for group in scene.groups
            }
            assert sides["big"] > 1.4 * sides["small"]
            seen += 1
    assert seen > 5


def test_a_drawing_of_many_hues_is_not_turned() -> None:
    rgba = np.zeros((32, 32, 4), dtype=np.uint8)
    rgba[:, :16], rgba[:, 16:] = (230, 40, 40, 255), (40, 90, 230, 255)
    assert possible_turns(rgba) == {}
    rgba[:, 16:] = (230, 40, 40, 255)
    assert {"blue", "green"} <= possible_turns(rgba).keys() and "red" not in possible_turns(rgba)


@pytest.mark.parametrize("name", GROUNDS)
def test_every_ground_is_drawn_alike_of_one_seed(name: str) -> None:
    first, again = (np.asarray(paint_ground(GROUNDS[name], 64, np.random.default_rng(3))) for _ in range(2))
    assert first.shape == (64, 64, 3) and (first == again).all()


def test_plurals() -> None:
    singular = ["fox", "glass of milk", "mouse", "nest with eggs", "police officer", "fairy", "blowfish", "game die"]
    assert [plural(name) for name in singular] == [
        "foxes", "glasses of milk", "mice", "nests with eggs", "police officers", "fairies", "blowfish", "game dice",
    ]  # fmt: skip
    assert Things("apple", 3, "red", "small").phrase == "three small red apples"
    assert Things("apple", 1, "orange").phrase == "an orange apple" and Things("owl").phrase == "an owl"
    assert Things("bread", 1, size="small").phrase == "small bread" and Things("grapes").phrase == "grapes"
    assert listed(["a fox", "a tree", "two dogs"]) == "a fox, a tree and two dogs"


def test_scenes_out_of_range_or_of_another_set_are_refused(drawings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="1 to 1000000, got 0"):
        add_scenes(drawings, 0)
    with pytest.raises(InputError, match=r"report\.json"):
        add_scenes(drawings / "train", 5)
    assert main(["data", "digits", str(drawings), "--scenes", "5"]) == 2
    assert "of the drawings of emoji, got digits" in capsys.readouterr().err

"""Scenes composed of the emoji drawings: one to four things, with captions and the truth that they tell.

Try:
    latentdiff data emoji data/emoji128 --size 128 --scenes 60000
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from latentdiff.errors import InputError, StorageError
from latentdiff.evaluate.compose.grounds import GROUNDS, paint_ground
from latentdiff.files import parse_json, read_file, write_file

from ...data.augment import turn_hue
from ..emoji import MAX_REPORT_BYTES, SPLITS
from ..rows import read_rows, write_rows
from .plan import Group, Scene, held_out_combinations, plan_scene
from .things import Catalogue, Thing, catalogue

MOST = 1_000_000
SHARE = 40  # training scenes for each one of validation and of test
FOLDER = "scenes"
VERSION = 3  # of what scenes are made by; a change of that must change it
CAPTIONS = 2  # of each scene: text states take more room than latents


@dataclass(frozen=True)
class _Job:
    """What all scenes of one split have in common."""

    things: Catalogue
    seed: int
    place: Path
    size: int
    held_out: bool


_SHARED: dict[str, _Job] = {}  # of a process that makes scenes


def add_scenes(out: str | Path, count: int, seed: int = 0, workers: int | None = None) -> dict[str, Any]:
    """Compose scenes of the training drawings of a set that `training.datasets.emoji.build` made, and add them to it.

    Scene n of a seed is the same whatever the number of scenes and processes. Pictures that are there are kept, so what
    was interrupted goes on where it stopped. Every scene of validation and test has a combination that no training
    scene has; held_out.json lists them.

    Args:
        out: folder of the set.
        count: how many to train on; one in `SHARE` as many are added for validation, and for test.
        seed: of the scenes.
        workers: processes; the number of cores when None.

    Returns:
        How many scenes there are, of each split and kind.

    Raises:
        InputError: count out of range, or there is no such set.
        StorageError: a file cannot be written.
    """
    check_count(count)
    folder, few = Path(out), max(1, count // SHARE)
    report = parse_json(read_file(folder / "report.json", MAX_REPORT_BYTES), str(folder / "report.json"))
    try:
        drawings = {split: [row for row in read_rows(folder / split) if "truth" not in row] for split in SPLITS}
        things = catalogue(drawings["train"], folder / "train", workers)
        stamp = _stamp(things, seed)
        found: dict[str, dict[str, int]] = {}
        for number, (split, scenes) in enumerate({"train": count, "validation": few, "test": few}.items()):
            place = folder / split / FOLDER / stamp
            place.mkdir(parents=True, exist_ok=True)
            numbers = range(number * MOST, number * MOST + scenes)  # so that no two splits have a scene in common
            rows = _spread(_Job(things, seed, place, report["size"], split != "train"), numbers, workers, split)
            found[split] = dict(Counter(row["subgroup"] for row in rows))
            write_rows(folder / split, [*drawings[split], *rows])
        listed = list(held_out_combinations(things))
        write_file(folder / "held_out.json", (json.dumps(listed) + "\n").encode())
        report["scenes"] = {"seed": seed, "drawings": stamp, **found}
        write_file(folder / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    except StorageError:  # of a file that says so itself
        raise
    except OSError as error:
        raise StorageError(f"could not add scenes to {folder}: {error}; free space, then do it again") from error
    return dict(report["scenes"])


def check_count(count: int) -> None:
    """Raise InputError where there cannot be so many scenes to train on."""
    if not 1 <= count <= MOST:
        raise InputError(f"scenes must be 1 to {MOST}, got {count}; try 60000")


def paint_scene(things: Catalogue, scene: Scene, size: int) -> Image.Image:
    """Return the picture of a scene, RGB, `size` pixels square."""
    picture = paint_ground(GROUNDS[scene.ground], size, np.random.default_rng(scene.seed))
    for group in scene.groups:
        for box in group.boxes:
            left, top, right, bottom = (round(edge * size) for edge in box)
            drawing = _drawing(things.things[group.thing], group, max(1, right - left), max(1, bottom - top))
            picture.paste(drawing, (left, top), drawing)
    return picture


def scene_row(things: Catalogue, scene: Scene, file_name: str) -> dict[str, Any]:
    """Return the row of metadata of a scene: that of a drawing, and the truth."""
    rows = [things.things[group.thing].row for group in scene.groups]
    shared = {key: "; ".join(dict.fromkeys(row[key] for row in rows)) for key in ("source", "author", "license")}
    return {
        "file_name": file_name,
        "text": scene.captions[0],
        "captions": list(scene.captions),
        "concept": "",
        "variant": "",
        "tags": [],
        "group": "scenes",
        "subgroup": scene.kind,
        "style": scene.style,
        "color": None,
        "flip": all(row["flip"] for row in rows) and not scene.is_read_in_order,
        **shared,
        "truth": scene.truth(),
    }


def _spread(job: _Job, numbers: range, workers: int | None, split: str) -> list[dict[str, Any]]:
    """Make scenes in several processes and return their rows, in order."""
    with ProcessPoolExecutor(workers or os.cpu_count(), initializer=_start, initargs=(job,)) as pool:
        return list(tqdm(pool.map(_make, numbers, chunksize=32), total=len(numbers), desc=split, unit="scene"))


def _start(job: _Job) -> None:
    """Tell a process, which need not be a copy of the one that started it, what its scenes have in common."""
    _SHARED["job"] = job


def _make(number: int) -> dict[str, Any]:
    """Draw one scene to its file, where that is not there yet, and return its row."""
    job = _SHARED["job"]
    scene = plan_scene(job.things, job.seed, number, job.held_out, CAPTIONS)
    file = job.place / f"{number // 1000 % 1000:03d}" / f"{number:07d}.png"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        paint_scene(job.things, scene, job.size).save(f"{file}.tmp", format="PNG")
        os.replace(f"{file}.tmp", file)
    return scene_row(job.things, scene, file.relative_to(job.place.parent.parent).as_posix())


def _drawing(thing: Thing, group: Group, width: int, height: int) -> Image.Image:
    """Return a drawing in the size and colours of its group, RGBA."""
    rgba = _cut(thing.file, thing.box)
    if group.turn:
        rgba = turn_hue(rgba, group.turn)
    image = Image.fromarray(np.ascontiguousarray(rgba[:, ::-1] if group.mirrored else rgba))
    return image.resize((width, height), Image.Resampling.LANCZOS)


@lru_cache(maxsize=2048)
def _cut(file: Path, box: tuple[int, int, int, int]) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGBA").crop(box))


def _stamp(things: Catalogue, seed: int) -> str:
    """Name everything that scenes depend on but their number."""
    seen = [(thing.file.name, thing.box, thing.turns) for thing in things.things]
    return hashlib.sha256(repr((VERSION, seed, seen)).encode()).hexdigest()[:12]

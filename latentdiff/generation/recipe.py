"""Recipes: all that pictures of the same settings take to be drawn without torch, kept on disk.

A recipe is for one model, one machine and every option but prompts, negative prompt, seed and number of pictures. It is
written after such a picture was drawn by OpenVINO (`make_recipe`), and read by later processes (`without_torch`), which
find it by a hash of all that it depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff import __version__
from latentdiff.embedded import EMBEDDED, embedded_model
from latentdiff.engine import conversions
from latentdiff.engine.layouts import processor
from latentdiff.errors import ModelPathError
from latentdiff.files import is_file, is_folder, stamp

__all__ = ["FREE", "Recipe", "read_recipe", "recipe_place", "words_of", "write_recipe"]

FREE = ("negative_prompt", "seed", "num_images")  # options that may differ between pictures of one recipe
FORMAT = 2  # of the files
TABLE = "embeddings.word_embeddings.weight"
NUMBERS, TABLES = "recipe.json", "tables.safetensors"
MOST_FILES = 200  # of a model's folder
# Environment variables that say how many threads torch computes with.
THREADING = ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "OMP_DYNAMIC", "MKL_NUM_THREADS", "MKL_DYNAMIC")


@dataclass(frozen=True)
class Recipe:
    """Numbers of one sampling run, the same for every picture.

    Attributes:
        settings: all but those in `FREE`, as arguments of `Settings`.
        record: see `result.call_record`.
        graphs: files of conversions, by what they are: "encoder", "texts", "unet", "decoder", and "shifts" of a U-Net
            that has the text in its time embedding.
        tokenizer: folder of the tokenizer.
        words: file of the text encoder's weights that has the table of its tokens.
        window: tokens that the text encoder takes at most.
        masked: whether padding is hidden from the text encoder.
        heads: number and width of the heads of each attention to the text.
        shape: (C, h, w) of the latents of an image.
        scales: of guidance, for each row.
        noisy: whether noise is drawn, for each row.
        init_noise_sigma: see `diffusion.plan.Plan`.
        scaling_factor: of the autoencoder.
        shift_channels: sum C, see `models.unet.UNet2DConditionModel.shifts`.
        tables: see `diffusion.folding.folded`, and "shifts" (R, sum C) as the U-Net takes them, or "time" (R, D), of
            which the graph "shifts" makes them.
    """

    settings: dict[str, Any]
    record: dict[str, Any]
    graphs: dict[str, str]
    tokenizer: str
    words: str
    window: int
    masked: bool
    heads: list[tuple[int, int]]
    shape: tuple[int, int, int]
    scales: list[float]
    noisy: list[bool]
    init_noise_sigma: float
    scaling_factor: float
    shift_channels: int
    tables: dict[str, np.ndarray]


def recipe_place(model: str | None, how: Mapping[str, Any], given: Mapping[str, Any]) -> Path | None:
    """Return where the recipe of a request is; None for a model that has none.

    Args:
        model: as it was asked for.
        how: device, dtype and engine, as they were asked for.
        given: the generation options that were asked for.
    """
    try:
        folder = embedded_model() if model in (None, EMBEDDED) else Path(str(model))
        files = [*folder.glob("*"), *folder.glob("*/*")] if is_file(folder / "model_index.json") else []
    except (ModelPathError, OSError, ValueError):
        return None
    if not 0 < len(files) <= MOST_FILES:
        return None
    affinity = getattr(os, "sched_getaffinity", None)
    packages = [find_spec(name) for name in ("torch", "openvino")]
    depends = {
        "format": (FORMAT, __version__, [stamp(str(found and found.origin)) for found in packages]),
        "machine": (processor(), os.cpu_count(), len(affinity(0)) if affinity else None),
        "threading": [os.environ.get(name) for name in THREADING],
        "model": (model, str(folder.resolve())),
        "files": sorted((str(file.relative_to(folder)), stamp(file)) for file in files if not is_folder(file)),
        "how": dict(how),
        "given": {name: value for name, value in given.items() if name not in FREE},
    }
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]
    return conversions.cache_folder() / "recipes" / digest


def read_recipe(place: Path) -> Recipe | None:
    """Return the recipe in a folder; None where there is none that is what was written."""
    from safetensors.numpy import load_file

    try:
        if conversions.load(place) is None:
            return None
        numbers = json.loads((place / NUMBERS).read_text())
        numbers["settings"] = {name: _tuples(value) for name, value in numbers["settings"].items()}
        return Recipe(**numbers, tables=load_file(place / TABLES))
    except (conversions.Damaged, OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write_recipe(recipe: Recipe, place: Path) -> None:
    """Write a recipe into a new folder, in place of one that may be there.

    Raises:
        StorageError: it cannot be written.
    """
    from safetensors.numpy import save_file

    def write(folder: Path) -> None:
        numbers = {item.name: getattr(recipe, item.name) for item in fields(recipe) if item.name != "tables"}
        (folder / NUMBERS).write_text(json.dumps(numbers))
        save_file({name: np.ascontiguousarray(table) for name, table in recipe.tables.items()}, folder / TABLES)

    conversions.store(place, write)


def words_of(file: str | Path, ids: np.ndarray) -> np.ndarray:
    """Return the vectors (..., D) float32 of tokens (...) from a file of BERT's weights, of which no more is read."""
    from safetensors import safe_open

    with safe_open(file, framework="np") as weights:
        table = weights.get_slice(TABLE)
        rows = {number: table[number : number + 1][0] for number in np.unique(ids).tolist()}
    return np.stack([rows[number] for number in ids.ravel().tolist()]).reshape(*ids.shape, -1).astype(np.float32)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

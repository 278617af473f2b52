"""The files of a model folder in diffusers' layout: which ones there are, that they stay inside it, and their JSON.

    model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/

Nothing outside the folder is ever opened: a name in an index must be a plain file name, and a symbolic link may not
lead out. No configuration can name code to run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentdiff.checkpoints.header import require_regular
from latentdiff.errors import (
    ModelConfigError,
    ModelFormatError,
    ModelLoadError,
    ModelPathError,
    UnsafeModelError,
)
from latentdiff.models.tokenizer import FILES

__all__ = [
    "CLASSES",
    "NETWORKS",
    "child",
    "model_files",
    "model_hash",
    "read_index",
    "read_json",
    "tokenizer_files",
    "weight_files",
]

MAX_JSON_BYTES = 16 * 2**20
MAX_DEPTH = 64  # of objects and lists within each other
MAX_TOKENIZER_BYTES = 64 * 2**20
WEIGHT_STEMS = ("diffusion_pytorch_model", "model")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5", ".gguf", ".onnx")
CODE_KEYS = ("auto_map", "_target_", "custom_pipelines")

# model_index.json may name these and no others.
CLASSES: dict[str, tuple[str, ...]] = {
    "pipeline": (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionUpscalePipeline",
        "LatentdiffPipeline",
    ),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "PixelSpace"),
    "text_encoder": ("BertModel", "CLIPTextModel", "LabelEncoder", "T5EncoderModel"),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": (
        *("BertTokenizer", "BertTokenizerFast", "CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast"),
    ),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
LOW_RES = "low_res_scheduler"  # of the x4 upscaler
SECOND = ("text_encoder_2", "tokenizer_2")  # of Stable Diffusion XL, whose refiner has no first ones


def child(root: Path, *names: str) -> Path:
    """Return root/names..., which must lie inside `root` once every symbolic link is followed.

    In the cache of huggingface_hub the files are links into the folder `blobs` of the same model, which is allowed.

    Raises:
        ModelPathError: it lies outside.
    """
    path = root.joinpath(*names)
    try:
        real = path.resolve()
        inside = real.is_relative_to(root.resolve())
        if not inside and root.parent.name == "snapshots":
            inside = real.parent == (root.parent.parent / "blobs").resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL byte
        inside = False
    if not inside:
        raise ModelPathError(f"{path}: leads out of the model folder; copy the model with its links resolved (cp -rL)")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelPathError: no such file. ModelFormatError: too large, or no JSON object.
        ModelConfigError: it names code to run.
    """
    size = require_regular(path)
    if size > MAX_JSON_BYTES:
        limit = MAX_JSON_BYTES // 2**20
        raise ModelFormatError(f"{path}: expected at most {limit} MiB of JSON, got {size // 2**20} MiB")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        code = next((key for key in _keys(tree) if key in CODE_KEYS), None)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path}: expected JSON, got something else ({str(error)[:80]})") from error
    except OSError as error:
        raise ModelPathError(f"{path}: cannot be read ({error.strerror})") from error
    if not isinstance(tree, dict):
        raise ModelFormatError(f"{path}: expected a JSON object, got {type(tree).__name__}")
    if code is not None:
        raise ModelConfigError(f"{path}: holds {code!r}, which names code to run; remove it if you trust the rest")
    return tree


def _keys(tree: Any, depth: int = 0) -> Iterator[str]:
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key
            yield from _keys(value, depth + 1)
    elif isinstance(tree, list):
        for item in tree:
            if isinstance(item, (dict, list)):
                yield from _keys(item, depth + 1)


def read_index(root: Path) -> dict[str, str]:
    """Read model_index.json and return the class name of every component that is there, with that of the pipeline.

    A model that knows classes instead of text has no tokenizer; one may have a second text encoder, or it alone.

    Raises:
        ModelConfigError: a component is missing, or of a class that is not in `CLASSES`.
        ModelLoadError: the file cannot be used; see `read_json`.
    """
    path = child(root, "model_index.json")
    if not path.is_file():
        _refuse_pickles(root)
    tree = read_json(path)
    named = {"pipeline": tree.get("_class_name")}
    for component in (*COMPONENTS, *SECOND, LOW_RES):
        entry = tree.get(component)
        named[component] = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    optional: set[str] = set()
    if named["text_encoder_2"] is None:
        optional |= set(SECOND)
    elif named["text_encoder"] is None:
        optional |= {"text_encoder", "tokenizer"}
    if named["text_encoder"] == "LabelEncoder":
        optional |= {"tokenizer"}
    if named["pipeline"] != "StableDiffusionUpscalePipeline":
        optional |= {LOW_RES}
    named = {component: name for component, name in named.items() if name is not None or component not in optional}
    found = {}
    for component, name in named.items():
        choices = CLASSES.get(component)
        if not isinstance(name, str) or (choices and name not in choices):
            wanted = f"a class, {' or '.join(choices)}," if choices else "a class"
            raise ModelConfigError(f"{path}: expected {wanted} for {component}, got {str(name)[:80]!r}")
        found[component] = name
    return found


def weight_files(root: Path, component: str) -> dict[Path, set[str] | None]:
    """Return the safetensors files of a component, each with the tensors its index places there (None without index).

    Those of the fp16 variant are taken where there are no others.

    Raises:
        ModelPathError: there is none, a shard is missing, or an index leads out of the folder.
        UnsafeModelError: there are only files of formats that are never opened.
    """
    for variant in ("", ".fp16"):
        for stem in WEIGHT_STEMS:
            single = child(root, component, f"{stem}{variant}.safetensors")
            if single.exists():
                return {single: None}
            index = child(root, component, f"{stem}.safetensors.index{variant}.json")
            if index.exists():
                return _shards(root, component, index)
    folder = child(root, component)
    _refuse_pickles(folder)
    raise ModelPathError(f"{folder}: expected {' or '.join(WEIGHT_STEMS)}.safetensors, got neither")


def _shards(root: Path, component: str, index: Path) -> dict[Path, set[str] | None]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFormatError(f"{index}: expected a weight_map from tensor to file, got {type(weight_map).__name__}")
    names: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        plain = isinstance(file, str) and file == Path(file).name and not set(file) & set("/\\:\0")
        if not plain or not file.endswith(".safetensors"):
            raise ModelPathError(f"{index}: expected a plain file name ending in .safetensors, got {str(file)[:80]!r}")
        names.setdefault(file, set()).add(tensor)
    files: dict[Path, set[str] | None] = {}
    for file, tensors in sorted(names.items()):
        path = child(root, component, file)
        if not path.exists():
            raise ModelPathError(f"{path}: the index names this shard, but it is missing; get it again")
        files[path] = tensors
    return files


def _refuse_pickles(folder: Path) -> None:
    found = sorted(entry.name for entry in folder.iterdir() if entry.suffix in PICKLES) if folder.is_dir() else []
    if found:
        raise UnsafeModelError(
            f"{folder / found[0]}: expected safetensors, got a format that may run code when opened; "
            "convert it to safetensors where you trust it"
        )


def tokenizer_files(root: Path, component: str = "tokenizer") -> list[Path]:
    """Return the checked files of a tokenizer that are there, in a fixed order.

    Raises:
        ModelLoadError: one leads out of the folder, is no regular file, is too large, or names code to run.
    """
    paths = [child(root, component, name) for name in FILES]
    files = [path for path in paths if path.exists()]
    for file in files:
        if require_regular(file) > MAX_TOKENIZER_BYTES:
            raise ModelFormatError(f"{file}: expected at most {MAX_TOKENIZER_BYTES // 2**20} MiB")
        if file.name == "tokenizer_config.json":
            read_json(file)
    return files


def model_files(root: Path) -> list[Path]:
    """Return every file that decides what the model computes, in a fixed order."""
    files, classes = [child(root, "model_index.json")], read_index(root)
    for component in NETWORKS:
        if component in classes:
            files += [child(root, component, "config.json"), *weight_files(root, component)]
    for component in ("tokenizer", "tokenizer_2"):
        files += tokenizer_files(root, component) if component in classes else []
    schedules = [component for component in ("scheduler", LOW_RES) if component in classes]
    return [*files, *(child(root, component, "scheduler_config.json") for component in schedules)]


def model_hash(root: Path) -> str:
    """Return the SHA-256 over names, sizes and contents of `model_files`, or of a single file.

    Raises:
        ModelLoadError: a file is missing or cannot be read.
    """
    digest = hashlib.sha256()
    for path in [root] if root.is_file() else model_files(root):
        try:
            digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
        except OSError as error:
            raise ModelLoadError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()

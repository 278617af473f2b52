"""The files of a model folder in diffusers' layout: which ones there are, that they stay inside it, and their JSON.

    model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/

A variant lacks components that another model has: "_base" in its model_index.json, which diffusers passes over, is the
name of that model's folder, beside its own.

Nothing outside these folders is ever opened: a name in an index must be a plain file name, and a symbolic link may not
lead out. No configuration can name code to run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from latentdiff.checkpoints.header import require_regular
from latentdiff.errors import (
    LatentDiffError,
    ModelConfigError,
    ModelFormatError,
    ModelPathError,
    UnsafeModelError,
)
from latentdiff.models.tokenizer import FILES

__all__ = [
    "BASE",
    "CLASSES",
    "COMPUTED_IN",
    "DIFFERENCE",
    "INDEX",
    "NETWORKS",
    "Layout",
    "as_diffusers_reads",
    "child",
    "home",
    "is_plain",
    "parse_object",
    "read_json",
    "read_layout",
    "reading",
    "tokenizer_files",
    "vae_folder",
    "weight_files",
]

MAX_JSON_BYTES = 16 * 2**20
LONGEST_NAME = 255  # of a file, in bytes, as most systems have it
MAX_DEPTH = 64  # of objects and lists within each other
MAX_TOKENIZER_BYTES = 64 * 2**20
VARIANTS = (".fp16", ".bf16", ".fp32", ".ema", ".non_ema")  # parts of file names, in the order of preference
WEIGHT_STEMS = ("diffusion_pytorch_model", "model")
OLD_SIDE = 64  # latents, of every U-Net of diffusers before 0.9
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
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
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
TINY_DECODER = "tiny_decoder"  # beside them, if there is one, and in no index: diffusers' pipelines have none
FAST_LORA = "fast_lora.safetensors"  # beside them, if there is one: draws in few calls
INDEX = "model_index.json"
BASE = "_base"  # in the index of a variant
COMPUTED_IN = "dtype"  # first in a text encoder's config.json that we write: what transformers is to compute in
DIFFERENCE = "unet_difference.safetensors"  # in `unet`, in place of weights: what a variant's differ by from the base's


@dataclass(frozen=True)
class Layout:
    """Which components a model has, and where they are.

    Attributes:
        index: content of model_index.json; of a variant, completed by that of its base.
        classes: class name of every component that is there, and that of the pipeline.
        homes: folder that each component is in: that of the model or that of its base.
        base: folder of the model that has what this one lacks; None for a model that is whole.
        difference: file of what the weights of the U-Net differ by from those of the base; None for whole weights.
    """

    index: dict[str, Any]
    classes: dict[str, str]
    homes: dict[str, Path]
    base: Path | None
    difference: Path | None


@contextmanager
def reading(place: object) -> Iterator[None]:
    """Raise ModelPathError for a file or folder that may not be read, wherever that comes out."""
    try:
        yield
    except LatentDiffError:
        raise
    except OSError as error:
        path = str(error.filename or place)[:200]
        raise ModelPathError(f"{path}: cannot be read ({error.strerror or error}); check its rights") from error


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
        text = path.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise ModelFormatError(f"{path}: expected JSON, got something else ({str(error)[:80]})") from error
    except OSError as error:
        raise ModelPathError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_object(text, str(path))


def parse_object(text: str, place: str) -> dict[str, Any]:
    """Return a JSON object of a model file, given its text and what it is called in messages.

    Raises:
        ModelFormatError: it is no JSON object. ModelConfigError: it names code to run.
    """
    try:
        tree = json.loads(text)
        code = next((key for key in _keys(tree) if key in CODE_KEYS), None)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{place}: expected JSON, got something else ({str(error)[:80]})") from error
    if not isinstance(tree, dict):
        raise ModelFormatError(f"{place}: expected a JSON object, got {type(tree).__name__}")
    if code is not None:
        raise ModelConfigError(f"{place}: holds {code!r}, which names code to run; remove it if you trust the rest")
    return tree


def _keys(tree: object, depth: int = 0) -> Iterator[str]:
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


def read_layout(root: Path) -> Layout:
    """Read model_index.json, and of a variant that of its base too.

    Raises:
        ModelPathError: the base is no folder beside this one, or has a base itself.
        ModelConfigError: a component is missing, or of a class that is not in `CLASSES`.
        ModelLoadError: a file cannot be used; see `read_json`.
    """
    own, base, difference = _read_index(root), None, None
    index = own
    if BASE in own:
        base = _base_folder(root, own[BASE])
        theirs = _read_index(base)
        if BASE in theirs:
            raise ModelPathError(f"{base}: expected a whole model as the base of {root.name}, got another variant")
        index = {**theirs, **own}
        if "unet" in own and child(root, "unet", DIFFERENCE).exists():
            difference = child(root, "unet", DIFFERENCE)
    classes = _classes(root / INDEX, index)
    homes = {component: root if base is None or component in own else base for component in classes}
    return Layout(index, classes, homes, base, difference)


def home(root: Path, component: str) -> Path:
    """Return the folder that a component of a model is in: `root`, or that of its base where this is a variant.

    Raises:
        ModelLoadError: see `read_layout`.
    """
    if not (root / INDEX).exists() or (root / component).exists():
        return root
    return read_layout(root).homes.get(component, root)


def _read_index(root: Path) -> dict[str, Any]:
    path = child(root, INDEX)
    if not path.is_file():
        _refuse_pickles(root)
    return read_json(path)


def _base_folder(root: Path, name: object) -> Path:
    place = root.resolve().parent
    if not is_plain(name):
        raise ModelPathError(f"{root / INDEX}: expected the plain name of a folder as {BASE}, got {str(name)[:80]!r}")
    base = child(place, name)
    if not base.is_dir():
        raise ModelPathError(f"{base}: {root.name} is a variant of this model, but it is missing; put it there")
    return base


def is_plain(name: object) -> TypeGuard[str]:
    """Say whether this is the name of a file or folder, and no path."""
    if not isinstance(name, str) or len(name.encode(errors="replace")) > LONGEST_NAME:
        return False
    return name == Path(name).name and name not in ("", "..") and not set(name) & set("/\\:\0")


def _classes(path: Path, index: dict[str, Any]) -> dict[str, str]:
    """Return the class name of every component that is there, with that of the pipeline.

    A model that knows classes instead of text has no tokenizer; one may have a second text encoder, or it alone.

    Raises:
        ModelConfigError: a component is missing, or of a class that is not in `CLASSES`.
    """
    named = {"pipeline": index.get("_class_name")}
    for component in (*COMPONENTS, *SECOND, LOW_RES):
        entry = index.get(component)
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


def as_diffusers_reads(config: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a U-Net's config.json with the size that diffusers draws at.

    Those written before its release 0.9, of Stable Diffusion 1.x and fine-tunes of it, say 32 and were trained at 64.
    """
    version = re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version", "")))
    side = config.get("sample_size")
    if version and (int(version[1]), int(version[2])) < (0, 9) and isinstance(side, int) and side < OLD_SIDE:
        return {**config, "sample_size": OLD_SIDE}
    return config


def weight_files(root: Path, component: str) -> dict[Path, set[str] | None]:
    """Return the safetensors files of a component, each with the tensors its index places there (None without index).

    Those of a variant are taken where there are no others.

    Raises:
        ModelPathError: there is none, a shard is missing, or an index leads out of the folder.
        UnsafeModelError: there are only files of formats that are never opened.
    """
    for variant in ("", *VARIANTS):
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
        if not is_plain(file) or not file.endswith(".safetensors"):
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


def vae_folder(path: Path) -> Path:
    """Return the folder with an autoencoder's config.json, given it or the folder of a model.

    Raises:
        ModelLoadError: see `read_layout`.
    """
    return path.absolute() if (path / "config.json").exists() else (home(path, "vae") / "vae").absolute()

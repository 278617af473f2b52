"""The result of a request: images, and everything that makes each of them again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from PIL import Image

from latentdiff import __version__
from latentdiff.encoding import QUALITY, encode, format_of
from latentdiff.errors import InputError, shown
from latentdiff.files import require_path, write_file
from latentdiff.generation.infotext import infotext
from latentdiff.images import numbered, read_texts
from latentdiff.marks import COMPOSITE, GENERATED, mark

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from latentdiff.checkpoints import Components
    from latentdiff.engine.execution import Execution
    from latentdiff.generation.request import Settings
    from latentdiff.signing import Signer

__all__ = [
    "GeneratedImage",
    "Result",
    "SaveOptions",
    "call_record",
    "image_record",
    "read_record",
    "record_of",
    "recorded_name",
    "save_next",
]

METADATA_KEY = "latentdiff"  # of the PNG text chunk that holds an image's record as JSON, and of PIL's info
MAX_CHAIN = 4  # pictures made of one another, the records of which are kept within each other
OTHER_FORMATS = (".gif", ".bmp", ".tif", ".tiff", ".avif")
OWN = ("prompt", "seed", "variation_seed", "batch_size", "batch_index")  # keys of a record that differ between images


class SaveOptions(TypedDict, total=False):
    """How pictures are written; see `GeneratedImage.save`."""

    metadata: bool
    mark: bool
    signer: Signer | None


@dataclass(frozen=True)
class GeneratedImage:
    """One image of a request.

    Attributes:
        image: by output_type: a picture ("pil"), a tensor (3, H, W) or array (H, W, 3) in [0, 1] ("pt", "np"), or
            scaled latents (C, h, w) float32 ("latent"). A picture is RGB, or RGBA where the input is transparent.
        record: everything that makes it again, JSON-ready.
        token_count: tokens of its prompt, begin and end included.
        window_count: text windows in which the prompt was encoded; 1 unless it is long.
        notes: messages to the caller that came up with this image.
    """

    image: Any
    record: dict[str, Any]
    token_count: int
    window_count: int
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Let a picture carry its record and mark, so that a picture made of it can be replayed and marked too."""
        if isinstance(self.image, Image.Image):
            self.image.info[METADATA_KEY] = json.dumps(self.record)
            self.image.info["xmp"] = mark(self.source_type)

    @property
    def prompt(self) -> str:
        """The prompt it was generated from."""
        return str(self.record["prompt"])

    @property
    def seed(self) -> int:
        """The seed that makes it again, alone."""
        return int(self.record["seed"])

    @property
    def source_type(self) -> str:
        """The IPTC digital source type of its mark: whether a model made it of nothing but noise, or of a picture."""
        given = self.record.get("image")
        return GENERATED if given is None or given.get("generated") is True else COMPOSITE

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        metadata: bool = True,
        mark: bool = True,
        signer: Signer | None = None,
        overwrite: bool = True,
    ) -> None:
        """Write a PNG, JPEG or WebP file that says how to make the image again, and that a model made it.

        Args:
            path: of the file, a PNG unless its name ends in .jpg, .jpeg or .webp.
            metadata: False for no prompt and no settings, so that `latentdiff replay` knows nothing of it.
            mark: False for no IPTC digital source type (`source_type`).
            signer: what signs it by C2PA; see `signing.load_signer`.
            overwrite: replace an existing file; with False that is a FileExistsError.

        Raises:
            InputError: the request had another output_type than "pil", the settings are too long for a JPEG, or it is
                to be signed and not marked.
            StorageError: the file cannot be written.
        """
        target = require_path(path, "a picture")
        if target.suffix.lower() in OTHER_FORMATS:
            raise InputError(f"pictures are written as PNG, JPEG or WebP, got {shown(os.fspath(path))}; name it .png")
        data = self.encoded(format_of(target), metadata=metadata, mark=mark, signer=signer)
        write_file(target, data, overwrite=overwrite)

    def encoded(
        self,
        kind: str = "PNG",
        *,
        quality: int = QUALITY,
        metadata: bool = True,
        mark: bool = True,
        signer: Signer | None = None,
    ) -> bytes:
        """Return what `save` would write, as bytes.

        Args:
            kind: "PNG", "JPEG" or "WEBP".
            quality: of JPEG and WebP, 0 to 100.
            metadata, mark, signer: see `save`.

        Raises:
            InputError: as `save`.
        """
        if not isinstance(self.image, Image.Image):
            raise InputError('only pictures can be saved, got tensors; call with output_type="pil"')
        if signer is not None and not mark:
            raise InputError("a signature says that a model made the picture, got mark=False; leave out one of them")
        texts = {METADATA_KEY: json.dumps(self.record), "parameters": infotext(self.record)} if metadata else {}
        data = encode(self.image, kind, texts, self.source_type if mark else None, quality)
        return data if signer is None else signer.sign(data, kind, self.source_type)


@dataclass(frozen=True)
class Result:
    """All images of a request; image i belongs to seeds[i].

    Attributes:
        images: by output_type: a list of pictures ("pil"), a tensor (B, 3, H, W) or array (B, H, W, 3) in [0, 1]
            ("pt", "np"), or scaled latents (B, C, h, w) float32 ("latent").
        seeds: each alone makes its image again.
        settings: of all images.
        own: of each image besides, its place in its batch included; see `record`.
        token_counts, window_counts: see `GeneratedImage`.
        notes: messages to the caller, such as a picture that had to be decoded in float32.
    """

    images: Any
    seeds: list[int]
    settings: dict[str, Any]
    own: list[dict[str, Any]]
    token_counts: list[int]
    window_counts: list[int]
    notes: list[str]

    @classmethod
    def of(cls, generated: Sequence[GeneratedImage]) -> Result:
        """Return the result of a request from its images, of which there is one at least."""
        images = [one.image for one in generated]
        return cls(
            images=images if isinstance(images[0], Image.Image) else _stacked(images),
            seeds=[one.seed for one in generated],
            settings={key: value for key, value in generated[0].record.items() if key not in OWN},
            own=[{key: one.record[key] for key in OWN} for one in generated],
            token_counts=[one.token_count for one in generated],
            window_counts=[one.window_count for one in generated],
            notes=[note for one in generated for note in one.notes],
        )

    def record(self, index: int) -> dict[str, Any]:
        """Return everything that makes image `index` again, JSON-ready."""
        return {**self.own[index], **self.settings}

    def write(self, index: int, path: str | os.PathLike[str], **how: Unpack[SaveOptions]) -> None:
        """Write image `index`; see `GeneratedImage.save`."""
        self._image(index).save(path, **how)

    def save(self, path: str | os.PathLike[str], **how: Unpack[SaveOptions]) -> list[Path]:
        """Write all images and return their paths: the first is `path`, the others fox-2.png, ... where these are free.

        See `GeneratedImage.save`.
        """
        names = numbered(path)
        indices = range(len(self.seeds))
        return [save_next(self._image(n), names, replace=n == 0, **how) for n in indices]

    def _image(self, index: int) -> GeneratedImage:
        if type(index) is not int or not 0 <= index < len(self.seeds):
            last = len(self.seeds) - 1
            raise InputError(f"an image must be one of 0 to {last}, got {shown(index)}; choose one of these")
        counts = self.token_counts[index], self.window_counts[index]
        one = self.images[index] if isinstance(self.images, list) else None
        return GeneratedImage(one, self.record(index), *counts)


def save_next(
    image: GeneratedImage, names: Iterator[Path], *, replace: bool = False, **how: Unpack[SaveOptions]
) -> Path:
    """Write an image to the next of some paths where no file is, and return that; see `GeneratedImage.save`.

    Args:
        names: without end.
        replace: write to the next one in any case.
    """
    for path in names:
        if not replace and path.exists():
            continue
        try:
            image.save(path, overwrite=replace, **how)
        except FileExistsError:  # of another process, since
            continue
        return path
    raise AssertionError("there is always another number")


def _stacked(images: list[Any]) -> Any:
    import numpy as np
    import torch

    return np.stack(images) if isinstance(images[0], np.ndarray) else torch.stack(images)


def call_record(
    components: Components, execution: Execution, settings: Settings, inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the records of all images of a request have besides its settings.

    Args:
        inputs: records of image, mask and latents.
    """
    import torch

    from latentdiff.diffusion.tuned import TUNED

    shared = {
        **inputs,
        "model": recorded_name(components.name),
        "model_hash": components.model_hash,
        **({} if components.vae is None else {"vae": recorded_name(components.vae)}),
        "prediction_type": components.schedule.prediction_type,
        "embeddings": [_with_name(dict(embedding)) for embedding in components.embeddings],
        "loras": [_with_name(lora.record()) for lora in components.loras],
        "device": execution.device.type,
        "dtype": str(execution.dtype).removeprefix("torch."),
        **execution.engine.record(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "version": __version__,
    }
    if settings.sampler == TUNED:
        shared["tuned_sampler"] = components.tuned_table(settings.num_inference_steps).digest
    return shared


def image_record(settings: Settings, shared: Mapping[str, Any], index: int, place: tuple[int, int]) -> dict[str, Any]:
    """Return the record of image `index`.

    Args:
        settings: of the request.
        shared: see `call_record`.
        index: of the image.
        place: size of the batch it was drawn in, and its row there.
    """
    values = {**settings.record(index), **shared, "batch_size": place[0], "batch_index": place[1]}
    return {key: values[key] for key in OWN} | values  # those first, as `Result.record` has them


def recorded_name(path: str | os.PathLike[str]) -> str:
    """Return how a record calls a file or model: by its path from here, by its name alone where that is elsewhere.

    So nothing of a home folder gets into pictures. Names that are not UTF-8 are escaped.
    """
    given = Path(path)
    name = given.name if given.is_absolute() or ".." in given.parts else os.fspath(path)
    return name.encode("utf-8", "backslashreplace").decode()


def _with_name(record: dict[str, Any]) -> dict[str, Any]:
    path = record.get("path")
    return {**record, "path": recorded_name(path)} if isinstance(path, str) else record


def record_of(picture: Image.Image) -> dict[str, Any] | None:
    """Return the record of a picture that a call returned; None where that is not known.

    Whether it was changed since shows when it is generated again.
    """
    text = picture.info.get(METADATA_KEY)
    try:
        record = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and _chain(record) < MAX_CHAIN else None


def _chain(record: object) -> int:
    """Return how many pictures made of one another a record tells of."""
    links = 0
    while isinstance(record, dict):
        links, image = links + 1, record.get("image")
        record = image.get("record") if isinstance(image, dict) else None
    return links


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the record that `GeneratedImage.save` put into a file.

    Raises:
        InputError: the file cannot be read, or holds no settings.
    """
    try:
        record = json.loads(read_texts(path).get(METADATA_KEY, ""))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        record = None
    if not isinstance(record, dict):
        raise InputError(f"{os.fspath(path)} must hold latentdiff's settings, got none; use the file as it was written")
    if _chain(record) > MAX_CHAIN:
        raise InputError(f"{os.fspath(path)} must tell of at most {MAX_CHAIN} pictures drawn of one another, got more")
    return record

"""Images: open them safely, turn them into tensors and back, write them atomically with what made them.

Only PNG, JPEG and WebP are opened, recognised by content. Whatever is inside (palette, alpha, 16 bits, CMYK, an ICC
profile, an EXIF rotation) comes out as an upright 8-bit sRGB picture; transparent parts become white.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from latentdiff.decoding import MAX_PIXELS, decode, parse, refusing, upright
from latentdiff.encoding import encode, texts_of
from latentdiff.errors import InputError
from latentdiff.files import read_file, require_path, write_file

if TYPE_CHECKING:
    import torch

__all__ = [
    "MAX_PIXELS",
    "decode_rgba",
    "fit",
    "from_array",
    "from_tensor",
    "image_size",
    "numbered",
    "open_image",
    "open_rgba",
    "open_stored",
    "pixel_hash",
    "read_texts",
    "sheet",
    "texts_in",
    "to_rgb",
    "to_rgba",
    "to_tensor",
    "to_unit_range",
    "write_png",
]

MAX_FILE_BYTES = 256 * 2**20


def open_image(path: str | os.PathLike[str], *, opaque: bool = False) -> Image.Image:
    """Open a PNG, JPEG or WebP file as an upright sRGB picture.

    Args:
        path: of the file.
        opaque: refuse transparent parts instead of laying them over white.

    Returns:
        An image of mode "RGB".

    Raises:
        InputError: there is no such file, it is another format, animated, truncated, broken or too large.
    """
    name = os.fspath(path)
    return to_rgb(decode(_read(path), name), opaque=opaque, name=name)


def decode_rgba(data: bytes, name: str) -> Image.Image:
    """Return the picture in the bytes of a PNG, JPEG or WebP file, upright, in sRGB and with its opacity.

    Args:
        data: content of the file.
        name: of the file, for messages.

    Returns:
        An image of mode "RGBA", its colours not premultiplied.

    Raises:
        InputError: it is another format, animated, truncated, broken or too large.
    """
    return to_rgba(decode(data, name), name)


def open_rgba(path: str | os.PathLike[str], what: str = "image") -> Image.Image:
    """Open a PNG, JPEG or WebP file as `decode_rgba` does.

    Args:
        path: of the file.
        what: it is, for messages.

    Raises:
        InputError: as `open_image`.
    """
    return decode_rgba(_read(path, what), os.fspath(path))


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """Return width and height of the picture in the bytes of a file, as it is stored; no pixel is decoded.

    Raises:
        InputError: as `decode_rgba`, as far as the header tells.
    """
    return parse(data, name).size


def read_texts(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the text chunks of a PNG file, or the settings that a JPEG or WebP file carries; see `encoding.encode`.

    Raises:
        InputError: as `open_image`, as far as the header tells.
    """
    return texts_in(_read(path), os.fspath(path))


def texts_in(data: bytes, name: str) -> dict[str, str]:
    """Return the same of the bytes of a file, which messages call `name`."""
    image = parse(data, name)
    with refusing(name, "pass the original file"):
        return texts_of(image)


def open_stored(path: str | os.PathLike[str]) -> Image.Image:
    """Open a PNG, JPEG or WebP file as it is stored, with its `format` and all that it carries in `info`.

    Raises:
        InputError: as `open_image`.
    """
    return decode(_read(path), os.fspath(path))


def from_array(pixels: np.ndarray | torch.Tensor, name: str = "image") -> Image.Image:
    """Return a picture that is held as numbers.

    Args:
        pixels: (H, W, 3), RGB, or (H, W, 4) with opacity, or (H, W), grey; uint8, or floating point in [0, 1].
        name: for messages.

    Raises:
        InputError: it has another shape, type or range.
    """
    with refusing(name, "pass an array in memory"):
        if not isinstance(pixels, np.ndarray):
            held = pixels.detach().cpu()
            pixels = (held.float() if held.is_floating_point() else held).numpy()
        values = np.asarray(pixels)
    got = f"{values.dtype} {'x'.join(map(str, values.shape))}"
    if values.ndim not in (2, 3) or values.shape[2:] not in ((), (3,), (4,)) or not values.size:
        raise InputError(f"{name} must be height x width x 3 numbers, got {got}; pass one picture, colours last")
    if np.issubdtype(values.dtype, np.floating):
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise InputError(f"{name} of floating point must be from 0 to 1, got other values; scale it first")
        values = np.rint(values.astype(np.float32) * 255).astype(np.uint8)
    if values.dtype != np.uint8:
        raise InputError(f"{name} must be uint8, or floating point from 0 to 1, got {got}; convert it first")
    return Image.fromarray(np.ascontiguousarray(values))


def _read(path: str | os.PathLike[str], what: str = "image") -> bytes:
    return read_file(path, MAX_FILE_BYTES, what)


def to_rgb(image: Image.Image, *, opaque: bool = False, name: str = "image") -> Image.Image:
    """Return any decoded picture as upright 8-bit sRGB (mode "RGB"), transparent parts over white unless `opaque`.

    Raises:
        InputError: it is broken, empty or of a mode without a defined range (32-bit floating point), or transparent
            parts are refused.
    """
    with refusing(name):
        color, alpha = upright(image, name)
        if alpha is None:
            return color.copy() if color is image else color  # which its owner may change
        if opaque and alpha.getextrema()[0] < 255:  # type: ignore[operator]  # one band
            raise InputError(f"{name} must be opaque here, got transparent parts; lay it on a background first")
        return Image.composite(color, Image.new("RGB", color.size, "white"), alpha)


def to_rgba(image: Image.Image, name: str = "image") -> Image.Image:
    """Return any decoded picture as upright 8-bit sRGB with its opacity (mode "RGBA"), not premultiplied.

    Raises:
        InputError: it is broken, empty or of a mode without a defined range (32-bit floating point).
    """
    with refusing(name):
        color, alpha = upright(image, name)
        rgba = color.convert("RGBA")
        if alpha is not None:
            rgba.putalpha(alpha)
        return rgba


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale a picture until it covers width x height pixels, and cut off evenly what stands over."""
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def pixel_hash(image: Image.Image) -> str:
    """Return the SHA-256 of a picture's size and RGB bytes, the same for every file format without loss."""
    return hashlib.sha256(b"%dx%d:" % image.size + image.tobytes()).hexdigest()


def to_tensor(images: Sequence[Image.Image] | np.ndarray) -> torch.Tensor:
    """Return RGB pictures of one size, or uint8 (B, H, W, 3), as a float32 tensor (B, 3, H, W) in [-1, 1]."""
    import torch

    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))  # (B, H, W, 3) uint8
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)  # (B, 3, H, W)


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """Return images from [-1, 1] as float32 in [0, 1], clamped."""
    return images.float().div(2).add(0.5).clamp(0, 1)


def from_tensor(images: torch.Tensor) -> list[Image.Image]:
    """Return images (B, 3, H, W) in [-1, 1] as RGB pictures."""
    import torch

    pixels = to_unit_range(images.detach()).mul(255).round().to("cpu", torch.uint8)
    return [Image.fromarray(one) for one in pixels.permute(0, 2, 3, 1).contiguous().numpy()]  # each (H, W, 3)


def write_png(
    path: str | os.PathLike[str], image: Image.Image, texts: Mapping[str, str], source_type: str | None = None
) -> None:
    """Write a PNG with text chunks and a mark, atomically; see `encoding.encode` and `files.write_file`.

    Raises:
        InputError: that is no path.
    """
    require_path(path, "a picture")
    write_file(path, encode(image, "PNG", texts, source_type))


def sheet(pictures: Sequence[Image.Image], columns: int, gap: int = 0) -> Image.Image:
    """Return pictures of one size as one, row by row, with white pixels between."""
    width, height = pictures[0].width + gap, pictures[0].height + gap
    rows = -(-len(pictures) // columns)
    found = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for index, picture in enumerate(pictures):
        found.paste(picture, ((index % columns) * width, (index // columns) * height))
    return found


def numbered(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield paths without end for several pictures that are asked for as one: fox.png, fox-2.png, fox-3.png, ..."""
    first = require_path(path, "a picture")
    yield first
    for number in itertools.count(2):
        yield first.with_stem(f"{first.stem}-{number}")

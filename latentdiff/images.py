"""Images: open them safely, turn them into tensors and back, write them atomically with what made them.

Only PNG, JPEG and WebP are opened, recognised by content. Whatever is inside (palette, alpha, 16 bits, CMYK, an ICC
profile, an EXIF rotation) comes out as an upright 8-bit sRGB picture; transparent parts become white.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from latentdiff.errors import InputError, StorageError

if TYPE_CHECKING:
    import torch

__all__ = [
    "MAX_PIXELS",
    "check_writable",
    "decode_rgba",
    "fit",
    "from_tensor",
    "numbered",
    "open_image",
    "open_rgba",
    "pixel_hash",
    "read_texts",
    "to_rgb",
    "to_rgba",
    "to_tensor",
    "to_unit_range",
    "write_file",
    "write_png",
]

MAX_PIXELS = 64 * 2**20
MAX_FILE_BYTES = 256 * 2**20

SIGNATURES: tuple[tuple[bytes, int, type], ...] = (  # bytes, where they stand, what decodes the file
    (b"\x89PNG\r\n\x1a\n", 0, PngImagePlugin.PngImageFile),
    (b"\xff\xd8\xff", 0, JpegImagePlugin.JpegImageFile),
    (b"WEBP", 8, WebPImagePlugin.WebPImageFile),
)


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
    return to_rgb(_decode(_read(path), os.fspath(path)), opaque=opaque)


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
    return to_rgba(_decode(data, name))


def open_rgba(path: str | os.PathLike[str]) -> Image.Image:
    """Open a PNG, JPEG or WebP file as `decode_rgba` does.

    Raises:
        InputError: as `open_image`.
    """
    return decode_rgba(_read(path), os.fspath(path))


def read_texts(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the text chunks of a PNG file.

    Raises:
        InputError: there is no such file, or it is no PNG that can be read.
    """
    name = os.fspath(path)
    image = _parse(_read(path), name)
    if not isinstance(image, PngImagePlugin.PngImageFile):
        raise InputError(f"{name} must be a PNG written by latentdiff, got {image.format}; pass the original file")
    try:
        return {str(key): str(value) for key, value in image.text.items()}
    except Exception as error:
        raise InputError(f"{name} is truncated or broken ({error}); pass the original file") from error


def _read(path: str | os.PathLike[str]) -> bytes:
    name = os.fspath(path)
    try:
        status = os.stat(name)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{name} must be an image file, got a folder or device; pass a PNG, JPEG or WebP file")
        if status.st_size > MAX_FILE_BYTES:
            limit = MAX_FILE_BYTES // 2**20
            raise InputError(f"{name} must be at most {limit} MiB, got {status.st_size // 2**20} MiB; make it smaller")
        return Path(name).read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read image {name!r}: {reason}; check the path") from error


def _decode(data: bytes, name: str) -> Image.Image:
    image = _parse(data, name)
    try:
        image.load()
    except Exception as error:  # a decoder may fail in any way on a hostile file
        raise InputError(f"{name} is truncated or broken ({error}); save it again from its source") from error
    return image


def _parse(data: bytes, name: str) -> Image.Image:
    """Read the header of an image file and check its kind and size; no pixel is decoded."""
    decoder = next((kind for mark, at, kind in SIGNATURES if data[at : at + len(mark)] == mark), None)
    if decoder is None:
        raise InputError(f"{name} is not a PNG, JPEG or WebP file by its content; convert it to PNG first")
    try:
        image: Image.Image = decoder(io.BytesIO(data))
        frames = getattr(image, "n_frames", 1)
    except Exception as error:  # a decoder may fail in any way on a hostile file
        raise InputError(f"{name} is truncated or broken ({error}); save it again from its source") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        limit = MAX_PIXELS // 2**20
        raise InputError(f"{name} must have at most {limit} megapixels, got {width}x{height}; scale it down first")
    if frames > 1:
        raise InputError(f"{name} must be one still picture, got an animation of {frames} frames; save one frame of it")
    return image


def to_rgb(image: Image.Image, *, opaque: bool = False) -> Image.Image:
    """Return any decoded picture as upright 8-bit sRGB (mode "RGB"), transparent parts over white unless `opaque`.

    Raises:
        InputError: the mode has no defined range (32-bit floating point), or transparent parts are refused.
    """
    color, alpha = _upright(image)
    if alpha is None:
        return color
    if opaque and alpha.getextrema()[0] < 255:  # type: ignore[operator]  # one band
        raise InputError("image must be opaque here, got transparent parts; lay it on a background first")
    return Image.composite(color, Image.new("RGB", color.size, "white"), alpha)


def to_rgba(image: Image.Image) -> Image.Image:
    """Return any decoded picture as upright 8-bit sRGB with its opacity (mode "RGBA"), not premultiplied.

    Raises:
        InputError: the mode has no defined range (32-bit floating point).
    """
    color, alpha = _upright(image)
    rgba = color.convert("RGBA")
    if alpha is not None:
        rgba.putalpha(alpha)
    return rgba


def _upright(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return a picture as upright 8-bit sRGB (mode "RGB") and its opacity (L), or None where it has none."""
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    color, alpha = _split_alpha(image)
    color = _apply_profile(color, profile) if profile else color
    return color if color.mode == "RGB" else color.convert("RGB"), alpha


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours, in the mode a colour profile would expect (L, RGB, CMYK), and the opacity (L) or None."""
    if image.mode == "F":
        raise InputError("image must hold 8 or 16 bits per channel, got floating point; convert it to RGB first")
    if image.mode.startswith("I"):  # 16 bits per pixel; Pillow's own conversion clips instead of scaling
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        color = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
        clear = image.info.get("transparency")
        return color, None if clear is None else Image.fromarray(np.where(wide == clear, 0, 255).astype(np.uint8))
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode in ("1", "L", "LA"):
        return image.convert("L"), alpha
    if image.mode == "CMYK":
        return image, None
    if image.mode == "RGB":
        return image, alpha
    return (image.convert("RGBA") if alpha is not None else image).convert("RGB"), alpha


def _apply_profile(color: Image.Image, profile: bytes) -> Image.Image:
    """Convert from an embedded ICC profile to sRGB; a broken or unfit profile counts as none, as in browsers."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return color
        if space == "RGB" and color.mode == "L":
            color = color.convert("RGB")
        if space != {"L": "GRAY"}.get(color.mode, color.mode):
            return color
        converted = ImageCms.profileToProfile(color, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return color
    return converted or color


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


def write_png(path: str | os.PathLike[str], image: Image.Image, texts: Mapping[str, str]) -> None:
    """Write a PNG with text chunks, atomically: the whole file appears under its name, or nothing does.

    The bytes depend on nothing but the arguments and Pillow's version.

    Raises:
        StorageError: the file cannot be written.
    """
    chunks = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        if text.isascii():
            chunks.add_text(key, text)
        else:
            chunks.add_itxt(key, text)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=chunks)
    write_file(path, buffer.getvalue())


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically: beside its place, flushed to disk, then renamed; removed on failure or Ctrl-C.

    Raises:
        StorageError: the file cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _storage_error(target, error) from error
        raise


def numbered(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield paths without end for several pictures that are asked for as one: fox.png, fox-2.png, fox-3.png, ..."""
    first = Path(path)
    yield first
    for number in itertools.count(2):
        yield first.with_stem(f"{first.stem}-{number}")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out, before any work is done, that `path` could be written.

    Raises:
        StorageError: its folder is missing or closed, or the path names a folder.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise StorageError(f"cannot write {target}: there is no folder {str(target.parent)!r}; create it first")
    if target.is_dir():
        raise StorageError(f"cannot write {target}: it is a folder; name a file in it, as in {target / 'fox.png'}")
    probe = target.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        with open(probe, "xb"):
            probe.unlink()
    except OSError as error:
        raise _storage_error(target, error) from error


def _storage_error(target: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {target}: {error.strerror or error}; free space or choose another place")

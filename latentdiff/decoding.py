"""Decode pictures that may be hostile: PNG, JPEG and WebP by content, of any mode, colour profile and rotation.

Everything that Pillow does with such a picture happens here, because it may fail in any way.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageCms, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from latentdiff.errors import InputError

__all__ = ["MAX_PIXELS", "decode", "parse", "refusing", "upright"]

MAX_PIXELS = 64 * 2**20
SIGNATURES: tuple[tuple[bytes, int, type], ...] = (  # bytes, where they stand, what decodes the file
    (b"\x89PNG\r\n\x1a\n", 0, PngImagePlugin.PngImageFile),
    (b"\xff\xd8\xff", 0, JpegImagePlugin.JpegImageFile),
    (b"WEBP", 8, WebPImagePlugin.WebPImageFile),
)
PILLOW = re.compile(r"PIL\.")  # modules whose warnings nobody is to read
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, name: str) -> Image.Image:
    """Return the picture in the bytes of a file, as it is stored.

    Args:
        data: content of the file.
        name: of the file, for messages.

    Raises:
        InputError: it is another format, animated, truncated, broken or too large.
    """
    image = parse(data, name)
    with refusing(name):
        image.load()
    return image


def parse(data: bytes, name: str) -> Image.Image:
    """Read the header of an image file and check its kind and size; no pixel is decoded.

    Raises:
        InputError: as `decode`, as far as the header tells.
    """
    decoder = next((kind for mark, at, kind in SIGNATURES if data[at : at + len(mark)] == mark), None)
    if decoder is None:
        raise InputError(f"{name} is not a PNG, JPEG or WebP file by its content; convert it to PNG first")
    with refusing(name):
        image: Image.Image = decoder(io.BytesIO(data))
        frames = getattr(image, "n_frames", 1)
    width, height = image.size
    if width * height > MAX_PIXELS:
        limit = MAX_PIXELS // 2**20
        raise InputError(f"{name} must have at most {limit} megapixels, got {width}x{height}; scale it down first")
    if frames > 1:
        raise InputError(f"{name} must be one still picture, got an animation of {frames} frames; save one frame of it")
    return image


@contextmanager
def refusing(name: str, remedy: str = "save it again from its source") -> Iterator[None]:
    """Make an InputError of whatever Pillow raises on a hostile picture, and keep Pillow's warnings from stderr.

    Args:
        name: of the picture.
        remedy: what to do about it.
    """
    if not any(known[0] == "ignore" and known[3] == PILLOW for known in warnings.filters):
        # For good: what puts filters back (`warnings.catch_warnings`) is not for threads.
        warnings.filterwarnings("ignore", module=PILLOW.pattern)
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{name} is truncated or broken ({error}); {remedy}") from error


def upright(image: Image.Image, name: str) -> tuple[Image.Image, Image.Image | None]:
    """Return a picture as upright 8-bit sRGB (mode "RGB") and its opacity (L), or None where it has none.

    Args:
        image: any, decoded or not.
        name: for messages.

    Raises:
        InputError: it has no pixels, or is of a mode without a defined range (32-bit floating point).
    """
    if 0 in image.size:
        raise InputError(f"{name} must have pixels, got {image.width}x{image.height}; pass another picture")
    image.load()  # here, and not in whatever touches the pixels first
    profile, turn = image.info.get("icc_profile"), _turn(image)
    if turn is not None:
        image = image.transpose(turn)
    color, alpha = _split_alpha(image, name)
    color = _apply_profile(color, profile) if profile else color
    color = color if color.mode == "RGB" else color.convert("RGB")
    if "xmp" in image.info:  # by which it may be marked, and which not all of this keeps
        color.info["xmp"] = image.info["xmp"]
    return color, alpha


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return what makes a picture upright by its EXIF; a broken one counts as none, as in browsers."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # in any way, as what reads it was not written for hostile files
        return None


def _split_alpha(image: Image.Image, name: str) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours, in the mode a colour profile would expect (L, RGB, CMYK), and the opacity (L) or None."""
    if image.mode == "F":
        raise InputError(f"{name} must hold 8 or 16 bits per channel, got floating point; convert it to RGB first")
    if image.mode.startswith("I"):
        return _split_wide(image)
    if image.mode == "La":  # premultiplied, as Pillow makes it where it scales grey pictures
        image = image.convert("LA")
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode in ("1", "L", "LA"):
        return image.convert("L"), alpha
    if image.mode == "CMYK":
        return image, None
    if image.mode == "RGB":
        return image, alpha
    return (image.convert("RGBA") if alpha is not None else image).convert("RGB"), alpha


def _split_wide(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return grey and opacity of 16 bits per pixel, or of whole numbers (mode "I") of 8 bits where none is larger."""
    wide = np.asarray(image).astype(np.int32).clip(0, 65535)
    most = 255 if image.mode == "I" and wide.max() <= 255 else 65535
    grey = Image.fromarray(((wide * 255 + most // 2) // most).astype(np.uint8))  # Pillow's own conversion clips
    clear = image.info.get("transparency")
    return grey, None if clear is None else Image.fromarray(np.where(wide == clear, 0, 255).astype(np.uint8))


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

"""Encode pictures as PNG, JPEG or WebP, with texts and a mark that say where they come from; read the texts again.

Nothing else that a picture carries in memory, such as the metadata of a file it came from, gets into a file.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from PIL import ExifTags, Image, PngImagePlugin

from latentdiff.errors import InputError
from latentdiff.marks import mark

__all__ = ["FORMATS", "QUALITY", "encode", "format_of", "texts_of"]

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # Pillow's names, by the ending of a file's
QUALITY = 95  # of JPEG and WebP
PARAMETERS = "parameters"  # what the web UIs call the settings of a picture, which they keep as EXIF's comment
XMP_KEY = "XML:com.adobe.xmp"  # of the PNG chunk
COMMENT = b"UNICODE\0"  # before a UserComment in UTF-16; Exif 3.0, table 9
MAKER = b"latentdiff\0"  # before a MakerNote of ours
MAX_EXIF = 2**16 - 3  # bytes in a JPEG segment, without the length
MAX_SIDE = {"PNG": 2**31 - 1, "JPEG": 65500, "WEBP": 2**14 - 1}  # pixels along a side, of libjpeg and libwebp


def format_of(path: Path) -> str:
    """Return the format that a file is written in by its name: PNG where that does not tell."""
    return FORMATS.get(path.suffix.lower(), "PNG")


def encode(
    image: Image.Image,
    kind: str = "PNG",
    texts: Mapping[str, str] | None = None,
    source_type: str | None = None,
    quality: int = QUALITY,
) -> bytes:
    """Return a picture as the bytes of a file, which depend on nothing but the arguments and Pillow's version.

    Args:
        image: mode "RGB" or "RGBA"; JPEG has no transparency, and gets it over white.
        kind: of file, one of `FORMATS`.
        texts: chunks of a PNG; in other formats "parameters" goes into EXIF's UserComment, and the one beside it into
            its MakerNote.
        source_type: IPTC digital source type that its mark names; None for no mark.
        quality: of JPEG and WebP, 0 to 100.

    Raises:
        InputError: a JPEG cannot hold that much text, or the format that large a picture.
    """
    # No lone surrogates, which no file can hold.
    written = {key: text.encode("utf-8", "backslashreplace").decode() for key, text in (texts or {}).items()}
    packet = None if source_type is None else mark(source_type)
    if max(image.size) > MAX_SIDE[kind]:
        got = f"{image.width}x{image.height}"
        raise InputError(f"a {kind} holds at most {MAX_SIDE[kind]} pixels along a side, got {got}; write a PNG")
    bare = image.copy()
    bare.info = {}
    if kind == "JPEG" and bare.mode == "RGBA":
        bare = Image.composite(bare.convert("RGB"), Image.new("RGB", bare.size, "white"), bare.getchannel("A"))
    buffer = io.BytesIO()
    if kind == "PNG":
        bare.save(buffer, kind, pnginfo=_chunks(written, packet))
        return buffer.getvalue()
    exif = _exif(written) if written else b""
    if kind == "JPEG" and len(exif) > MAX_EXIF:
        size = f"{len(exif) / 2**10:,.0f} KiB"
        raise InputError(f"a JPEG holds at most 64 KiB of settings, and these are {size}; write a PNG or WebP")
    # Each pixel has its own colour, where JPEG would let four share one.
    how = {"quality": quality, "subsampling": 0} if kind == "JPEG" else {"quality": quality}
    bare.save(buffer, kind, exif=exif, xmp=packet or b"", **how)
    return buffer.getvalue()


def _chunks(texts: Mapping[str, str], packet: bytes | None) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        if text.isascii():
            chunks.add_text(key, text)
        else:
            chunks.add_itxt(key, text)
    if packet is not None:
        chunks.add_itxt(XMP_KEY, packet.decode())
    return chunks


def _exif(texts: Mapping[str, str]) -> bytes:
    """Return EXIF with texts where other tools look for the settings of pictures, and with those of ours."""
    exif = Image.Exif()
    fields = exif.get_ifd(ExifTags.IFD.Exif)
    for key, text in texts.items():
        if key == PARAMETERS:
            fields[ExifTags.Base.UserComment] = COMMENT + text.encode("utf-16-be")
        else:
            fields[ExifTags.Base.MakerNote] = MAKER + key.encode() + b"\0" + text.encode()
    return exif.tobytes()


def texts_of(image: Image.Image) -> dict[str, str]:
    """Return the texts that `encode` put into a picture, without the mark; of a PNG all that it has.

    Args:
        image: as Pillow opened it, which may raise anything on a hostile file.
    """
    if isinstance(image, PngImagePlugin.PngImageFile):
        return {str(key): str(text) for key, text in image.text.items() if key != XMP_KEY}
    fields, texts = image.getexif().get_ifd(ExifTags.IFD.Exif), dict[str, str]()
    note, comment = fields.get(ExifTags.Base.MakerNote), fields.get(ExifTags.Base.UserComment)
    if isinstance(note, bytes) and note.startswith(MAKER):
        key, _, text = note.removeprefix(MAKER).partition(b"\0")
        texts[key.decode()] = text.decode()
    if isinstance(comment, bytes) and comment.startswith(COMMENT):
        texts[PARAMETERS] = comment.removeprefix(COMMENT).decode("utf-16-be")
    return texts

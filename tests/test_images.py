"""Images: odd files open right or are refused; files appear whole or not at all."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from latentdiff import images
from latentdiff.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
SMOOTH = np.full((16, 24, 3), 90, dtype=np.uint8)
SMOOTH[..., 0], SMOOTH[..., 1] = np.meshgrid(np.linspace(0, 255, 24), np.linspace(255, 0, 16))


def write(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def opened(path: Path) -> np.ndarray:
    image = images.open_image(path)
    assert image.mode == "RGB"
    return np.asarray(image, dtype=int)


@pytest.mark.parametrize(("suffix", "options"), [("png", {}), ("webp", {"lossless": True})])
def test_lossless_files_open_unchanged(tmp_path: Path, suffix: str, options: dict[str, Any]) -> None:
    path = write(tmp_path / f"a.{suffix}", Image.fromarray(PIXELS), **options)
    assert np.array_equal(opened(path), PIXELS)


def test_format_is_recognised_by_content_not_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", Image.fromarray(SMOOTH), format="JPEG", quality=95)
    assert np.abs(opened(path) - SMOOTH).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = write(tmp_path / "a.png", Image.fromarray(PIXELS), exif=exif)
    expected = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: np.rot90(PIXELS, -1),
        7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PIXELS),
    }[orientation]
    assert np.array_equal(opened(path), expected)


def test_grey_bilevel_and_palette(tmp_path: Path) -> None:
    grey = Image.fromarray(PIXELS[..., 0])
    assert np.array_equal(opened(write(tmp_path / "l.png", grey)), np.repeat(PIXELS[..., :1], 3, axis=2))
    bilevel = grey.convert("1")
    assert np.array_equal(opened(write(tmp_path / "1.png", bilevel))[..., 0], np.asarray(bilevel) * 255)
    palette = Image.fromarray(PIXELS).quantize(16)
    assert np.array_equal(opened(write(tmp_path / "p.png", palette)), np.asarray(palette.convert("RGB")))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    wide = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    path = write(tmp_path / "16.png", Image.fromarray(wide))
    assert opened(path)[0, :, 0].tolist() == [0, 1, 1, 128, 255]


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "webp"])
def test_transparent_parts_become_white(tmp_path: Path, kind: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 2, 4))
    if kind == "P":
        image = image.quantize(4)
    elif kind == "LA":
        image = image.convert("LA")
    path = write(tmp_path / "a", image, format="WEBP" if kind == "webp" else "PNG", lossless=True)
    assert opened(path)[0, :, 0].tolist() == [0, 0, 255, 255]


def test_half_transparency_is_mixed_with_white(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", Image.new("RGBA", (1, 1), (255, 0, 0, 128)))
    assert opened(path)[0, 0].tolist() == [255, 127, 127]


def test_cmyk_jpeg(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=100)
    red = opened(path)[8, 8]
    assert red[0] > 200
    assert red[1] < 60
    assert red[2] < 60


def test_colour_profiles_are_converted_and_broken_ones_ignored(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4), (200, 40, 40))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = opened(write(tmp_path / "s.png", image, icc_profile=srgb))
    assert same[0, 0].tolist() == [200, 40, 40]
    broken = opened(write(tmp_path / "b.png", image, icc_profile=b"not a profile" * 20))
    assert broken[0, 0].tolist() == [200, 40, 40]
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()  # of another colour space than the image
    assert opened(write(tmp_path / "l.png", image, icc_profile=lab))[0, 0].tolist() == [200, 40, 40]


def test_a_profile_with_other_primaries_changes_colours(tmp_path: Path) -> None:
    """Swap the red and green primaries of sRGB inside the profile: the picture must come out with them swapped."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ", 128), profile.index(b"gXYZ", 128)
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    described = profile.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    path = write(tmp_path / "a.png", Image.new("RGB", (2, 2), (250, 10, 10)), icc_profile=bytes(described))
    pixel = opened(path)[0, 0]
    assert pixel[1] > 200
    assert pixel[0] < 60


def huge_png(side: int) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def file_bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def with_chunk(png: bytes, name: bytes, data: bytes) -> bytes:
    """Return a PNG with one more chunk before its pixels."""
    place = png.index(b"IDAT") - 4
    return (
        png[:place]
        + struct.pack(">I", len(data))
        + name
        + data
        + struct.pack(">I", zlib.crc32(name + data))
        + png[place:]
    )


BAD = {
    "empty": (b"", "not a PNG, JPEG or WebP"),
    "text": (b"hello", "not a PNG, JPEG or WebP"),
    "gif": (file_bytes(Image.new("RGB", (2, 2)), "GIF"), "not a PNG, JPEG or WebP"),
    "huge": (huge_png(100_000), "at most 64 megapixels, got 100000x100000"),
    "just too large": (huge_png(8193), "at most 64 megapixels"),
    "cut png": (file_bytes(Image.fromarray(PIXELS), "PNG")[:90], "truncated or broken"),
    "cut jpeg": (file_bytes(Image.fromarray(SMOOTH), "JPEG")[:400], "truncated or broken"),
    "cut webp": (file_bytes(Image.fromarray(SMOOTH), "WEBP")[:60], "truncated or broken"),
    "png header alone": (b"\x89PNG\r\n\x1a\n", "truncated or broken"),
    "jpeg mark alone": (b"\xff\xd8\xff", "truncated or broken"),
    "webp mark alone": (b"RIFF\0\0\0\0WEBP", "truncated or broken"),
    "flipped bit": (bytes(b ^ (i == 60) for i, b in enumerate(file_bytes(Image.fromarray(PIXELS), "PNG"))), "broken"),
    "palette with 300 opacities": (
        with_chunk(file_bytes(Image.fromarray(PIXELS).quantize(16), "PNG"), b"tRNS", bytes(300)),
        "truncated or broken",
    ),
    "animated png": (
        file_bytes(Image.new("RGB", (2, 2)), "PNG", save_all=True, append_images=[Image.new("RGB", (2, 2), "red")]),
        "animation of 2 frames",
    ),
    "animated webp": (
        file_bytes(Image.new("RGB", (2, 2)), "WEBP", save_all=True, append_images=[Image.new("RGB", (2, 2), "red")]),
        "animation of 2 frames",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        images.open_image(path)
    assert "\n" not in str(caught.value)


def test_missing_and_special_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        images.open_image(tmp_path / "none.png")
    with pytest.raises(InputError, match="must be a regular file, got a folder; pass the image itself"):
        images.open_image(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="got a pipe"):
        images.open_image(tmp_path / "pipe")
    for path in ("a\0b.png", "a" * 300 + ".png", "d/" * 3000 + "x.png", "\ud800.png"):
        with pytest.raises(InputError, match="cannot read image") as caught:
            images.open_image(path)
        assert str(caught.value).isprintable()
    with pytest.raises(InputError, match="got a device"):
        images.open_image("/dev/zero")
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(20 * 2**30)
    with pytest.raises(InputError, match="must be at most 256 MiB, got 20,480 MiB"):
        images.open_image(tmp_path / "sparse.png")


EXIFS = {
    "garbage": b"garbage!!",
    "bad magic": b"XX*\0\x08\0\0\0",
    "cut header": b"II*\0",
    "two bytes": b"II",
    "BigTIFF": b"II+\0\x08\0\0\0",
    "far offset": b"II*\0\xff\xff\xff\x7f",
    "more entries than bytes": b"II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\x01\0\0\0\x01\0\0\0",
    "odd type": b"II*\0\x08\0\0\0\x01\0" + b"\x12\x01\x02\0\x01\0\0\0a\0\0\0" + bytes(4),
}


@pytest.mark.parametrize("name", EXIFS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_broken_exif_counts_as_none_and_says_nothing(
    tmp_path: Path, name: str, kind: str, recwarn: pytest.WarningsRecorder
) -> None:
    exif = b"Exif\0\0" + EXIFS[name]
    path = write(tmp_path / "a", Image.fromarray(SMOOTH), format=kind, exif=exif, lossless=True, quality=95)
    assert np.abs(opened(path) - SMOOTH).mean() < 3
    assert images.open_rgba(path).size == (24, 16)
    assert not [one for one in recwarn if "PIL" in one.filename]


def test_a_rotation_beside_broken_entries_is_applied(tmp_path: Path) -> None:
    entries = b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0" + b"\x0f\x01\x10\0\x01\0\0\0" + b"\xff" * 4
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + bytes(4)
    path = write(tmp_path / "a.png", Image.fromarray(PIXELS), exif=exif)
    assert np.array_equal(opened(path), np.rot90(PIXELS, -1))


def closed() -> Image.Image:
    image = Image.new("RGB", (4, 4))
    image.close()
    return image


def closed_file() -> Image.Image:
    stream = io.BytesIO(file_bytes(Image.fromarray(PIXELS), "PNG"))
    image = Image.open(stream)
    stream.close()
    return image


def informed(mode: str, **info: Any) -> Image.Image:
    image = Image.new(mode, (4, 4))
    image.info.update(info)
    return image


ODD = {
    "closed": closed,
    "closed file": closed_file,
    "no width": lambda: Image.new("RGB", (0, 4)),
    "no height": lambda: Image.new("RGBA", (4, 0)),
    "nothing": lambda: Image.new("L", (0, 0)),
    "palette of too many": lambda: informed("P", transparency=bytes(300)),
    "text for a colour": lambda: informed("RGB", transparency="red"),
    "floating point": lambda: Image.new("F", (4, 4)),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("change", [images.to_rgb, images.to_rgba])
def test_odd_pictures_in_memory_are_refused(name: str, change: Any) -> None:
    with pytest.raises(InputError, match=r"^image "):
        change(ODD[name]())


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "LA", "La", "PA", "RGBa"]
)
def test_every_other_mode_is_opened(mode: str) -> None:
    image = Image.new(mode, (4, 3))
    assert (images.to_rgb(image).mode, images.to_rgb(image).size) == ("RGB", (4, 3))
    assert (images.to_rgba(image).mode, images.to_rgba(image).size) == ("RGBA", (4, 3))


@pytest.mark.parametrize("info", [{"exif": b"garbage"}, {"icc_profile": b"garbage"}, {"icc_profile": 7}, {"exif": 7}])
def test_odd_information_of_pictures_in_memory_counts_as_none(info: dict[str, Any]) -> None:
    assert images.to_rgb(informed("RGB", **info)).getpixel((0, 0)) == (0, 0, 0)


def test_a_picture_that_was_passed_in_is_never_changed() -> None:
    given = Image.fromarray(PIXELS)
    for change in (images.to_rgb, images.to_rgba):
        change(given).paste((1, 2, 3), (0, 0, 7, 5))
    assert np.array_equal(np.asarray(given), PIXELS)


def test_whole_numbers_of_eight_bits_are_not_black() -> None:
    narrow = Image.fromarray(np.array([[0, 128, 255]], dtype=np.int32))
    assert narrow.mode == "I"
    assert np.asarray(images.to_rgb(narrow))[0, :, 0].tolist() == [0, 128, 255]
    wide = Image.fromarray(np.array([[0, 256, 65535, -4, 10**6]], dtype=np.int32))
    assert np.asarray(images.to_rgb(wide))[0, :, 0].tolist() == [0, 1, 255, 0, 255]


def test_arrays_and_tensors_are_pictures() -> None:
    for pixels in (PIXELS, PIXELS.astype(np.float64) / 255, torch.from_numpy(PIXELS), torch.from_numpy(PIXELS) / 255.0):
        assert np.array_equal(np.asarray(images.from_array(pixels)), PIXELS)
    assert images.from_array(PIXELS[..., 0]).mode == "L"
    assert images.from_array(np.zeros((2, 3, 4), np.uint8)).mode == "RGBA"
    assert images.from_array(torch.zeros(2, 3, 3, dtype=torch.bfloat16, requires_grad=True)).size == (3, 2)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), "got uint8 3x8x8; pass one picture, colours last"),
        (np.zeros((1, 8, 8, 3), np.uint8), "got uint8 1x8x8x3"),
        (np.zeros((0, 8, 3), np.uint8), "got uint8 0x8x3"),
        (np.zeros((), np.uint8), "must be height x width x 3"),
        (np.full((8, 8, 3), 255.0), "must be from 0 to 1"),
        (np.full((8, 8, 3), np.nan), "must be from 0 to 1"),
        (np.zeros((8, 8, 3), np.int64), "must be uint8, or floating point from 0 to 1, got int64 8x8x3"),
        (np.zeros((8, 8, 3), object), "must be uint8"),
        (torch.zeros(8, 8, 3, device="meta"), "truncated or broken"),
    ],
)
def test_other_arrays_are_refused(pixels: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        images.from_array(pixels)


def test_tensors_and_pictures_convert_both_ways() -> None:
    picture = Image.fromarray(PIXELS)
    tensor = images.to_tensor([picture, picture])
    assert tensor.shape == (2, 3, 5, 7)
    assert tensor.min() >= -1
    assert tensor.max() <= 1
    assert np.array_equal(np.asarray(images.from_tensor(tensor)[1]), PIXELS)
    assert images.to_unit_range(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 0.5, 1, 1]


def test_fit_covers_and_cuts_evenly() -> None:
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 255
    assert np.asarray(images.fit(Image.fromarray(wide), 4, 4)).min() == 255
    picture = Image.fromarray(PIXELS)
    assert images.fit(picture, 7, 5) is picture


def test_texts_survive_in_the_png(tmp_path: Path) -> None:
    texts = {"latentdiff": '{"prompt": "f\\u00fcchse"}', "parameters": "Füchse 🦊\nSteps: 3"}
    path = tmp_path / "a.png"
    images.write_png(path, Image.fromarray(PIXELS), texts)
    assert images.read_texts(path) == texts
    assert np.array_equal(opened(path), PIXELS)
    first = path.read_bytes()
    images.write_png(path, Image.fromarray(PIXELS), texts)
    assert path.read_bytes() == first
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_other_files_have_no_texts_of_ours(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", Image.fromarray(SMOOTH), format="JPEG")
    assert images.read_texts(path) == {}


def test_texts_that_no_file_can_hold_are_escaped(tmp_path: Path) -> None:
    images.write_png(tmp_path / "a.png", Image.fromarray(PIXELS), {"parameters": "m\udcff"})
    assert images.read_texts(tmp_path / "a.png") == {"parameters": r"m\udcff"}

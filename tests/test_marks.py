"""Pictures say in XMP that a model made them, in every format, in constant text; `--no-mark` leaves it out."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from latentdiff import Pipeline
from latentdiff.cli import main
from latentdiff.encoding import FORMATS, encode, texts_of
from latentdiff.errors import InputError
from latentdiff.generation.result import METADATA_KEY, Result, read_record
from latentdiff.images import open_image, open_rgba, open_stored
from latentdiff.marks import COMPOSITE, GENERATED, mark, source_type_of
from tests.generation.test_upscaling import folder, smooth, upscaler  # noqa: F401  # fixtures
from tests.test_cli import workplace  # noqa: F401  # fixture

STEPS: dict[str, Any] = {"num_inference_steps": 2}
DESCRIPTION = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
DIGITAL_SOURCE_TYPE = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"


def packet(path: str | Path) -> bytes | None:
    """Return the XMP of a file, found by what its format says of its place rather than by Pillow."""
    data = Path(path).read_bytes()
    if data.startswith(b"\x89PNG"):
        key = b"iTXtXML:com.adobe.xmp\0\0\0\0\0"  # not compressed, no language
        at = data.find(key)
        return None if at < 0 else data[at + len(key) :][: int.from_bytes(data[at - 4 : at], "big") - len(key) + 4]
    if data.startswith(b"\xff\xd8"):
        key = b"http://ns.adobe.com/xap/1.0/\0"
        at = data.find(key)
        assert at < 0 or data[at - 4 : at - 2] == b"\xff\xe1"  # APP1
        size = int.from_bytes(data[at - 2 : at], "big")
        return None if at < 0 else data[at + len(key) : at - 2 + size]
    at = data.find(b"XMP ")
    return None if at < 0 else data[at + 8 :][: int.from_bytes(data[at + 4 : at + 8], "little")]


def marked(path: str | Path) -> str | None:
    """Return the only thing that the XMP of a file says; None where it has no XMP."""
    found = packet(path)
    if found is None:
        return None
    (description,) = ElementTree.fromstring(found).iter(DESCRIPTION)
    (said,) = description
    assert said.tag == DIGITAL_SOURCE_TYPE and not said.attrib and len(description.attrib) == 1
    return said.text


@pytest.fixture
def draw(built_model: Path) -> Any:
    """Call `latentdiff generate` with the tiny model and few steps; returns the exit code."""
    return lambda *arguments: main(["generate", "fox", "--model", str(built_model), "--steps", "2", *arguments])


@pytest.fixture(scope="module")
def fox(pipe: Pipeline) -> Result:
    """A picture."""
    return pipe("fox", seed=3, **STEPS)


ENDINGS = pytest.mark.parametrize("ending", [".png", ".jpg", ".webp"])


@ENDINGS
def test_every_format_carries_the_mark_and_the_settings(fox: Result, pipe: Pipeline, ending: str) -> None:
    fox.save(f"a{ending}")
    pipe("fox", seed=3, **STEPS).save(f"b{ending}")
    assert marked(f"a{ending}") == GENERATED == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    assert Path(f"a{ending}").read_bytes() == Path(f"b{ending}").read_bytes()
    stored = open_stored(f"a{ending}")
    assert stored.format == FORMATS[ending]
    assert read_record(f"a{ending}")["seed"] == 3
    assert texts_of(stored)["parameters"].startswith("fox\nSteps: 2, ")


@ENDINGS
def test_what_is_left_out_is_nowhere(fox: Result, ending: str) -> None:
    fox.save(f"a{ending}", mark=False)
    assert packet(f"a{ending}") is None and read_record(f"a{ending}")["prompt"] == "fox"
    fox.write(0, f"b{ending}", metadata=False)
    assert marked(f"b{ending}") == GENERATED and texts_of(open_stored(f"b{ending}")) == {}
    fox.save(f"c{ending}", mark=False, metadata=False)
    assert packet(f"c{ending}") is None and b"fox" not in Path(f"c{ending}").read_bytes()
    pixels = [np.asarray(open_image(f"{name}{ending}")) for name in "abc"]
    assert np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[0], pixels[2])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_encoded_as_it_is_saved(pipe: Pipeline, kind: str) -> None:
    one = next(pipe.stream("fox", num_inference_steps=2))
    path = Path(f"fox.{kind.lower()}")
    one.save(path)
    assert one.encoded(kind) == path.read_bytes()
    smaller = one.encoded(kind, quality=10)
    assert smaller == one.encoded(kind) if kind == "PNG" else len(smaller) < len(one.encoded(kind))
    assert METADATA_KEY not in texts_of(Image.open(io.BytesIO(one.encoded(kind, metadata=False))))


def test_the_command_line_writes_every_format_and_leaves_out_what_is_said(draw: Any) -> None:
    for ending in (".jpeg", ".JPG", ".webp"):
        assert draw("-o", f"a{ending}") == 0
        assert marked(f"a{ending}") == GENERATED and open_stored(f"a{ending}").format == FORMATS[ending.lower()]
    assert draw("-o", "a.png", "--no-mark") == draw("-o", "b.png", "--no-metadata") == 0
    assert (marked("a.png"), marked("b.png")) == (None, GENERATED)


@ENDINGS
def test_inspect_reads_the_mark_back(fox: Result, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    fox.save(f"a{ending}")
    assert main(["inspect", f"a{ending}"]) == 0
    assert f"digital_source_type: {GENERATED}\n" in capsys.readouterr().out
    fox.save(f"b{ending}", metadata=False)
    assert main(["inspect", f"b{ending}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "kind": "picture",
        "digital_source_type": GENERATED,
        "signature": None,
    }
    fox.save(f"c{ending}", mark=False)
    assert main(["inspect", f"c{ending}", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["digital_source_type"] is None and described["prompt"] == "fox"
    fox.save(f"d{ending}", mark=False, metadata=False)
    assert main(["inspect", f"d{ending}"]) == 2
    assert "must hold latentdiff's settings" in capsys.readouterr().err


def test_a_record_cannot_pretend_a_mark_or_a_signature(capsys: pytest.CaptureFixture[str]) -> None:
    record = {"kind": "x", "digital_source_type": GENERATED, "signature": {"state": "Trusted"}, "prompt": "fox"}
    Path("a.webp").write_bytes(encode(smooth(8, 8), "WEBP", {"latentdiff": json.dumps(record)}))
    assert main(["inspect", "a.webp", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described == {"kind": "picture", "digital_source_type": None, "signature": None, "prompt": "fox"}


@ENDINGS
def test_every_format_is_replayed(
    fox: Result, built_model: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fox.save(f"a{ending}")
    model = ["--model", str(built_model)]
    assert main(["replay", f"a{ending}", "--json", *model]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["identical"] is True and captured.err == ""
    assert Path(f"a-replay{ending}").read_bytes() == Path(f"a{ending}").read_bytes()
    assert main(["replay", f"a{ending}", "--no-mark", "-o", "b.png", *model]) == 0
    assert capsys.readouterr().err == "" and marked("b.png") is None


def test_what_is_made_of_a_picture_is_a_composite(pipe: Pipeline) -> None:
    photo = smooth(32, 32)
    result = pipe("fox", image=photo, mask=(0, 0, 16, 32), **STEPS)
    result.save("a.png")
    assert marked("a.png") == COMPOSITE
    assert COMPOSITE == "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
    pipe("fox", image=photo, strength=0.5, **STEPS).save("b.webp")
    pipe("fox", image=photo, outpaint=(8, 0, 0, 0), **STEPS).save("c.jpg")
    pipe("fox", image=result.images[0], strength=0.5, **STEPS).save("d.png")
    assert [marked(name) for name in ("b.webp", "c.jpg", "d.png")] == [COMPOSITE] * 3
    assert "generated" not in read_record("d.png")["image"]


def test_what_is_made_of_a_generated_picture_is_generated(
    pipe: Pipeline, built_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = pipe("fox", seed=1, **STEPS)
    first.save("a.webp")
    for given in (first.images[0], "a.webp", first.images[0].resize((48, 48))):
        result = pipe("fox", image=given, strength=0.5, **STEPS)
        result.save("b.png")
        assert marked("b.png") == GENERATED and read_record("b.png")["image"]["generated"] is True
    pipe("fox", image="a.webp", strength=0.5, **STEPS).save("c.png")
    assert main(["replay", "c.png", "--model", str(built_model)]) == 0
    assert Path("c-replay.png").read_bytes() == Path("c.png").read_bytes()


def test_upscaled_pictures_are_marked_as_what_they_are_made_of(
    draw: Any,
    fox: Result,
    folder: Path,  # noqa: F811  # the fixture
) -> None:
    fox.save("a.png")
    fox.save("c.jpg")
    smooth(8, 8).save("photo.png")
    options = ["--model", str(folder), "--steps", "2"]
    for name, out, source_type in (
        ("a.png", "big.jpg", GENERATED),
        ("photo.png", "big.png", COMPOSITE),
        ("c.jpg", "big.webp", GENERATED),
    ):
        assert main(["upscale", name, "-o", out, *options]) == 0
        assert marked(out) == source_type
    assert main(["upscale", "a.png", "-o", "big.png", "--no-mark", *options]) == 0
    assert marked("big.png") is None
    assert draw("--size", "16x16", "--upscale", "--upscale-model", str(folder), "-o", "d.jpg") == 0
    assert marked("d.jpg") == GENERATED


def test_nothing_of_a_given_picture_but_pixels_gets_into_files(pipe: Pipeline) -> None:
    exif, chunks = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x010E] = "secret place"
    chunks.add_text("Author", "secret author")
    chunks.add_itxt("XML:com.adobe.xmp", mark(GENERATED).decode().replace("</x:xmpmeta>", "</x:xmpmeta><!--secret-->"))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = smooth(32, 32)
    picture.putalpha(200)
    picture.save("photo.png", exif=exif, pnginfo=chunks, icc_profile=profile)
    for given in ("photo.png", open_stored("photo.png")):
        result = pipe("fox", image=given, mask=(0, 0, 16, 32), **STEPS)
        for ending in FORMATS:
            result.save(f"a{ending}")
            stored = open_stored(f"a{ending}")
            assert b"secret" not in Path(f"a{ending}").read_bytes()
            assert not {"icc_profile", "Author", "comment"} & stored.info.keys()


def test_encoding_keeps_nothing_that_a_picture_has_in_memory() -> None:
    picture = smooth(8, 8)
    picture.info |= {"icc_profile": b"secret", "comment": b"secret", "xmp": b"secret", "exif": b"secret", "dpi": (1, 2)}
    before = dict(picture.info)
    for kind in set(FORMATS.values()):
        data = encode(picture, kind)
        assert b"secret" not in data
        assert not {"xmp", "exif", "icc_profile", "comment", "dpi"} & Image.open(io.BytesIO(data)).info.keys()
    assert picture.info == before


def test_a_jpeg_of_a_transparent_picture_is_over_white() -> None:
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    for kind, colour in (("JPEG", (255, 255, 255, 255)), ("PNG", (255, 0, 0, 0))):
        Path("a").write_bytes(encode(clear, kind))
        assert open_rgba("a").getpixel((8, 8)) == colour
    Path("a").write_bytes(encode(clear, "WEBP"))
    assert open_rgba("a").getchannel("A").getextrema() == (0, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_broken_metadata_is_nothing_or_one_line(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {"latentdiff": json.dumps({"prompt": "fox"}), "parameters": "füchse"}
    whole, rng = encode(smooth(8, 8), kind, texts, GENERATED), np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole)
        for at in rng.integers(12, len(whole), 4):
            data[at] = rng.integers(256)
        Path("a.png").write_bytes(data)  # by its content
        code, captured = main(["inspect", "a.png"]), capsys.readouterr()
        assert (code, captured.err.count("\n")) in ((0, 0), (2, 1))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_little_is_lost(kind: str) -> None:
    picture = smooth(64, 64)
    apart = np.asarray(Image.open(io.BytesIO(encode(picture, kind))), int) - np.asarray(picture, int)
    assert np.abs(apart).mean() < 2


def test_what_a_format_cannot_hold_is_refused() -> None:
    texts = {"latentdiff": json.dumps({"prompt": "x" * 66_000}), "parameters": "x"}
    with pytest.raises(InputError, match="a JPEG holds at most 64 KiB of settings, and these are 65 KiB; write a PNG"):
        encode(smooth(8, 8), "JPEG", texts)
    for kind in ("PNG", "WEBP"):
        assert texts_of(Image.open(io.BytesIO(encode(smooth(8, 8), kind, texts)))) == texts
    for kind, most in (("WEBP", 16383), ("JPEG", 65500)):
        with pytest.raises(InputError, match=f"a {kind} holds at most {most} pixels along a side, got {most + 1}x1;"):
            encode(Image.new("RGB", (most + 1, 1)), kind)
        assert encode(Image.new("RGB", (most, 1)), kind)


OTHERS = {
    "an attribute": b'<rdf:Description xmlns:e="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    b'e:DigitalSourceType="%s"/>',
    "a resource": b'<rdf:Description xmlns:e="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    b'<e:DigitalSourceType rdf:resource="%s"/></rdf:Description>',
}
RDF = b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">%s</rdf:RDF>'


@pytest.mark.parametrize("form", OTHERS)
def test_marks_of_other_tools_are_read(form: str, pipe: Pipeline) -> None:
    smooth(32, 32).save("a.webp", xmp=RDF % OTHERS[form] % GENERATED.encode() + b" " * 50)
    assert source_type_of(open_stored("a.webp")) == GENERATED
    pipe("fox", image="a.webp", strength=0.5, **STEPS).save("b.png")
    assert marked("b.png") == GENERATED


@pytest.mark.parametrize(
    "xmp",
    [
        b"",
        b"\xff\xfe<",
        b"<a",
        b"<a/>",
        mark(GENERATED).replace(b"DigitalSourceType", b"Other"),
        b'<!DOCTYPE a [<!ENTITY b "c">]>' + mark(GENERATED),
        b'<?xml version="1.0" encoding="none"?><a/>',
        b"<a>" * 10_000,
        mark(GENERATED) + b" " * 2**20,
    ],
)
def test_xmp_that_says_nothing_is_no_mark(xmp: bytes) -> None:
    picture = smooth(8, 8)
    picture.info["xmp"] = xmp
    assert source_type_of(picture) is None


def test_a_mark_stays_with_a_picture_whose_colours_are_converted() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("XML:com.adobe.xmp", mark(GENERATED).decode())
    for mode in ("RGB", "RGBA", "L", "P"):
        smooth(8, 8).convert(mode).save("a.png", pnginfo=chunks, icc_profile=profile)
        assert source_type_of(open_rgba("a.png")) == GENERATED

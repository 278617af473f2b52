"""Captioned folders: what is read, what is refused, and that batch order is a pure function of seed and step."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from latentdiff.training.config import DataConfig
from latentdiff.training.data import dataset, examine
from latentdiff.training.data.batch_order import BatchOrder
from latentdiff.training.data.dataset import composite, load_images, open_images
from PIL import Image

from latentdiff.errors import InputError


def folder_of(path: Path, rows: list[dict[str, object]], pictures: int = 4) -> Path:
    for index in range(pictures):
        Image.new("RGB", (20, 10), (index * 10, 0, 0)).save(path / f"{index}.png")
    (path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return path


def rows(count: int = 4) -> list[dict[str, object]]:
    return [
        {"file_name": f"{index}.png", "text": f"picture {index}", "kind": "ab"[index % 2]} for index in range(count)
    ]


def test_pictures_are_cropped_square_and_captioned(tmp_path: Path) -> None:
    data = load_images(DataConfig(folder=str(folder_of(tmp_path, rows())), size=8))
    assert data.images.shape == (4, 8, 8, 4)
    assert data.rows[1]["captions"] == ["picture 1"]


def test_keep_and_drop_choose_rows(tmp_path: Path) -> None:
    folder = str(folder_of(tmp_path, rows()))
    assert len(load_images(DataConfig(folder=folder, size=8, keep={"kind": ["a"]}))) == 2
    assert len(load_images(DataConfig(folder=folder, size=8, drop={"kind": ["a"]}))) == 2
    with pytest.raises(InputError, match="no picture is left"):
        load_images(DataConfig(folder=folder, size=8, keep={"kind": ["c"]}))


def test_rows_are_repeated_by_a_column(tmp_path: Path) -> None:
    config = DataConfig(folder=str(folder_of(tmp_path, rows())), size=8, repeats={"kind": {"a": 3}})
    data = open_images(config, 2, tmp_path / "run")
    drawn = [int(sample) for step in range(4) for sample in data.order.batch(step, 2, 0)[0]]
    assert sorted(drawn) == [0, 0, 0, 1, 2, 2, 2, 3]
    for wrong, message in (
        ({"kind": {"c": 2}}, "no picture has 'kind' 'c'; choose one of a, b"),
        ({"size": {"a": 2}}, "'size'"),
    ):
        with pytest.raises(InputError, match=f"data.repeats: .*{message}"):
            open_images(config.model_copy(update={"repeats": wrong}), 2, tmp_path / "run")
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        DataConfig(folder="x", repeats={"kind": {"a": 0}})


@pytest.mark.parametrize(
    "bad",
    [{"file_name": "0.png"}, {"file_name": "0.png", "text": " "}, {"file_name": "no.png", "text": "x"}, {"text": "x"}],
)
def test_missing_caption_or_file_is_refused_by_name(tmp_path: Path, bad: dict[str, object]) -> None:
    folder = folder_of(tmp_path, [*rows(), bad, bad])
    with pytest.raises(InputError, match="2 of 6 rows are unusable"):
        load_images(DataConfig(folder=str(folder), size=8))


def test_one_bad_row_in_many_is_skipped_and_named(tmp_path: Path) -> None:
    many = [{"file_name": "0.png", "text": "x"}] * 150
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    data = load_images(
        DataConfig(folder=str(folder_of(tmp_path, [*many, {"file_name": "broken.png", "text": "y"}])), size=8)
    )
    assert len(data) == 150
    assert [row["name"] for row in data.skipped] == ["broken.png"]


@pytest.mark.parametrize(("good", "bad", "stops"), [(198, 2, False), (197, 3, True), (1, 1, False), (0, 1, True)])
def test_above_one_percent_and_one_picture_the_run_stops(tmp_path: Path, good: int, bad: int, stops: bool) -> None:
    lines = [{"file_name": "0.png", "text": "x"}] * good + [{"file_name": "absent.png", "text": "y"}] * bad
    config = DataConfig(folder=str(folder_of(tmp_path, lines)), size=8)
    if not stops:
        assert len(load_images(config)) == good
        return
    with pytest.raises(InputError, match=rf"{bad} of {good + bad} rows .*, first absent\.png: cannot be read"):
        load_images(config)


def test_folder_without_metadata_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"metadata\.jsonl"):
        load_images(DataConfig(folder=str(tmp_path), size=8))
    (tmp_path / "metadata.jsonl").write_text("{not json")
    with pytest.raises(InputError, match=":1 is not JSON"):
        load_images(DataConfig(folder=str(tmp_path), size=8))


def odd_pictures(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Write one picture of every odd kind and return its colour over green."""
    red, exif = Image.new("RGB", (20, 20), (255, 0, 0)), Image.Exif()
    exif[0x0112] = 6
    half = Image.new("RGBA", (20, 20), (255, 0, 0, 128))
    turned = Image.new("RGB", (20, 40), (255, 0, 0))
    turned.paste((0, 0, 255), (0, 20, 20, 40))
    turned.save(folder / "exif.png", exif=exif)
    red.quantize(4).save(folder / "palette.png")
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).quantize(4).save(folder / "clear palette.png")
    half.save(folder / "alpha.png")
    half.save(folder / "alpha.webp", lossless=True)
    Image.fromarray(np.full((20, 20), 32768, dtype=np.uint16)).save(folder / "16.png")
    Image.new("CMYK", (20, 20), (0, 0, 0, 255)).save(folder / "cmyk.jpg", quality=100)
    Image.new("LA", (20, 20), (0, 0)).save(folder / "la.png")
    clear, mixed = (0, 128, 0), (128, 64, 0)
    colors = {"exif.png": (0, 0, 255), "palette.png": (255, 0, 0), "clear palette.png": clear, "alpha.png": mixed}
    return colors | {"alpha.webp": mixed, "16.png": (128, 128, 128), "cmyk.jpg": (0, 0, 0), "la.png": clear}


def test_odd_pictures_come_out_upright_in_srgb_on_the_background(tmp_path: Path) -> None:
    expected = odd_pictures(tmp_path)
    lines = [json.dumps({"file_name": name, "text": "x"}) for name in expected]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    data = load_images(DataConfig(folder=str(tmp_path), size=8))
    assert not data.skipped
    pictures = composite(data.images, (0, 128, 0)).astype(int)
    for name, picture in zip(expected, pictures):
        assert np.abs(picture[4, 1] - expected[name]).max() <= 2, name
    assert data.samples[0].size == (40, 20)


def write_bad(folder: Path, kind: str) -> dict[str, object]:
    """Write a picture that cannot be used and return its row."""
    row: dict[str, object] = {"file_name": "bad.png", "text": "x"}
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    picture.save(folder / "bad.png")
    whole = (folder / "bad.png").read_bytes()
    if kind == "animation":
        frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
        frames[0].save(folder / "bad.png", format="WEBP", save_all=True, append_images=frames[1:])
    elif kind == "long":
        row["text"] = "x" * 4001
    elif kind == "10 MB":
        row["text"] = "x" * 10_000_000
    elif kind == "NUL":
        row["text"] = "a\0b"
    elif kind == "no text":
        row["text"] = None
    else:
        content = {"empty": b"", "cut": whole[: len(whole) // 2], "pickle": b"\x80\x04K\x01.", "gif": b"GIF89a" + whole}
        (folder / "bad.png").write_bytes(content[kind])
    return row


BAD = {
    "animation": "an animation of 2 frames",
    "long": "a caption of 4001 characters",
    "10 MB": "a caption of 10000000 characters",
    "NUL": "NUL",
    "no text": "no caption",
    "empty": r"^is empty \(0 bytes\)",
    "cut": "^is truncated or broken",
    "pickle": "not a PNG, JPEG or WebP file",
    "gif": "not a PNG, JPEG or WebP file",
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("in_memory", [True, False])
def test_bad_samples_are_skipped_and_reported(
    tmp_path: Path, kind: str, in_memory: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dataset, "IN_MEMORY_BYTES", 2**30 if in_memory else 0)
    folder = folder_of(tmp_path, [*rows(2), write_bad(tmp_path, kind), *rows(2)])
    data = open_images(DataConfig(folder=str(folder), size=8), 2, tmp_path / "run")
    assert [sample.place for sample in data.samples] == [0, 1, 3, 4]
    report = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [(row["place"], row["name"]) for row in report] == [(2, "bad.png")]
    assert re.search(BAD[kind], report[0]["reason"]) and "\n" not in report[0]["reason"]
    assert "1 of 5 pictures are skipped" in capsys.readouterr().err
    whole = [place for step in range(5) for place in BatchOrder.of(5).batch(step, 1, 0)[0] if place != 2]
    drawn = [data.samples[data.order.batch(step, 1, 0)[0][0]].place for step in range(4)]
    assert drawn == whole


def test_large_sets_are_decoded_when_asked_for_and_examined_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(folder=str(folder_of(tmp_path, rows())), size=8)
    held = open_images(config, 2, tmp_path / "run")
    monkeypatch.setattr(dataset, "IN_MEMORY_BYTES", 0)
    lazy = open_images(config, 2, tmp_path / "run")
    assert np.array_equal(lazy.images[:], held.images) and np.array_equal(lazy.images[1:3], held.images[1:3])
    assert (lazy.samples, lazy.rows) == (held.samples, held.rows)
    reads: list[int] = []
    decode = examine.read_image
    monkeypatch.setattr(examine, "read_image", lambda source, place: reads.append(place) or decode(source, place))
    again = open_images(config, 2, tmp_path / "run")
    assert reads == [] and again.samples == held.samples
    Image.new("RGB", (30, 10)).save(tmp_path / "2.png")
    assert open_images(config, 2, tmp_path / "run").samples[2].size == (30, 10)
    assert sorted(reads) == [0, 1, 2, 3]
    Image.new("RGB", (20, 10), "blue").save(tmp_path / "1.png")
    with pytest.raises(InputError, match=r"changed while it is in use: 1\.png; start again"):
        lazy.images[1]
    (tmp_path / "3.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"changed while it is in use: 3\.png is empty"):
        lazy.images[3]


def test_fewer_pictures_than_a_batch_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_images(DataConfig(folder=str(folder_of(tmp_path, rows())), size=8), 5, tmp_path / "run")
    assert capsys.readouterr().err == "4 pictures are fewer than a batch of 5: batches repeat some\n"


def test_pictures_go_to_the_bucket_of_their_shape_and_are_not_distorted(tmp_path: Path) -> None:
    sizes = [(30, 30), (60, 30), (30, 60), (200, 20), (37, 30)]
    for index, (width, height) in enumerate(sizes):
        ramp = np.linspace(0, 255, width)[None].repeat(height, axis=0)
        Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / f"{index}.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows(5))))
    data = open_images(DataConfig(folder=str(tmp_path), size=32, buckets=True), 2, tmp_path / "run")
    for (width, height), sample, picture in zip(sizes, data.samples, data.images):
        frame_width, frame_height = sample.frame
        assert picture.shape == (frame_height, frame_width, 4)
        assert frame_width % 8 == frame_height % 8 == 0 and frame_width * frame_height <= 32 * 32
        scale = max(frame_width / width, frame_height / height)  # the slope of the ramp, whatever the crop
        slope = float(np.diff(picture[frame_height // 2, 4:-4, 0].astype(float)).mean())
        assert slope == pytest.approx(255 / (width - 1) / scale, rel=0.1)
    assert [sample.frame for sample in data.samples[:3]] == [(32, 32), (40, 24), (24, 40)]
    assert data.samples[1].condition == (30, 60, 0, 4, 24, 40)
    for step in range(6):
        indices, _ = data.order.batch(step, 2, 0)
        assert len({data.samples[index].frame for index in indices}) == 1


def test_composite_mixes_by_alpha() -> None:
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0]]], dtype=np.uint8)
    assert composite(rgba, (10, 20, 30)).tolist() == [[[200, 0, 0], [10, 20, 30]]]

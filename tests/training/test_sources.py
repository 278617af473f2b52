"""Captioned pictures from folders, tables, parquet, arrow and tar shards: the same pictures, the same captions."""

import csv
import io
import json
import tarfile
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
from latentdiff.training.config import DataConfig
from latentdiff.training.data.dataset import load_images
from latentdiff.training.data.shards import expand_braces
from latentdiff.training.data.sources import MissingSplitError, Source, open_source
from PIL import Image

from latentdiff.errors import InputError

CAPTIONS = [["a", "an a"], ["b", "a b"], ["c", "a c"]]


def encoded(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(stream, format="PNG")
    return stream.getvalue()


PICTURES = [encoded(shade) for shade in (10, 20, 30)]


def write_pictures(folder: Path) -> list[str]:
    folder.mkdir(parents=True)
    for index, picture in enumerate(PICTURES):
        (folder / f"{index}.png").write_bytes(picture)
    return [f"{folder.name}/{index}.png" for index in range(len(PICTURES))]


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def csv_table(folder: Path) -> Path:
    paths = write_pictures(folder / "images")
    with (folder / "table.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerows([["path", "caption"], *((p, c) for p, found in zip(paths, CAPTIONS) for c in found)])
    return folder / "table.csv"


def json_table(folder: Path) -> Path:
    lines = [json.dumps({"image": p, "captions": c}) for p, c in zip(write_pictures(folder / "images"), CAPTIONS)]
    (folder / "table.jsonl").write_text("\n".join(lines))
    return folder / "table.jsonl"


def image_folder(folder: Path) -> Path:
    write_pictures(folder / "set")
    lines = [json.dumps({"file_name": f"{index}.png", "captions": c}) for index, c in enumerate(CAPTIONS)]
    (folder / "set" / "metadata.jsonl").write_text("\n".join(lines))
    return folder / "set"


def shards(folder: Path) -> Path:
    members = [
        [(f"./dir.x/{index}.photo.png", picture), (f"./dir.x/{index}.json", json.dumps({"caption": found}).encode())]
        for index, (picture, found) in enumerate(zip(PICTURES, CAPTIONS))
    ]
    write_tar(folder / "part-0.tar", members[0] + members[1])
    write_tar(folder / "part-1.tar", members[2])
    return folder / "part-*.tar"


def table(**columns: Any) -> Any:
    import datasets

    features = {"image": datasets.Image(), "text": datasets.Sequence(datasets.Value("string"))}
    rows = {"image": [{"bytes": picture, "path": None} for picture in PICTURES], "text": CAPTIONS} | columns
    known = {name: features.get(name, datasets.Value("string")) for name in rows}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(known))


def parquet(folder: Path) -> Path:
    table().to_parquet(folder / "train.parquet")
    return folder / "train.parquet"


def parquet_folder(folder: Path) -> Path:
    (folder / "data").mkdir()
    table().to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


def saved(folder: Path) -> Path:
    table().save_to_disk(str(folder / "saved"))
    return folder / "saved"


def arrow(folder: Path) -> Path:
    return next(saved(folder).glob("*.arrow"))


@pytest.fixture(autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


def opened(place: Path | str, **values: Any) -> Source:
    return open_source(DataConfig(folder=str(place), size=8, **values))


KINDS = [image_folder, csv_table, json_table, shards, parquet, parquet_folder, saved, arrow]


@pytest.mark.parametrize("write", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_gives_the_same_pictures_and_captions(tmp_path: Path, write: Any) -> None:
    place = write(tmp_path)
    source = opened(place)
    assert [source.read(index) for index in (2, 0, 1)] == [PICTURES[2], PICTURES[0], PICTURES[1]]
    data = load_images(DataConfig(folder=str(place), size=8))
    assert [row["captions"] for row in data.rows] == CAPTIONS
    assert data.images[:, 0, 0, 0].tolist() == [10, 20, 30]
    assert len(set(source.names)) == 3
    ForkingPickler.dumps(source.subset([2, 0]))  # goes to the processes that decode
    assert source.subset([2, 0]).read(0) == PICTURES[2]


def test_hub_names_go_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[dict[str, Any]] = []
    splits = {"train": table(), "test": table().select([1])}
    monkeypatch.setattr(datasets, "load_dataset", lambda **arguments: asked.append(arguments) or splits)
    assert len(opened("hub:owner/name")) == 3
    assert len(open_source(DataConfig(folder="hub:owner/name", size=8), "test")) == 1
    assert asked == [{"path": "owner/name"}] * 2
    with pytest.raises(MissingSplitError, match="has no split 'validation'; choose one of test, train"):
        open_source(DataConfig(folder="hub:owner/name", size=8), "validation")


def test_a_dataset_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match="`datasets` cannot load it") as error:
        opened(tmp_path / "x.parquet")
    assert "\n" not in str(error.value)


def test_columns_are_named_in_errors_and_chosen_by_config(tmp_path: Path) -> None:
    table(alt=["x", "y", "z"], caption=["p", "q", "r"]).to_parquet(tmp_path / "t.parquet")
    place = tmp_path / "t.parquet"
    with pytest.raises(InputError, match=r"text and caption may all be the caption; set data\.caption_column"):
        opened(place)
    with pytest.raises(InputError, match=r"no column 'captoin' .* its columns are image, text, alt, caption"):
        opened(place, caption_column="captoin")
    assert [row["captions"] for row in opened(place, caption_column="alt").rows] == ["x", "y", "z"]
    (tmp_path / "t.csv").write_text("where,what\na.png,b\n")
    with pytest.raises(InputError, match=r"no column looks like the image; set data\.image_column .*: where, what"):
        opened(tmp_path / "t.csv")
    assert len(opened(tmp_path / "t.csv", image_column="where", caption_column="what")) == 1


def test_missing_columns_of_folders_and_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "words": "x", "size": 3}')
    with pytest.raises(InputError, match=r"no column looks like the caption; .*: file_name, words, size"):
        opened(tmp_path)
    assert opened(tmp_path, caption_column="words").rows[0]["captions"] == "x"
    (tmp_path / "metadata.jsonl").write_text('{"image_name": "0.png", "caption": "x"}')
    with pytest.raises(InputError, match=r"no column 'file_name' .* its columns are image_name, caption"):
        opened(tmp_path)
    source = opened(tmp_path, image_column="image_name")
    assert (source.names, source.rows[0]["captions"]) == (["0.png"], "x")
    write_tar(tmp_path / "0.tar", [("a.png", PICTURES[0])])
    with pytest.raises(InputError, match=r"no column looks like the caption; .*: \(none\)"):
        opened(tmp_path / "0.tar")


def test_an_unquoted_comma_in_csv_loses_no_words_in_silence(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(PICTURES[0])
    (tmp_path / "t.csv").write_text("path,caption\nimages/0.png,a fox, red\n")
    with pytest.raises(InputError, match=r"1 of 1 rows are unusable .* images/0\.png: no caption"):
        load_images(DataConfig(folder=str(tmp_path / "t.csv"), size=8))


def test_shards_by_split_and_captions_from_text(tmp_path: Path) -> None:
    write_tar(tmp_path / "train" / "0.tar", [("a.png", PICTURES[0]), ("a.txt", b" a fox \n"), ("b.jpg", b"")])
    write_tar(tmp_path / "test" / "0.tar", [("c.txt", "ein Bär".encode()), ("c.webp", PICTURES[1])])
    source = open_source(DataConfig(folder=str(tmp_path), size=8))
    assert [row["captions"] for row in source.rows] == ["a fox", None]
    assert source.names == ["0.tar: a", "0.tar: b"]
    assert open_source(DataConfig(folder=str(tmp_path), size=8), "test").rows[0]["captions"] == "ein Bär"
    with pytest.raises(InputError, match="has no split 'validation'"):
        open_source(DataConfig(folder=str(tmp_path), size=8), "validation")


@pytest.mark.parametrize("damage", ["cut", "compressed", "text", "loop"])
def test_a_broken_shard_is_named(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "0.tar"
    write_tar(file, [("a.png", PICTURES[0] * 40), ("a.txt", b"a")])
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:2000])
    elif damage == "compressed":
        with tarfile.open(file, "w:gz") as archive:
            archive.add(Path(__file__), "a.txt")
    elif damage == "loop":  # the size of the first member is -512, so that the second seems to be the first again
        header = bytearray(file.read_bytes()[:512])
        header[124:136], header[148:156] = b"\xff" * 10 + b"\xfe\x00", b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        file.write_bytes(header + file.read_bytes()[512:])
    else:
        file.write_text("not a tar file")
    with pytest.raises(InputError, match=r"0\.tar is not a whole, uncompressed tar file"):
        opened(file)


def test_a_shard_that_lacks_its_end_is_named(tmp_path: Path) -> None:
    file = tmp_path / "0.tar"
    write_tar(file, [("a.png", PICTURES[0]), ("b.png", PICTURES[1])])
    whole = file.read_bytes()
    second = whole.index(b"b.png")
    destroyed = whole[:second] + b"x" * 512 + whole[second + 512 :]
    for content in (whole[:second], destroyed):
        file.write_bytes(content)
        with pytest.raises(InputError, match=rf"0\.tar is not .* zeros at its end is not at byte {second}\)"):
            opened(file)


def test_braces_stand_for_shards(tmp_path: Path) -> None:
    assert expand_braces("a/{008..010}-{x,yz}.tar") == [
        f"a/{number}-{name}.tar" for number in ("008", "009", "010") for name in ("x", "yz")
    ]
    assert expand_braces("{}a{b}{1...2}.tar") == ["{}a{b}{1...2}.tar"]
    with pytest.raises(InputError, match=r"\{3\.\.2\} must run up to at most 1,000,000 shards, as \{0000\.\.0019\}"):
        expand_braces("{3..2}.tar")
    with pytest.raises(InputError, match="stands for more than 1,000,000 shards"):
        expand_braces("{0..9999}{0..9999}.tar")
    shards(tmp_path)
    assert opened(tmp_path / "part-{0..1}.tar").rows == opened(tmp_path / "part-*.tar").rows
    assert len(opened(tmp_path / "part-{1,0}.tar")) == 3
    with pytest.raises(InputError, match=r"part-2\.tar of .*part-\{0\.\.2\}\.tar is not there; make it"):
        opened(tmp_path / "part-{0..2}.tar")


def test_a_caption_of_10_mb_in_a_shard_is_a_bad_row(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "0.tar",
        [("a.png", PICTURES[0]), ("a.txt", b"x" * 10_000_000), ("b.png", PICTURES[1]), ("b.txt", b"b")],
    )
    data = load_images(DataConfig(folder=str(tmp_path), size=8))
    assert [row["captions"] for row in data.rows] == [["b"]]
    assert data.skipped == [
        {"place": 0, "name": "0.tar: a", "reason": "a caption of 1048576 characters (at most 4000)"}
    ]


@pytest.mark.parametrize("content", ["", "path,caption\n"])
def test_empty_sets_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(InputError, match="has no rows"):
        opened(tmp_path / "t.csv")
    write_tar(tmp_path / "0.tar", [])
    with pytest.raises(InputError, match="is empty"):
        opened(tmp_path / "0.tar")
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(InputError, match="is nothing else that is known; expected an imagefolder"):
        opened(tmp_path / "notes.md")
    with pytest.raises(InputError, match=r"there is no file or folder .*absent'; check the path"):
        opened(tmp_path / "absent")

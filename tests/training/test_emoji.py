"""The emoji build on three tiny stand-in packages: splits, metadata, resume, and what is left out."""

import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from latentdiff.training.datasets import emoji
from latentdiff.training.datasets.emoji import Source, build, dominant_color

from latentdiff.errors import InputError, StorageError

SVG = '<path fill="#e02020" d="M2 2h12v12H2z"/>'
SKINS = [{"label": "hand: dark skin tone", "hexcode": "1F44B-1F3FF"}]
LABELS = [
    {"label": "fox", "hexcode": "1F98A", "tags": ["animal", "fox"], "group": 3, "subgroup": 34},
    {
        "label": "hand",
        "hexcode": "1F44B",
        "group": 1,
        "subgroup": 16,
        "skins": [{"label": "hand: dark skin tone", "hexcode": "1F44B-1F3FF"}],
    },
]
MESSAGES = {
    "groups": [{"key": "people-body", "order": 1}, {"key": "animals-nature", "order": 3}],
    "subgroups": [{"key": "hand-fingers-open", "order": 16}, {"key": "animal-mammal", "order": 34}],
}  # fmt: skip


def archive(file: Path, members: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("resvg_py")
    out = tmp_path / "set"
    icons = {"fox": {"body": SVG}, "hand-dark-skin-tone": {"body": SVG}, "mystery": {"body": SVG}, "hand": {"body": ""}}
    archive(
        out / ".packages/iconify-json-noto-1.tgz",
        {
            "icons.json": json.dumps({"icons": icons, "width": 16, "height": 16}),
            "chars.json": json.dumps({"1f98a": "fox", "1f44b": "hand", "1f44b-1f3ff": "hand-dark-skin-tone"}),
        },
    )
    archive(
        out / ".packages/emojibase-data-17.0.0.tgz",
        {"en/data.json": json.dumps(LABELS), "en/messages.json": json.dumps(MESSAGES)},
    )
    monkeypatch.setattr(emoji, "SOURCES", (Source("noto", "@iconify-json/noto@1", "Apache-2.0", "Google"),))
    return out


def rows_of(out: Path) -> dict[str, dict[str, object]]:
    lines = [
        line for split in emoji.SPLITS for line in (out / split / "metadata.jsonl").read_text().splitlines() if line
    ]
    return {row["file_name"]: row for row in map(json.loads, lines)}


def test_build_writes_pictures_captions_licences_and_a_report(packages: Path) -> None:
    report = build(packages, size=16, workers=1)
    rows = rows_of(packages)
    fox = rows["noto--fox.png"]
    assert fox["text"] == "a fox, noto style" and "a red fox" in fox["captions"]  # type: ignore[operator]
    assert fox["license"] == "Apache-2.0" and fox["concept"] == "fox" and fox["group"] == "animals-nature"
    assert rows["noto--hand-dark-skin-tone.png"]["concept"] == "hand"
    assert rows["noto--hand-dark-skin-tone.png"]["variant"] == "dark skin tone"
    assert report["left_out"] == {"noto: name unknown to emojibase": 1, "noto: empty picture": 1}
    assert sum(report["drawings"].values()) == 2


def test_second_build_keeps_what_is_there_and_mends_what_is_broken(packages: Path) -> None:
    build(packages, size=16, workers=1)
    (file,) = packages.glob("*/noto--fox.png")
    whole, stamp = file.read_bytes(), file.stat().st_mtime_ns
    build(packages, size=16, workers=1)
    assert file.stat().st_mtime_ns == stamp
    file.unlink()
    build(packages, size=16, workers=1)
    assert file.read_bytes() == whole
    with pytest.raises(InputError, match="holds pictures of 16 px"):
        build(packages, size=32)


def test_size_out_of_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="16 to 512"):
        build(tmp_path, size=8)


def test_dominant_color_needs_a_majority() -> None:
    rgba = np.zeros((8, 8, 4), dtype=np.uint8)
    assert dominant_color(rgba) is None
    rgba[:4] = (240, 130, 30, 255)
    assert dominant_color(rgba) == "orange"
    rgba[4:] = (30, 90, 220, 255)
    rgba[:2] = (40, 180, 60, 255)
    assert dominant_color(rgba) == "blue"
    rgba[2:6] = (250, 250, 250, 255)
    assert dominant_color(rgba) in ("white", None)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"size": "16"}', "[" * 9999])
def test_a_damaged_report_is_written_again(packages: Path, content: str) -> None:
    report = build(packages, size=16, workers=1)
    (packages / "report.json").write_text(content)
    assert build(packages, size=16, workers=1) == report
    assert json.loads((packages / "report.json").read_text()) == report


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_archive_is_fetched_again(
    packages: Path, damage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = packages / ".packages/iconify-json-noto-1.tgz"
    whole = file.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    damaged = {"cut": whole[:-20], "flipped": flipped, "empty": b""}[damage]
    file.write_bytes(damaged)
    done = subprocess.CompletedProcess([], 1, "", "npm error code ENOTFOUND\nnpm error errno ENOTFOUND\n")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: done)
    with pytest.raises(StorageError, match=r"npm could not fetch @iconify-json/noto@1 \(no connection: ENOTFOUND\)"):
        build(packages, size=16, workers=1)
    assert file.read_bytes() == damaged
    assert "is damaged and fetched again" in capsys.readouterr().err

    def pack(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[:3] == ["/usr/bin/npm", "pack", "@iconify-json/noto@1"]
        (Path(command[-1]) / file.name).write_bytes(whole)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pack)
    assert sum(build(packages, size=16, workers=1)["drawings"].values()) == 2
    assert file.read_bytes() == whole
    assert sorted(entry.suffix for entry in file.parent.iterdir()) == [".tgz", ".tgz"]


def test_an_archive_without_its_files_is_named(packages: Path) -> None:
    archive(packages / ".packages/iconify-json-noto-1.tgz", {"other.json": "{}"})
    with pytest.raises(StorageError, match=r"has no package/chars\.json that can be read; delete it"):
        build(packages, size=16, workers=1)
    archive(packages / ".packages/iconify-json-noto-1.tgz", {"chars.json": "{"})
    with pytest.raises(StorageError, match=r"chars\.json is not JSON that can be read"):
        build(packages, size=16, workers=1)


def test_a_picture_that_was_cut_is_drawn_again(packages: Path) -> None:
    build(packages, size=16, workers=1)
    (file,) = packages.glob("*/noto--fox.png")
    whole = file.read_bytes()
    file.write_bytes(whole[:60])
    build(packages, size=16, workers=1)
    assert file.read_bytes() == whole

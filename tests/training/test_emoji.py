"""The emoji build on three tiny stand-in packages: splits, metadata, resume, and what is left out."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from latentdiff.training.datasets import emoji
from latentdiff.training.datasets.emoji import Source, build, dominant_color

from latentdiff.errors import InputError

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

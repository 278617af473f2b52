"""Build the captioned emoji set: six openly licensed styles, rendered to an imagefolder with metadata.jsonl.

A seventh style, Firefox OS's, is a set of its own, to fine-tune on a style that no training has seen.

Try:
    latentdiff data emoji data/emoji --size 64
    latentdiff data fxemoji data/fxemoji --size 64
    python -c "from datasets import load_dataset as l; print(l('imagefolder', data_dir='data/emoji'))"
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from latentdiff.errors import InputError, MissingDependencyError, StorageError
from latentdiff.evaluate.compose.colors import DOMINANT, color_shares
from latentdiff.evaluate.compose.words import STYLE_PHRASES, with_article
from latentdiff.files import is_file, parse_json, read_file, require_path

from ..data.captions import phrase
from .packages import fetch, read_object

LABELS_PACKAGE = "emojibase-data@17.0.0"
SPLITS = ("train", "validation", "test")
MAX_REPORT_BYTES = 2**20


@dataclass(frozen=True)
class Source:
    """One emoji set: the npm package it comes from and whose work it is."""

    style: str
    package: str
    license: str
    author: str


SOURCES = (
    Source("noto", "@iconify-json/noto@1.2.9", "Apache-2.0", "Google (Noto Emoji)"),
    Source("noto-v1", "@iconify-json/noto-v1@1.2.5", "Apache-2.0", "Google (Noto Emoji v1)"),
    Source("twemoji", "@iconify-json/twemoji@1.2.5", "CC-BY-4.0", "Twitter and contributors (Twemoji)"),
    Source("fluent-emoji-flat", "@iconify-json/fluent-emoji-flat@1.2.6", "MIT", "Microsoft (Fluent Emoji)"),
    Source("emojione", "@iconify-json/emojione@1.2.3", "CC-BY-4.0", "EmojiOne"),
    Source("fluent-emoji-3d", "@lobehub/fluent-emoji-3d@1.1.0", "MIT", "Microsoft (Fluent Emoji), LobeHub"),
)
FXEMOJI = (Source("fxemoji", "@iconify-json/fxemoji@1.2.2", "Apache-2.0", "Mozilla (Firefox OS Emoji)"),)


@dataclass(frozen=True)
class Concept:
    """What a drawing shows, from emojibase: English name, keywords and place in Unicode's groups."""

    name: str
    tags: tuple[str, ...]
    group: str
    subgroup: str


@dataclass(frozen=True)
class Drawing:
    """One drawing before rendering: SVG text or encoded bitmap, and what it shows."""

    source: Source
    icon: str
    concept: Concept
    variant: str
    content: str | bytes = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.concept.name}: {self.variant}" if self.variant else self.concept.name

    @property
    def file_stem(self) -> str:
        return f"{self.source.style}--{_slug(self.icon)}"


def build(
    out: str | Path, size: int = 64, workers: int | None = None, sources: Sequence[Source] | None = None
) -> dict[str, Any]:
    """Render every drawing into `out`/{train,validation,test} and write metadata.jsonl and report.json.

    Drawings that are already there are kept, so an interrupted build goes on where it stopped.

    Args:
        out: folder of the data set; made when missing.
        size: side of the square RGBA pictures in pixels, 16 to 512.
        workers: rendering processes; the number of cores when None.
        sources: the styles; None for the six.

    Returns:
        The report: counts per style and split, and what was left out and why.

    Raises:
        InputError: size out of range, or `out` holds a set of another size.
        MissingDependencyError: npm or resvg-py is not installed.
        StorageError: a package could not be fetched or a file not be written.
    """
    if not 16 <= size <= 512:
        raise InputError(f"size must be 16 to 512 pixels, got {size}; try 64 or 128")
    folder, sources = require_path(out, "a folder"), SOURCES if sources is None else sources
    report_file = folder / "report.json"
    if (before := _size_before(report_file)) not in (None, size):
        raise InputError(f"{folder} holds pictures of {before} px, asked for {size}; choose another folder")
    try:
        for split in SPLITS:
            (folder / split).mkdir(parents=True, exist_ok=True)
        left_out: Counter[str] = Counter()
        drawings = list(_drawings(folder / ".packages", sources, left_out))
        tasks = [(d, size, str(folder / split_of(d) / f"{d.file_stem}.png")) for d in drawings]
        rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
            results = pool.map(_render, tasks, chunksize=32)
            for drawing, row in tqdm(zip(drawings, results), total=len(tasks), desc="emoji", unit="drawing"):
                if isinstance(row, str):
                    left_out[f"{drawing.source.style}: {row}"] += 1
                else:
                    rows[split_of(drawing)].append(row)
        for split in SPLITS:
            lines = [json.dumps(row, ensure_ascii=False) for row in sorted(rows[split], key=lambda r: r["file_name"])]
            _write(folder / split / "metadata.jsonl", "\n".join(lines) + "\n")
        report = _report(size, rows, sources, left_out)
        _write(report_file, json.dumps(report, indent=2) + "\n")
    except StorageError:  # of an archive
        raise
    except OSError as error:
        raise StorageError(f"could not build {folder}: {error}; free space or choose another folder") from error
    return report


def _size_before(report: Path) -> int | None:
    """Return the size of the pictures that an earlier build made; None where none did, or its report is damaged."""
    try:
        size = parse_json(read_file(report, MAX_REPORT_BYTES), str(report))["size"] if is_file(report) else None
    except (InputError, TypeError, KeyError):
        return None
    return size if isinstance(size, int) else None


def split_of(drawing: Drawing) -> str:
    """Place a drawing by hash: 2 % of the concepts are `test` in every style, 4 % of the other drawings `validation`.

    All variants of one concept share its fate, so no held-out concept is seen in another skin tone. The salt of the
    hash was chosen among twelve so that few of the things people ask for first are held out.
    """
    if _percent(drawing.concept.name) < 2:
        return "test"
    return "validation" if _percent(f"{drawing.source.style}/{drawing.concept.name}") < 4 else "train"


def dominant_color(rgba: np.ndarray) -> str | None:
    """Name the colour that covers at least 45 % of the opaque pixels.

    Args:
        rgba: (H, W, 4) uint8.

    Returns:
        One of `COLORS`, or None when no colour dominates.
    """
    shares = color_shares(rgba[rgba[..., 3] > 127][:, :3])
    most = max(shares, key=lambda color: shares[color], default=None)
    return most if most and shares[most] >= DOMINANT else None


def _drawings(packages: Path, sources: Sequence[Source], left_out: Counter[str]) -> Iterator[Drawing]:
    """Yield every drawing whose name or code point emojibase knows, counting the others in `left_out`."""
    labels = fetch(packages, LABELS_PACKAGE)
    data = read_object(labels, "package/en/data.json")
    messages = read_object(labels, "package/en/messages.json")
    by_code, by_slug = _concepts(data, messages)
    run_together = {slug.replace("-", ""): found for slug, found in by_slug.items()}  # as fxemoji writes its names
    for source in sources:
        archive = fetch(packages, source.package)
        pairs = _icons(archive) if source.package.startswith("@iconify") else _bitmaps(archive)
        codes = _codes(archive, source)
        for icon, content in pairs:
            base, variant = _split_variant(icon)
            found = by_code.get(codes.get(icon, "")) or by_slug.get(base)
            if found is None and source in FXEMOJI:
                found = run_together.get(base)
            if found is None:
                left_out[f"{source.style}: name unknown to emojibase"] += 1
                continue
            concept, tone = found
            yield Drawing(source, icon, concept, tone or variant, content)
            if source.style == "noto":
                by_slug.setdefault(base, (concept, ""))


def _concepts(
    data: list[dict[str, Any]], messages: dict[str, Any]
) -> tuple[dict[str, tuple[Concept, str]], dict[str, tuple[Concept, str]]]:
    """Index emojibase by code point sequence and by slug of the English name."""
    groups = {g["order"]: g["key"] for g in messages["groups"]}
    subgroups = {g["order"]: g["key"] for g in messages["subgroups"]}
    by_code: dict[str, tuple[Concept, str]] = {}
    by_slug: dict[str, tuple[Concept, str]] = {}
    for entry in data:
        concept = Concept(
            name=entry["label"].lower(),
            tags=tuple(entry.get("tags", ())),
            group=groups.get(entry.get("group"), "symbols"),
            subgroup=subgroups.get(entry.get("subgroup"), "other-symbol"),
        )
        by_code[_code(entry["hexcode"])] = (concept, "")
        by_slug[_slug(entry["label"])] = (concept, "")
        for skin in entry.get("skins", ()):
            by_code[_code(skin["hexcode"])] = (concept, skin["label"].split(": ", 1)[-1])
    return by_code, by_slug


def _codes(archive: Path, source: Source) -> dict[str, str]:
    """Map icon names to normalised code point sequences, where the package tells them."""
    if not source.package.startswith("@iconify"):
        return {name: _code(name) for name, _ in _bitmaps(archive)}
    return {name: _code(code) for code, name in read_object(archive, "package/chars.json").items()}


def _split_variant(icon: str) -> tuple[str, str]:
    match = re.match(r"(.+?)-((?:(?:medium-)?(?:light|dark)|medium)-skin-tone.*)$", icon)
    return (match.group(1), match.group(2).replace("-", " ")) if match else (icon, "")


def _icons(archive: Path) -> Iterator[tuple[str, str]]:
    icons = read_object(archive, "package/icons.json")
    width, height = icons.get("width", 16), icons.get("height", 16)
    for name, icon in icons["icons"].items():
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {icon.get('width', width)} {icon.get('height', height)}"
        yield name, f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'


def _bitmaps(archive: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(".webp"):
                content = tar.extractfile(member)
                assert content is not None
                yield Path(member.name).stem, content.read()


def _render(task: tuple[Drawing, int, str]) -> dict[str, Any] | str:
    """Render one drawing to its PNG file and return its metadata row, or the reason why it was left out."""
    drawing, size, file = task
    try:
        kept = _open_existing(file, size)
        image = kept or _draw(drawing.content, size)
    except (ValueError, OSError, SyntaxError) as error:
        return f"does not render ({type(error).__name__})"
    rgba = np.asarray(image)
    if (rgba[..., 3] > 127).mean() < 0.02:
        return "empty picture"
    if kept is None:
        image.save(f"{file}.tmp", format="PNG")
        os.replace(f"{file}.tmp", file)
    concept, source = drawing.concept, drawing.source
    thing, color = with_article(drawing.name), dominant_color(rgba)
    captions = phrase(thing, source.style, concept.tags, color)
    if source in FXEMOJI:  # a style learnt later must be asked for, so that what was learnt before stays as it is
        captions = [caption for caption in captions if STYLE_PHRASES[source.style] in caption]
    return {
        "file_name": os.path.basename(file),
        "text": captions[0],
        "captions": captions,
        "thing": thing,
        "concept": concept.name,
        "variant": drawing.variant,
        "tags": list(concept.tags),
        "group": concept.group,
        "subgroup": concept.subgroup,
        "style": source.style,
        "color": color,
        "flip": concept.group not in ("symbols", "flags") and concept.subgroup not in ("time", "book-paper"),
        "source": source.package,
        "author": source.author,
        "license": source.license,
    }


def _draw(content: str | bytes, size: int) -> Image.Image:
    if isinstance(content, bytes):
        return Image.open(io.BytesIO(content)).convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
    try:
        import resvg_py
    except ImportError as error:
        raise MissingDependencyError("drawing SVG needs resvg-py; install it with `pip install resvg-py`") from error
    png = resvg_py.svg_to_bytes(svg_string=content, width=size, height=size, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if image.size == (size, size):
        return image
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return canvas


def _open_existing(file: str, size: int) -> Image.Image | None:
    """Return the picture an earlier build left, or None when there is none that is whole."""
    try:
        with Image.open(file) as image:
            image.load()
            return image.copy() if image.size == (size, size) and image.mode == "RGBA" else None
    except (OSError, ValueError, SyntaxError):
        return None


def _report(
    size: int, rows: dict[str, list[dict[str, Any]]], sources: Sequence[Source], left_out: Counter[str]
) -> dict[str, Any]:
    styles = {s: Counter(row["style"] for row in found) for s, found in rows.items()}
    return {
        "size": size,
        "drawings": {split: len(found) for split, found in rows.items()},
        "concepts": len({row["concept"] for found in rows.values() for row in found}),
        "styles": {source.style: {s: styles[s][source.style] for s in SPLITS} for source in sources},
        "licenses": {source.package: {"license": source.license, "author": source.author} for source in sources},
        "left_out": dict(left_out.most_common()),
    }


def _percent(key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"emoji-9/{key}".encode()).digest()[:8], "big") % 100


def _code(hexcode: str) -> str:
    return hexcode.lower().replace("-fe0f", "")


def _slug(name: str) -> str:
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower().replace("&", "and")
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"['.]", "", plain)).strip("-")


def _write(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)

"""Input that nobody should pass, for every door: each case follows from a generator, and is tried in a folder."""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentdiff.cli import main
from latentdiff.images import from_array, open_image, to_rgba, write_png
from tests.checkpoints.small_models import build_folders
from tests.models.tiny import noise_picture

ROOT = Path(__file__).parents[1]
SIGNS = (
    "\0",
    "\x1b[2J",
    "\x1b]0;x\x07",
    "\n",
    "\r",
    "\t",
    "\ud800",
    "\udcff",
    "\u202e",
    "'",
    '"',
    "\\",
    "%",
    "{",
    "[",
    "(",
)
TEXTS = ("", " ", "none.png", "a" * 300, "a/" * 2500, "x" * 100_000, "9" * 5000, "../x.png", "/dev/zero", "/dev/full")
NUMBERS = (0, 1, -1, 0.5, 7, 1025, 2**31, 2**63, 2**64, 10**400, -(10**400), float("nan"), float("inf"), 1e308, 1e-320)
TREES: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"a": {}}, [None] * 9, [[[[[[]]]]]], list(range(2000)), [{}])
OPTIONS = {
    "generate": (
        *("--steps", "--guidance", "--sampler", "--seed", "-n", "--size", "--image", "--strength", "--mask", "-o"),
        *("--outpaint", "--feather", "--hires", "--negative", "--device", "--dtype", "--lora", "--embedding"),
    ),
    "upscale": ("--scale", "--noise-level", "--correction", "--steps", "--guidance", "--seed", "--model", "-o"),
    "replay": ("--model", "--device", "--dtype", "-o"),
    "plan": ("--sampler", "--steps", "--model"),
    "inspect": ("--model",),
    "convert": ("--dtype", "--lora", "--rank", "--variant-of", "--prediction-type"),
    "train": ("--set", "--out"),
    "evaluate": ("--data", "--metrics", "--split", "--images", "--dtype"),
    "data": ("--size",),
}


class Workplace:
    """A folder with a small model and files to damage.

    Args:
        folder: empty; everything is tried in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        noise_picture(24, 24).save(folder / "good.png")
        noise_picture(24, 24).save(folder / "good.jpg")

    @cached_property
    def model(self) -> Path:
        """A model folder of a few thousand weights."""
        place = self.folder / "models"
        place.mkdir()
        build_folders(place)
        return place / "bert"

    @cached_property
    def components(self) -> Any:
        """The model, loaded."""
        from latentdiff.checkpoints import load_pipeline

        return load_pipeline(self.model)

    @cached_property
    def adapters(self) -> dict[str, bytes]:
        """A LoRA in two dialects and a textual-inversion file."""
        import torch

        from latentdiff.checkpoints.lora import save_lora
        from latentdiff.checkpoints.textual_inversion import save_embedding
        from tests.checkpoints.test_lora import lora_of

        file, found = self.folder / "adapter.safetensors", {}
        for dialect in ("diffusers", "kohya"):
            save_lora(lora_of(self.components), file, self.components, dialect)
            found[dialect] = file.read_bytes()
        width = self.components.text_encoder.config.hidden_size
        save_embedding("toy", torch.ones(2, width), file)
        return found | {"embedding": file.read_bytes()}

    @cached_property
    def record(self) -> dict[str, Any]:
        """What a picture says of how it was drawn."""
        from latentdiff.generation.result import read_record

        out = self.folder / "drawn.png"
        code = main(["generate", "a fox", "--model", str(self.model), "--steps", "1", "-o", str(out)])
        assert code == 0
        return read_record(out)


def odd_text(rng: random.Random) -> str:
    """Draw a text that is wrong in most places."""
    if rng.random() < 0.5:
        return rng.choice(TEXTS)
    signs = [*SIGNS, *"ab 019.,:;=-/*"]
    return "".join(rng.choice(signs) for _ in range(rng.randrange(12)))


def odd_value(rng: random.Random) -> Any:
    """Draw a value that is wrong in most places."""
    kind = rng.randrange(4)
    if kind == 0:
        return odd_text(rng)
    if kind == 1:
        return rng.choice(TREES)
    return rng.choice(NUMBERS) if kind == 2 else rng.randrange(-5, 2000)


def changed(tree: Any, rng: random.Random) -> Any:
    """Return a tree of JSON with one of its values, or one of its keys, changed."""
    if not isinstance(tree, (dict, list)) or not tree or rng.random() < 0.1:
        return odd_value(rng)
    if isinstance(tree, list):
        place = rng.randrange(len(tree))
        return [changed(value, rng) if number == place else value for number, value in enumerate(tree)]
    key = rng.choice(list(tree))
    if rng.random() < 0.15:
        return {name: value for name, value in tree.items() if name != key} | {odd_text(rng): tree[key]}
    return {**tree, key: changed(tree[key], rng)}


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return bytes that were cut, flipped, doubled, or in which others stand."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 3, 20))):
        place = rng.randrange(max(1, len(content)))
        kind = rng.randrange(6)
        if kind == 0 and content:
            content[place % len(content)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[place:]
        elif kind == 2:
            content[place:place] = odd_text(rng).encode("utf-8", "surrogatepass")[:10_000]
        elif kind == 3:
            content[place : place + 4] = struct.pack(rng.choice("<>") + "I", rng.choice((0, 1, 2**31, 2**32 - 1)))
        elif kind == 4:
            del content[place : place + rng.randrange(1, 9)]
        else:
            content[place:place] = content[place : place + rng.randrange(1, 99)]
    return bytes(content)


def try_arguments(work: Workplace, rng: random.Random) -> int:
    """Call a command with options that most often do not fit."""
    command = rng.choice([*OPTIONS, odd_text(rng)])
    options = OPTIONS.get(command, ())
    values = ["good.png", "1", "8", "0.5", "euler", "32x32", "left=8", "0,0,8,8", "alpha", "float32"]
    words = {"generate": ["a fox", "--model", str(work.model), "--steps", "1"], "train": ["none.yaml", "--check"]}
    words |= {"upscale": ["good.png"], "replay": ["good.png"], "convert": [str(work.model), "out.safetensors"]}
    words |= {"evaluate": [str(work.model), "--data", "none"], "data": ["digits", "none/digits"]}
    arguments = [command, *words.get(command, [])]
    for _ in range(rng.randrange(1, 4)):
        value = rng.choice([rng.choice(values), odd_text(rng), odd_text(rng), str(rng.choice(NUMBERS))])
        if rng.random() < 0.9 and options:
            arguments += [rng.choice(options), value]
        elif command not in ("convert", "data"):
            arguments.append(value)
    return main(arguments)


def try_record(work: Workplace, rng: random.Random) -> int:
    """Inspect a picture whose record was changed, and read what it asks for."""
    from latentdiff.commands.replay import _Request
    from latentdiff.generation.result import METADATA_KEY, read_record

    record: Any = work.record
    for _ in range(rng.randrange(1, 4)):
        record = changed(record, rng)
    text = json.dumps(record)
    text = odd_text(rng) if rng.random() < 0.02 else "[" * 9999 if rng.random() < 0.01 else text
    write_png("record.png", Image.new("RGB", (8, 8)), {METADATA_KEY: text})
    code = main(["inspect", "record.png"])
    if code == 0:
        _Request.of(read_record("record.png"))
    return code


def try_config(work: Workplace, rng: random.Random) -> None:
    """Read a recipe that was changed, with a setting that most often does not fit."""
    import yaml
    from latentdiff.training.config import load_config

    text = rng.choice(sorted((ROOT / "configs").glob("*.yaml"))).read_text(encoding="utf-8")
    tree, kind = yaml.safe_load(text), rng.random()
    if kind < 0.5:
        tree = changed(tree, rng)
        content = json.dumps(tree).encode()  # which is YAML too, but for halves of characters
    else:
        content = damaged(text.encode(), rng)
    if kind > 0.97:
        content += rng.choice((b"\nx: " + b"[" * 3000, b"\na: &a [*a]", b"\nd: 2024-02-30", b"\nn: " + b"9" * 5000))
    Path("config.yaml").write_bytes(content)
    key = rng.choice(["run.steps", "data.folder", "optimizer.betas", "prompts", "model", "stage", odd_text(rng)])
    load_config("config.yaml", [f"{key}={odd_text(rng)}"] if rng.random() < 0.4 else [])


def try_adapter(work: Workplace, rng: random.Random) -> int:
    """Inspect and load a LoRA or learned word that was damaged."""
    from latentdiff.checkpoints.lora import load_lora
    from latentdiff.checkpoints.textual_inversion import add_embedding

    kind = rng.choice(list(work.adapters))
    data = work.adapters[kind]
    length = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.7:  # a header that is JSON still
        header = json.dumps(changed(json.loads(data[8 : 8 + length]), rng)).encode()
        data = struct.pack("<Q", len(header)) + header + data[8 + length :]
    else:
        data = damaged(data, rng)
    Path("a.safetensors").write_bytes(data)
    if rng.random() < 0.5:
        return main(["inspect", "a.safetensors"])
    if kind == "embedding":
        add_embedding(work.components, "a.safetensors", "toy")
    else:
        load_lora("a.safetensors", work.components)
    return 0


def try_picture(work: Workplace, rng: random.Random) -> None:
    """Open a picture that was damaged, or one in memory that is odd."""
    mode = rng.choice(["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "I", "I;16", "F", "LAB", "HSV"])
    size = rng.randrange(0, 20), rng.randrange(0, 20)
    if rng.random() < 0.3:
        image = Image.new(mode, size)
        keys = ("transparency", "exif", "icc_profile", "Raw profile type exif", "xmp", "XML:com.adobe.xmp", "duration")
        image.info = {key: rng.choice([odd_value(rng), odd_text(rng).encode("utf-8", "replace")]) for key in keys[:3]}
        if rng.random() < 0.2:
            image.close()
        to_rgba(image)
        return
    if rng.random() < 0.1:
        shape = rng.choice([(4, 5, 3), (4, 5), (3, 4, 5), (0, 5, 3), (), (4, 5, 4), (1, 4, 5, 3)])
        with np.errstate(invalid="ignore"):
            pixels = np.full(shape, rng.choice([0, 1, 0.5, 300, -1, np.nan])).astype(rng.choice(["u1", "f4", "i8"]))
        from_array(pixels)
        return
    stream, kind = io.BytesIO(), rng.choice(["PNG", "JPEG", "WEBP"])
    exif = b"Exif\0\0" + damaged(b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0", rng)
    modes = {"JPEG": ("L", "RGB", "CMYK"), "WEBP": ("RGB", "RGBA"), "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")}
    Image.new(rng.choice(modes[kind]), (size[0] + 1, size[1] + 1)).save(stream, kind, exif=exif)
    data = stream.getvalue()
    if kind == "PNG" and rng.random() < 0.5:
        names = [b"tRNS", b"iCCP", b"gAMA", b"tEXt", b"iTXt", b"zTXt", b"acTL", b"PLTE"]
        data = with_chunk(data, rng.choice(names), rng)
    Path("picture").write_bytes(damaged(data, rng) if rng.random() < 0.8 else data)
    open_image("picture")


def with_chunk(png: bytes, name: bytes, rng: random.Random) -> bytes:
    """Return a PNG with one more chunk of any content, whose checksum is right."""
    data = rng.randbytes(rng.choice((0, 1, 4, 8, 300)))
    chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    place = png.index(b"IDAT") - 4
    return png[:place] + chunk + png[place:]


def try_set(work: Workplace, rng: random.Random) -> None:
    """Open a set of pictures whose table, texts or shard were damaged."""
    from latentdiff.training.config import DataConfig
    from latentdiff.training.data.dataset import load_images

    place, picture = Path("set"), (work.folder / "good.png").read_bytes()
    place.mkdir(exist_ok=True)
    for file in place.iterdir():
        file.unlink()
    rows: list[Any] = [{"file_name": "0.png", "text": "a", "thing": "a", "color": "red"}, {"file_name": "1.png"}]
    rows = [changed(row, rng) if rng.random() < 0.5 else row for row in rows]
    for name in ("0.png", "1.png"):
        (place / name).write_bytes(damaged(picture, rng) if rng.random() < 0.2 else picture)
    kind = rng.choice(["jsonl", "csv", "txt", "tar", "place"])
    if kind == "jsonl":
        text = "\n".join(json.dumps(row) for row in rows).encode()
        (place / "metadata.jsonl").write_bytes(damaged(text, rng) if rng.random() < 0.5 else text)
    elif kind == "csv":
        separator = rng.choice([",", ";", "\t"])
        cells = [["file_name", "text"], ["0.png", odd_text(rng)], [odd_text(rng), "b"]]
        text = "\n".join(separator.join(row) for row in cells).encode("utf-8", "surrogatepass")
        (place / "metadata.csv").write_bytes(damaged(text, rng))
    elif kind == "txt":
        (place / "0.txt").write_bytes(damaged(b"a fox", rng))
    elif kind == "tar":
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for name, data in (("0.png", picture), ("0.json", json.dumps(rows[0]).encode()), ("1.txt", b"b")):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
        (place / "0.tar").write_bytes(damaged(stream.getvalue(), rng))
    folder = f"hub:{odd_text(rng)}" if rng.random() < 0.3 else odd_text(rng)
    config = DataConfig(folder="set", size=8)  # which checks its folder when it is made
    load_images(config.model_copy(update={"folder": folder}) if kind == "place" else config)


DOORS: dict[str, Callable[[Workplace, random.Random], int | None]] = {
    "arguments": try_arguments,
    "records": try_record,
    "configs": try_config,
    "adapters": try_adapter,
    "pictures": try_picture,
    "sets": try_set,
}

"""Write scikit-learn's 8x8 digits as a captioned picture folder: 1,797 of them, 16 shades, ten classes.

Try:
    latentdiff data digits data/digits
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from latentdiff.errors import InputError, MissingDependencyError, StorageError

if TYPE_CHECKING:
    from sklearn.utils import Bunch

TEST_SHARE = 5  # one of so many pictures is for testing


def build(out: str) -> dict[str, Any]:
    """Write the folder, whole or not at all, and return what is in it.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
        InputError: the folder holds something already.
        StorageError: it cannot be written.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError("the digits come with scikit-learn: pip install 'latentdiff[digits]'") from error
    splits = _files(load_digits())
    try:
        folder = Path(out).resolve()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} is not empty; choose another folder")
        _write(folder, splits)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"cannot write {out}: {reason}; free space or choose another place") from error
    return {split: len(files) - 1 for split, files in splits.items()}


def _files(digits: Bunch) -> dict[str, dict[str, bytes]]:
    """Return the content of every file of each split, by its name."""
    splits: dict[str, dict[str, bytes]] = {"train": {}, "test": {}}
    rows: dict[str, list[str]] = {split: [] for split in splits}
    for index, (shades, label) in enumerate(zip(digits.images, digits.target)):
        split, name, stream = "train" if index % TEST_SHARE else "test", f"{index:04d}.png", io.BytesIO()
        Image.fromarray(np.rint(shades * 255 / 16).astype(np.uint8)).save(stream, format="PNG")
        splits[split][name] = stream.getvalue()
        rows[split].append(json.dumps({"file_name": name, "text": str(label)}))
    for split, lines in rows.items():
        splits[split]["metadata.jsonl"] = ("\n".join(lines) + "\n").encode()
    return splits


def _write(folder: Path, splits: dict[str, dict[str, bytes]]) -> None:
    """Write the set beside its place and move it there; what a run that was killed left beside is removed."""
    beside = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        for split, files in splits.items():
            (beside / split).mkdir(parents=True)
            for name, content in files.items():
                (beside / split / name).write_bytes(content)
        if folder.exists():  # and is empty
            folder.rmdir()
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise

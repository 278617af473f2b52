"""Write scikit-learn's 8x8 digits as a captioned picture folder: 1,797 of them, 16 shades, ten classes.

Try:
    latentdiff data digits data/digits
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentdiff.errors import InputError, MissingDependencyError, StorageError

TEST_SHARE = 5  # one of so many pictures is for testing


def build(out: str) -> dict[str, Any]:
    """Write the folder and return what is in it.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
        InputError: the folder holds something else.
        StorageError: it cannot be written.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError("the digits come with scikit-learn: pip install 'latentdiff[digits]'") from error
    digits, folder = load_digits(), Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty; choose another folder")
    counts = {}
    try:
        for split in ("train", "test"):
            place, lines = folder / split, []
            place.mkdir(parents=True)
            for index, (shades, label) in enumerate(zip(digits.images, digits.target)):
                if (index % TEST_SHARE == 0) != (split == "test"):
                    continue
                file = f"{index:04d}.png"
                Image.fromarray(np.rint(shades * 255 / 16).astype(np.uint8)).save(place / file)
                lines.append(json.dumps({"file_name": file, "text": str(label)}))
            (place / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            counts[split] = len(lines)
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror}; free space or choose another place") from error
    return counts

"""The pictures of an output, in the order of the table."""

from __future__ import annotations

from pathlib import Path

from latentdiff.errors import InputError
from latentdiff.scale.formats import FORMATS
from latentdiff.scale.job import FILE
from latentdiff.scale.manifest import read_manifest, shards_in
from latentdiff.scale.store import LocalStore

__all__ = ["drawn_files"]


def drawn_files(out: Path) -> list[Path] | None:
    """Return the PNG files of `latentdiff batch OUT --format files`, row by row; None where the folder is no such OUT.

    Raises:
        InputError: rows have no picture, or pictures no file of their own.
        StorageError: the folder cannot be read.
    """
    if not (out / FILE).is_file():
        return None
    store, files, failed = LocalStore(out), list[Path](), 0
    for shard in sorted(shards_in(store)):
        manifest = read_manifest(store, shard)
        if manifest is None:
            raise InputError(f"{out}: the manifest of shard {shard} is damaged; give `latentdiff batch` again")
        if manifest.format != "files":
            raise InputError(
                f"{out} must hold each picture in a file of its own, got {manifest.format}; draw with --format files"
            )
        place = out / FORMATS[manifest.format].path(shard)
        files += [place / f"{entry['key']}.png" for entry in manifest.entries if "key" in entry]
        failed += len(manifest.failed)
    if failed:
        raise InputError(
            f"{out} must have a picture of each row, got none of {failed}; see failures there, then draw them with "
            "--retry-failed"
        )
    return files

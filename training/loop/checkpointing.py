"""Training checkpoints that survive anything: safetensors + JSON, complete or not there at all.

A checkpoint is a folder `step-00001000/` with one safetensors file a part, state.json and manifest.json. It is written
under a temporary name, every file flushed to the disk, the manifest last, then renamed; older ones go only after that,
each renamed before it is deleted, so that a folder with the name of a checkpoint is always a whole one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import latentdiff
from latentdiff.checkpoints.folder import is_plain
from latentdiff.checkpoints.saver import flush_to_disk
from latentdiff.errors import InputError, StorageError, shown
from latentdiff.files import fingerprint, open_file, parse_json, read_file

MAX_MANIFEST_BYTES = 2**20
_NAME = re.compile(r"step-(\d{8})$")
# Keys of a config that a resumed run may change: where, how long, how often, and how a step is computed, not what.
FREE_KEYS = {
    *("run.out", "run.steps", "run.log_every", "run.sample_every", "run.save_every", "run.keep_checkpoints"),
    *("run.accumulation", "run.compile", "run.gradient_checkpointing", "run.trackers", "samples.prompts"),
    *("evaluate.every", "evaluate.patience"),
}


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: tensors by part ("model", "ema", ...) and the JSON state."""

    folder: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    run: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write the checkpoint of `step` and delete all but the newest `keep`.

    Args:
        run: folder of the run; checkpoints go to run/checkpoints.
        tensors: safetensors files by part name.
        state: anything JSON can hold; "config" in it is the run's.

    Raises:
        StorageError: disk full or not writable; what was there before stays.
        InputError: a tensor is not finite.
    """
    from safetensors import SafetensorError

    _require_finite(tensors, step)
    parent = run / "checkpoints"
    temporary, final = parent / f".tmp-step-{step:08d}", parent / f"step-{step:08d}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(temporary, step, tensors, state)
        if final.exists():  # passed over as damaged when the run was resumed
            _discard(final)
        os.replace(temporary, final)
        flush_to_disk(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(f"could not save {final}: {error}; free space, then go on with --resume") from error
    if problem := checkpoint_problem(final):
        raise StorageError(f"{final} did not verify after writing: {problem}; check the disk")
    for old in checkpoint_folders(run)[keep:]:
        _discard(old)
    return final


def load_latest(run: Path, quiet: bool = False) -> Checkpoint | None:
    """Load the newest checkpoint that verifies, saying on stderr which were passed over; None without any folder.

    Raises:
        InputError: there are checkpoints, and none of them verifies.
    """
    from safetensors.torch import load_file

    folders = checkpoint_folders(run)
    for folder in folders:
        if problem := checkpoint_problem(folder):
            if not quiet:
                print(f"passed over {folder}: {problem}", file=sys.stderr)
            continue
        state = json.loads((folder / "state.json").read_text())
        parts = [name for name in _read_manifest(folder)["files"] if name.endswith(".safetensors")]
        tensors = {name.removesuffix(".safetensors"): load_file(folder / name) for name in parts}
        return Checkpoint(folder, state["step"], tensors, state)
    if folders:
        raise InputError(
            f"none of the {len(folders)} checkpoints in {run} verifies; put one of them back, or choose another --out"
        )
    return None


def checkpoint_folders(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, newest first."""
    parent = run / "checkpoints"
    found = [entry for entry in parent.iterdir() if _NAME.match(entry.name)] if parent.is_dir() else []
    return sorted(found, reverse=True)


def checkpoint_problem(folder: Path) -> str:
    """Say what is wrong with a checkpoint, or return the empty string."""
    try:
        manifest = _read_manifest(folder)
        if folder.name != f"step-{manifest['step']:08d}":
            return f"is the checkpoint of step {manifest['step']}"
        for name, found in _fingerprints(folder, manifest["files"]).items():
            if found != manifest["files"][name]:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"unreadable ({error})"
    return ""


def remove_leftovers(run: Path) -> None:
    """Delete what a killed run left half written or half deleted."""
    for place in (run / "checkpoints").glob(".*-step-*"):
        shutil.rmtree(place, ignore_errors=True)


def config_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name the settings that differ between two configs, other than `FREE_KEYS`, each with both values."""
    ours, theirs = _flat(before), _flat(now)
    names = [name for name in {**ours, **theirs} if name not in FREE_KEYS and ours.get(name) != theirs.get(name)]
    return [f"{name} was {ours.get(name)!r}, is {theirs.get(name)!r}" for name in names]


def config_digest(config: Mapping[str, Any]) -> str:
    """Return a hash of all settings other than `FREE_KEYS`."""
    fixed = {name: value for name, value in _flat(config).items() if name not in FREE_KEYS}
    return _sha256(json.dumps(fixed, sort_keys=True).encode())


def _write(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Write the files and the manifest of a checkpoint and wait until they are on the disk."""
    from safetensors.torch import save_file

    for part, named in tensors.items():
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
        save_file(contiguous, folder / f"{part}.safetensors")
    (folder / "state.json").write_text(json.dumps({"step": step, **state}))
    names = sorted(file.name for file in folder.iterdir())
    for name in names:
        flush_to_disk(folder / name)
    manifest = {
        "step": step,
        "config_sha256": config_digest(state.get("config", {})),
        "versions": {
            "latentdiff": latentdiff.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "files": _fingerprints(folder, names),
    }
    manifest["sha256"] = _sha256(_render(manifest).encode())
    (folder / "manifest.json").write_text(_render(manifest))
    flush_to_disk(folder / "manifest.json")
    flush_to_disk(folder)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is not as it was written, to the last byte, or names files
            elsewhere.
    """
    file = folder / "manifest.json"
    text = read_file(file, MAX_MANIFEST_BYTES).decode("ascii")
    manifest = parse_json(text, str(file))
    if not isinstance(manifest, dict):
        raise ValueError("manifest.json is damaged")
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    if text != _render(manifest) or manifest["sha256"] != _sha256(_render(content).encode()):
        raise ValueError("manifest.json is damaged")
    for name in manifest["files"]:
        if not is_plain(name):
            raise ValueError(f"manifest.json names {shown(name)}, which lies elsewhere")
    return manifest


def _render(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2)


def _require_finite(tensors: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
    for part, named in tensors.items():
        for name, tensor in named.items():
            if tensor.is_floating_point() and tensor.numel() and not _spans_numbers(tensor):
                raise InputError(f"{part}/{name} is not finite at step {step}; lower optimizer.learning_rate")


def _spans_numbers(tensor: Tensor) -> bool:
    """Say whether all values are finite, which the extremes show thirty times as fast as a look at each."""
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def _discard(folder: Path) -> None:
    """Delete a checkpoint, which loses its name before its files."""
    doomed = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a tree by dotted name."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return leaves


def _fingerprints(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return size and digest of files by name, all of them read at once: weights, moments and averages are large."""
    names = list(names)
    with ThreadPoolExecutor(min(8, max(1, len(names)))) as pool:
        return dict(zip(names, pool.map(lambda name: _fingerprint(folder / name), names)))


def _fingerprint(file: Path) -> dict[str, Any]:
    """Return size and digest of a file."""
    with open_file(file) as stream:
        size, digest = fingerprint(stream)
    return {"bytes": size, "sha256": digest}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

"""Training checkpoints that survive anything: safetensors + JSON, complete or not there at all.

A checkpoint is a folder `step-00001000/` with one safetensors file a part, state.json and manifest.json. It is written
under a temporary name, every file flushed to the disk, the manifest last, then renamed; older ones go only after that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from latentdiff.checkpoints.saver import flush_to_disk
from latentdiff.errors import InputError, StorageError
from training.ema import Ema

_NAME = re.compile(r"step-(\d{8})$")


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
        state: anything JSON can hold.

    Raises:
        StorageError: disk full or not writable; what was there before stays.
        InputError: a tensor is not finite.
    """
    from safetensors.torch import save_file

    for part, named in tensors.items():
        for name, tensor in named.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise InputError(f"{part}/{name} is not finite at step {step}; lower optimizer.learning_rate")
    parent = run / "checkpoints"
    temporary, final = parent / f".tmp-step-{step:08d}", parent / f"step-{step:08d}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for part, named in tensors.items():
            contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
            save_file(contiguous, temporary / f"{part}.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}))
        files = sorted(file.name for file in temporary.iterdir())
        manifest = {"step": step, "files": {name: _digest(temporary / name) for name in files}}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
        for name in [*files, "manifest.json", "."]:
            flush_to_disk(temporary / name)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        flush_to_disk(parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(f"could not save {final}: {error}; free space, then go on with --resume") from error
    if problem := _problem(final):
        raise StorageError(f"{final} did not verify after writing: {problem}; check the disk")
    for old in _folders(run)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_latest(run: Path) -> Checkpoint | None:
    """Load the newest checkpoint whose manifest verifies, saying on stderr which were passed over; None without any."""
    from safetensors.torch import load_file

    for folder in _folders(run):
        if problem := _problem(folder):
            print(f"passed over {folder}: {problem}", file=sys.stderr)
            continue
        tensors = {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
        state = json.loads((folder / "state.json").read_text())
        return Checkpoint(folder, state["step"], tensors, state)
    return None


def gather(
    modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer], ema: Ema
) -> dict[str, Mapping[str, Tensor]]:
    """Return everything a run needs to go on, part by part, for `save_checkpoint`."""
    parts: dict[str, Mapping[str, Tensor]] = {name: module.state_dict() for name, module in modules.items()}
    parts |= {name: optimizer_tensors(optimizer) for name, optimizer in optimizers.items()}
    return parts | {"ema": ema.weights}


def restore(
    checkpoint: Checkpoint | None, modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer], ema: Ema
) -> int:
    """Put back what `gather` took and return the step to go on from, 0 without a checkpoint."""
    if checkpoint is None:
        return 0
    for name, module in modules.items():
        module.load_state_dict(checkpoint.tensors[name])
    for name, optimizer in optimizers.items():
        load_optimizer(optimizer, checkpoint.tensors.get(name, {}))
    ema.weights, ema.updates = checkpoint.tensors["ema"], checkpoint.state["ema_updates"]
    return checkpoint.step


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Flatten an optimizer's state to named tensors: "0.exp_avg", "0.step", ... in the order of its parameters."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": torch.as_tensor(value) for index, slot in state.items() for key, value in slot.items()}


def load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _folders(run: Path) -> list[Path]:
    """Return the checkpoint folders, newest first."""
    parent = run / "checkpoints"
    found = [entry for entry in parent.iterdir() if _NAME.match(entry.name)] if parent.is_dir() else []
    return sorted(found, reverse=True)


def _problem(folder: Path) -> str:
    """Say what is wrong with a checkpoint, or return the empty string."""
    try:
        expected = json.loads((folder / "manifest.json").read_text())["files"]
        wrong = [name for name, digest in expected.items() if _digest(folder / name) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable ({error})"
    return f"{wrong[0]} is damaged" if wrong else ""


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

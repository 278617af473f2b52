"""Parts of every training loop: run folder, precision, learning rate, stopping on a signal, grids."""

from __future__ import annotations

import copy
import math
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from latentdiff.checkpoints.folder import INDEX
from latentdiff.devices import supports_bfloat16
from latentdiff.errors import InputError, StorageError
from latentdiff.files import write_file
from latentdiff.images import from_tensor, sheet, write_png
from latentdiff.marks import COMPOSITE
from latentdiff.models.attention import Transformer2DModel
from latentdiff.models.layers import ResnetBlock2D

from ..config import OptimizerConfig, RunConfig, TrainingConfig, completed, dump_yaml, read_yaml
from ..data.batches import Conditioning
from .best import BEST, RECORD, Best, restore, settle
from .checkpointing import (
    Checkpoint,
    checkpoint_folders,
    config_differences,
    load_latest,
    remove_leftovers,
    save_checkpoint,
)
from .optimizers import require_optimizer
from .posthoc_ema import remove_snapshots
from .state import RunState

if TYPE_CHECKING:
    from typing_extensions import Unpack

CONFIG_FILE = "config.yaml"  # of a run folder
# Folders of trained models in it, each with the file that it is known by.
EXPORTS = {"model": INDEX, "vae": "config.json", "image_text": "config.json", BEST: RECORD}
SHOWN_DIFFERENCES = 5  # of two configs, in a message


@contextmanager
def open_run(
    config: TrainingConfig, resume: bool, accelerator: Accelerator, export: str
) -> Iterator[Checkpoint | None]:
    """Make the run folder, write the resolved config into it and give the checkpoint to go on from.

    No other process can open it while the `with` block runs.

    Args:
        export: name of the file or folder in it that the trained model goes to.

    Raises:
        InputError: the folder has checkpoints and `resume` is not set, or they are of another config; or it holds
            something that the run would write over; or another process trains in it.
        MissingDependencyError: the config asks for a package that is not installed.
        StorageError: the folder cannot be written.
    """
    require_optimizer(config.optimizer, accelerator.device)
    folder = Path(config.run.out)
    with locked(folder) if accelerator.is_main_process else nullcontext():
        newest = _checkpoint_to_go_on_from(config, resume, accelerator)
        if accelerator.is_main_process:
            require_own_config(folder)
            for replaced in (export, BEST):
                require_replaceable(folder / replaced)
            text = dump_yaml(config.model_dump(mode="json"))
            try:
                (folder / "samples").mkdir(exist_ok=True)
                write_file(folder / CONFIG_FILE, text.encode())
            except OSError as error:
                raise StorageError(f"cannot write to {folder}: {error.strerror}; choose another --out") from error
            remove_leftovers(folder)
            restore(folder, Best(**newest.state.get("best", {})) if newest else Best())
            remove_snapshots(folder, newest.step if newest else 0)
        yield newest


@contextmanager
def locked(folder: Path, file: str = ".lock") -> Iterator[None]:
    """Keep other processes out of a run folder, which is made if it is not there, in a `with` block.

    Args:
        folder: of the run.
        file: name of the lock in it.

    Raises:
        InputError: another process trains in it.
        StorageError: it cannot be made.
    """
    lock = FileLock(folder / file)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"{folder} is being trained in by another process; wait for it, or choose another --out"
        ) from error
    except (OSError, ValueError) as error:  # a name with NUL, too long, not in the file system's encoding
        reason = error.strerror if isinstance(error, OSError) else error
        raise StorageError(f"cannot write to {folder}: {reason}; choose another --out") from error
    try:
        yield
    finally:
        lock.release()


def require_own_config(folder: Path) -> None:
    """Raise InputError where the run folder's config.yaml was written by hand, and would be lost."""
    file = folder / CONFIG_FILE
    if not file.exists() or file.stat().st_size == 0:
        return
    try:
        written = dump_yaml(read_yaml(file)).encode() == file.read_bytes()
    except InputError:
        written = False
    if not written:
        raise InputError(
            f"{file} was not written by a run, which would put its own there; rename it, or choose another --out"
        )


def require_replaceable(export: Path) -> None:
    """Raise InputError where there is something else in the place of the model that a run writes at its end."""
    if export.name not in EXPORTS or not export.exists() or (export / EXPORTS[export.name]).is_file():
        return
    if not export.is_dir() or any(export.iterdir()):
        raise InputError(f"{export} holds something that is no saved model; move it, or choose another --out")


def _checkpoint_to_go_on_from(config: TrainingConfig, resume: bool, accelerator: Accelerator) -> Checkpoint | None:
    folder, tree = Path(config.run.out), config.model_dump(mode="json")
    found = checkpoint_folders(folder)
    if found and not resume:
        raise InputError(f"{folder} has a checkpoint, {found[0].name}; add --resume to go on, or choose another --out")
    newest = load_latest(folder, quiet=not accelerator.is_main_process)
    if newest is not None and (differences := config_differences(completed(newest.state["config"]), tree)):
        shown = "; ".join(differences[:SHOWN_DIFFERENCES])
        more = len(differences) - SHOWN_DIFFERENCES
        raise InputError(
            f"{newest.folder} is of another config: {shown}{f' and {more} more' if more > 0 else ''}\n"
            "set these back to go on, or choose another --out"
        )
    return newest


def save_run(config: TrainingConfig, step: int, state: RunState, accelerator: Accelerator) -> None:
    """Write the checkpoint of `step`, from the main process; all have to call it.

    Raises:
        StorageError, InputError: see `save_checkpoint`.
    """
    tensors = state.tensors()
    if accelerator.is_main_process:
        counters = state.counters() | {"config": config.model_dump(mode="json")}
        save_checkpoint(Path(config.run.out), step, tensors, counters, config.run.keep_checkpoints)
        settle(Path(config.run.out))


def mixed_precision(run: RunConfig, device: torch.device) -> str:
    """Return accelerate's name of the precision: "bf16" where matrix products are native in it, else "no".

    Raises:
        InputError: fp16 is asked for on a device that is no CUDA GPU.
    """
    if run.precision == "fp16" and device.type != "cuda":
        raise InputError(f"run.precision fp16 needs a CUDA GPU, got {device.type}; choose bf16 or no")
    if run.precision != "auto":
        return run.precision
    return "bf16" if supports_bfloat16(device) else "no"


def compile_checked(
    module: nn.Module, *inputs: Tensor, autocast: AbstractContextManager[Any], **options: Unpack[Conditioning]
) -> None:
    """Compile a network in place, after seeing on a copy that it then gives the gradients it gives without.

    Some releases of PyTorch lose most gradients of a compiled U-Net on a CPU without a word; the loss hardly shows it.

    Args:
        inputs, options: an example of what the network will be called with.
        autocast: precision of the call.

    Raises:
        InputError: the gradients differ from those in float32 by much more than rounding in that precision explains.
    """
    probe = copy.deepcopy(module)
    for parameter in probe.parameters():
        if not parameter.any():  # layers that start at zero let no gradient through
            nn.init.normal_(parameter, std=0.02)
    exact = _gradient(probe, probe(*inputs, **options))
    with autocast:
        rounded = _gradient(probe, probe(*inputs, **options))
        probe.compile()
        compiled = _gradient(probe, probe(*inputs, **options))
    own, difference = (float((gradient - exact).norm() / exact.norm()) for gradient in (rounded, compiled))
    if not difference < max(0.1, 2 * own):
        raise InputError(
            f"torch.compile of torch {torch.__version__} changes this network's gradients by {difference:.0%} here, "
            f"rounding by {own:.0%}; set run.compile to false"
        )
    module.compile()


def _gradient(network: nn.Module, output: Tensor) -> Tensor:
    """Return the gradient of the mean square of an output by all weights of its network, as one vector."""
    network.zero_grad()
    output.float().square().mean().backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()]
    return torch.cat([gradient.flatten() for gradient in found])


def checkpoint_gradients(network: nn.Module) -> None:
    """Keep only the inputs of each residual block and transformer for the backward pass, which computes the rest again.

    Source: Chen et al. 2016, arXiv 1604.06174, section 3.
    """
    for module in network.modules():
        if isinstance(module, ResnetBlock2D | Transformer2DModel):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]


def learning_rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of optimizer step `step` of `steps`: linear warm-up, constant, cosine fall to zero."""
    warmup = min(1.0, (step + 1) / max(1, optimizer.warmup_steps))
    start = steps * (1 - optimizer.decay_share)
    fall = 0.0 if step < start else (step - start) / max(1.0, steps - start)
    return optimizer.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * fall))


def start_step(config: TrainingConfig, step: int, *optimizers: Optimizer) -> None:
    """Set the learning rate of a step (0-based) and clear the gradients of the one before."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, config.run.steps)
        optimizer.zero_grad()


def seeded(*parts: int) -> torch.Generator:
    """Return a CPU generator that is a pure function of `parts` (seed, step, process, purpose)."""
    return torch.Generator().manual_seed(random.Random(repr(parts)).getrandbits(63))


def short(values: Tensor, most: int = 6) -> str:
    """Return numbers as messages have them, the first few: "[0.12, -1.00, ...]"."""
    more = ", ..." if len(values) > most else ""
    return f"[{', '.join(f'{value:.2f}' for value in values[:most].tolist())}{more}]"


Stop = Callable[[int], bool]
"""Asked after each step but the last, with how many are done, whether to save and stop there as a signal would."""


def go_on(done: int) -> bool:
    """Stop nowhere: see `Stop`."""
    return False


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list that the loop looks at after each step; the second one exits at once.

    Only the main thread of a process receives signals; in another one the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        print("training in a thread: SIGINT and SIGTERM end it without a checkpoint of its own", file=sys.stderr)
        yield received
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            sys.exit(128 + number)
        received.append(number)
        # Not print: a signal that comes while something is being printed may not enter the same stream again.
        os.write(2, b"stopping after this step; a second signal exits at once\n")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def save_grid(
    images: Tensor | Sequence[Tensor], file: Path, columns: int, gap: int = 2, source_type: str = COMPOSITE
) -> None:
    """Save images (N, 3, H, W) in [-1, 1] as one PNG, row by row on white.

    Args:
        source_type: `marks.GENERATED` where a model made all of them.
    """
    write_png(file, sheet(from_tensor(torch.stack(list(images))), columns, gap), {}, source_type)

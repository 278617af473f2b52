"""State of a run, as its checkpoints hold it: networks, optimizers, average and counters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from latentdiff.errors import InputError

from .best import Best
from .checkpointing import Checkpoint
from .ema import Ema
from .posthoc_ema import PowerEma
from .sharding import gathered_on_main, sharded_like

# Steps in a row with a non-finite loss or gradient after which a run gives up.
MAX_BAD_STEPS = 20


@dataclass
class StepGuard:
    """Let only finite steps change the weights, and give up after `MAX_BAD_STEPS` others in a row.

    Attributes:
        bad_steps: skipped in a row, up to now.
        skipped: of the whole run.
    """

    bad_steps: int = 0
    skipped: int = 0

    def allows(self, loss: Tensor, gradient_norm: Tensor, step: int) -> bool:
        """Say whether loss and gradient norm of a step are finite.

        Raises:
            InputError: they have not been for too long.
        """
        if torch.isfinite(loss) and torch.isfinite(gradient_norm):
            self.bad_steps = 0
            return True
        self.bad_steps += 1
        self.skipped += 1
        if self.bad_steps >= MAX_BAD_STEPS:
            raise InputError(
                f"loss not finite {self.bad_steps} steps in a row at step {step}; lower optimizer.learning_rate"
            )
        return False


@dataclass
class RunState:
    """Everything that training changes; a checkpoint is this and nothing else.

    Batches, augmentation, noise and learning rate are pure functions of (seed, step), so there is no cursor to keep.

    Attributes:
        modules, optimizers: by the name of their file in a checkpoint; not wrapped by an accelerator.
        profiles: averages of other widths, by sigma_rel, that snapshots are kept of.
        scaler: of the loss, in fp16.
        best: of the evaluations until now.
    """

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, Optimizer]
    ema: Ema
    profiles: Mapping[float, PowerEma] = field(default_factory=dict)
    guard: StepGuard = field(default_factory=StepGuard)
    scaler: torch.amp.GradScaler | None = None
    best: Best = field(default_factory=Best)

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """Return the tensors, file by file, for `save_checkpoint`; see `gathered_on_main`."""
        files: dict[str, Mapping[str, Tensor]] = {name: module.state_dict() for name, module in self.modules.items()}
        files |= {name: optimizer_tensors(optimizer) for name, optimizer in self.optimizers.items()}
        files |= {name: average.weights for name, average in self.averages().items()}
        return {name: gathered_on_main(tensors) for name, tensors in files.items()}

    def counters(self) -> dict[str, Any]:
        """Return what is not a tensor, for `save_checkpoint`."""
        counters: dict[str, Any] = {
            "ema_updates": self.ema.updates,
            "bad_steps": self.guard.bad_steps,
            "skipped": self.guard.skipped,
        }
        counters["best"] = asdict(self.best)
        return counters | ({"scaler": self.scaler.state_dict()} if self.scaler is not None else {})

    def restore(self, checkpoint: Checkpoint | None) -> int:
        """Put back what a checkpoint holds and return the step to go on from, 0 without a checkpoint."""
        if checkpoint is None:
            return 0
        for name, module in self.modules.items():
            live = module.state_dict()
            saved = checkpoint.tensors[name].items()
            module.load_state_dict({key: sharded_like(tensor, live.get(key, tensor)) for key, tensor in saved})
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, checkpoint.tensors.get(name, {}))
        for name, average in self.averages().items():
            saved = checkpoint.tensors[name].items()
            average.weights = {key: sharded_like(tensor, average.weights[key]) for key, tensor in saved}
            average.updates = checkpoint.state["ema_updates"]
        self.guard = StepGuard(checkpoint.state["bad_steps"], checkpoint.state["skipped"])
        self.best = Best(**checkpoint.state.get("best", {}))  # earlier releases measured none
        if self.scaler is not None:
            self.scaler.load_state_dict(checkpoint.state["scaler"])
        return checkpoint.step

    def to(self, device: torch.device) -> None:
        """Move the averages to a device."""
        for average in self.averages().values():
            average.to(device)

    def average(self, model: nn.Module) -> None:
        """Move the averages towards the live weights."""
        for average in self.averages().values():
            average.update(model)

    def averages(self) -> dict[str, Ema]:
        """Return all averages by the name of their file in a checkpoint."""
        return {"ema": self.ema, **{f"ema_{sigma_rel}": average for sigma_rel, average in self.profiles.items()}}


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Flatten an optimizer's state to named tensors: "0.exp_avg", "0.step", ... in the order of its parameters."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": tensor for index, slot in state.items() for key, tensor in _flat(slot)}


def _flat(slot: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield what an optimizer keeps for one parameter, whole numbers as int64."""
    for key, value in slot.items():
        if isinstance(value, Mapping):  # in which bitsandbytes puts what is quantised, and takes it without, too
            yield from _flat(value)
        elif key.startswith("qmap"):  # its table, one for all parameters, which a file cannot hold under several names
            yield key, value.clone()
        else:
            yield key, torch.as_tensor(value)


def load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        whole_number = tensor.dtype == torch.int64 and tensor.ndim == 0
        state.setdefault(int(index), {})[key] = (
            tensor.item() if whole_number else sharded_like(tensor, parameters[int(index)])
        )
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

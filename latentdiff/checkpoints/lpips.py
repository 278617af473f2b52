"""Load the network of LPIPS, whose weights a user makes once with `python -m latentdiff.training.losses.lpips FILE`."""

from __future__ import annotations

from pathlib import Path

import torch

from latentdiff.checkpoints.header import read_header
from latentdiff.checkpoints.weights import FLOATS, read_weights
from latentdiff.errors import InputError, ModelMismatchError
from latentdiff.models.lpips import Lpips

__all__ = ["load_lpips"]


def load_lpips(file: Path, device: str | torch.device = "cpu") -> Lpips:
    """Return the network with the weights of a file; they are frozen, and gradients go through to the pictures.

    Raises:
        InputError: there is no such file.
        ModelLoadError: the file was refused; the subclass says why.
    """
    remedy = f"make it with `python -m latentdiff.training.losses.lpips {file}`, or leave LPIPS out"
    if not file.is_file():
        raise InputError(f"LPIPS needs a file of weights, and {file} is none; {remedy}")
    with torch.device("meta"):  # without weights, and without drawing random numbers for them
        network = Lpips()
    tensors = read_header(file).tensors
    expected = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: list(info.shape) if info.dtype in FLOATS else info.dtype for name, info in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        wanted, got = expected.get(name, "nothing"), found.get(name, "nothing")
        if wanted != got:
            raise ModelMismatchError(f"{file}: expected {wanted} as {name[:100]}, got {got}; {remedy}")
    network.load_state_dict(read_weights(file, tensors, torch.float32, device), assign=True)
    return network.requires_grad_(False).eval()

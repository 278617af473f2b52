"""What the log of an autoencoder run says beside its losses: each term's own gradient, and where the latents lie."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn


def gradient_norms(terms: Mapping[str, Tensor], network: nn.Module, accelerator: Accelerator) -> dict[str, float]:
    """Return the norm of the gradient that each term of a loss, as it is weighed, sends into all weights of a network.

    Nothing is changed: the gradients that the network has stay, and the terms can still be gone back through. A term
    that sends nothing is 0.

    Args:
        terms: means over this process's share of a batch; the norm is that of the gradient's mean over all shares.
        network: not as the accelerator prepared it.

    Returns:
        The norms by "grad_norm/" and the name of the term.
    """
    weights, norms = list(network.parameters()), {}
    for name, term in terms.items():
        norms[f"grad_norm/{name}"] = 0.0
        if term.requires_grad:
            gradients = torch.autograd.grad(term, weights, retain_graph=True, materialize_grads=True)
            averages = accelerator.reduce(list(gradients), "mean")
            norms[f"grad_norm/{name}"] = float(torch.stack(torch._foreach_norm(averages)).norm())
    return norms


def latent_scalars(latents: Tensor) -> dict[str, float]:
    """Return mean and standard deviation of each channel of latents (B, C, h, w), by "latent/mean_0" and so on."""
    pixels = latents.detach().float().transpose(0, 1).flatten(1)  # (C, B*h*w)
    figures = {"mean": pixels.mean(dim=1), "std": pixels.std(dim=1, correction=0)}
    return {f"latent/{kind}_{n}": value for kind, values in figures.items() for n, value in enumerate(values.tolist())}

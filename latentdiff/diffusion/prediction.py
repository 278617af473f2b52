"""Prediction types (noise, velocity, data, flow): training target, and x0 estimate from the network's output.

A network sees signal_rate * x0 + noise_rate * noise: in VP coordinates, where the squares of the rates add up to 1, or
in those of flow matching, where the rates do. Sampling lives in sigma coordinates, x = x0 + sigma * noise, sigma being
noise_rate / signal_rate, where every sampler is the same for every prediction type. The two sides of each row of
`PREDICTIONS` are each other's inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.errors import InputError, suggest

__all__ = [
    "PREDICTIONS",
    "Call",
    "Denoise",
    "Denoiser",
    "Network",
    "Preconditioning",
    "Prediction",
    "Thresholding",
    "as_denoiser",
    "halves",
    "preconditioning",
    "x0_estimate",
]


@dataclass(eq=False)
class Call:
    """Position of a batch in its sampling runs; tensors are on the device of x, b images are still running.

    Attributes:
        index: how many rows were done before this one, the same for all images (an int: reading it costs no sync).
        images: (b,) int64, which images of the batch these are; gathers what belongs to an image, such as its context.
        rows: (b,) int64, row of each image's own plan; gathers what was computed once per row, such as time embeddings.
        sigmas: (b,) noise level of each image, in the dtype of x.
        timesteps: (b,) training timestep of each image, fractional under Karras or linspace spacing, in the dtype of x.
    """

    index: int
    images: Tensor
    rows: Tensor
    sigmas: Tensor
    timesteps: Tensor


# (x (b, ...) in sigma coordinates, call) -> x0 estimate (b, ...)
Denoise = Callable[[Tensor, Call], Tensor]
# (model_input (b, ...) of unit variance, call) -> model_output (b, ...), guidance already applied; twice the channels
# where the network learns its variance, and its input has twice the channels where it is conditioned on itself
Network = Callable[[Tensor, Call], Tensor]


@dataclass(frozen=True)
class Prediction:
    """One prediction type: the training target, and the way back from it to x0.

    Attributes:
        target: (x0, noise, signal_rate, noise_rate) -> what the network is trained to output.
        c_skip, c_out: sigma -> factors of x and of the network's output in the x0 estimate.
        power: 2 where signal_rate^2 + noise_rate^2 = 1 in what the network sees, 1 where signal_rate + noise_rate = 1.
    """

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    c_skip: Callable[[Tensor], Tensor]
    c_out: Callable[[Tensor], Tensor]
    power: int = 2


PREDICTIONS: dict[str, Prediction] = {
    # Ho et al. 2020, arXiv 2006.11239, Eq. 14 (target) and Eq. 15 divided by signal_rate (estimate).
    "epsilon": Prediction(
        target=lambda x0, noise, signal_rate, noise_rate: noise,
        c_skip=lambda sigma: sigma.new_ones(sigma.shape),
        c_out=lambda sigma: -sigma,
    ),
    # Salimans & Ho 2022, arXiv 2202.00512, section 4: v = alpha noise - sigma x, x estimate = alpha z - sigma v.
    "v_prediction": Prediction(
        target=lambda x0, noise, signal_rate, noise_rate: signal_rate * noise - noise_rate * x0,
        c_skip=lambda sigma: 1 / (1 + sigma**2),
        c_out=lambda sigma: -sigma / (1 + sigma**2).sqrt(),
    ),
    # Salimans & Ho 2022, arXiv 2202.00512, section 4: predicting x directly.
    "sample": Prediction(
        target=lambda x0, noise, signal_rate, noise_rate: x0,
        c_skip=lambda sigma: sigma.new_zeros(sigma.shape),
        c_out=lambda sigma: sigma.new_ones(sigma.shape),
    ),
    # Lipman et al. 2023, arXiv 2210.02747, Eq. 23 with time running from data to noise: u = noise - x.
    "flow_prediction": Prediction(
        target=lambda x0, noise, signal_rate, noise_rate: noise - x0,
        c_skip=lambda sigma: 1 / (1 + sigma),
        c_out=lambda sigma: -sigma / (1 + sigma),
        power=1,
    ),
}


class Preconditioning(NamedTuple):
    """The factors of D(x; sigma) = c_skip x + c_out F(c_in x), each of the shape of sigma."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor


def preconditioning(prediction_type: str, sigmas: Tensor) -> Preconditioning:
    """Return the factors that make an x0 estimate of a network's output.

    Args:
        prediction_type: a key of `PREDICTIONS`.
        sigmas: any shape, >= 0.

    Raises:
        InputError: unknown prediction type.

    Source: Karras et al. 2022, arXiv 2206.00364, Eq. 7; c_in is the VP column of its table 1.
    """
    if prediction_type not in PREDICTIONS:
        raise InputError(f"prediction_type {prediction_type!r} is unknown{suggest(str(prediction_type), PREDICTIONS)}")
    prediction = PREDICTIONS[prediction_type]
    c_in = 1 / (1 + sigmas**prediction.power) ** (1 / prediction.power)
    return Preconditioning(prediction.c_skip(sigmas), prediction.c_out(sigmas), c_in)


def x0_estimate(prediction_type: str, model_input: Tensor, output: Tensor, sigmas: Tensor) -> Tensor:
    """Return the x0 estimate (B, C, H, W) of what a network was given and what it gave.

    Args:
        prediction_type: a key of `PREDICTIONS`.
        model_input, output: (B, C, H, W).
        sigmas: (B, 1, 1, 1), finite.
    """
    c_skip, c_out, c_in = preconditioning(prediction_type, sigmas)
    return c_skip / c_in * model_input + c_out * output


@dataclass(frozen=True)
class Thresholding:
    """Dynamic thresholding: x0 estimates of each image are clamped at a quantile of their size, and divided by it.

    Attributes:
        ratio: the quantile, 0 to 1.
        largest: upper limit of the quantile, whose lower one is 1, the largest value that pixels have.

    Raises:
        InputError: a value out of range.

    Source: Saharia et al. 2022, arXiv 2205.11487, section 2.3.
    """

    ratio: float = 0.995
    largest: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 <= self.ratio <= 1:
            raise InputError(f"dynamic_thresholding_ratio must be a number from 0 to 1, got {self.ratio!r}; try 0.995")
        if not isinstance(self.largest, int | float) or not 0 < self.largest < float("inf"):
            raise InputError(f"sample_max_value must be a number above 0, got {self.largest!r}; try 1.0")

    def __call__(self, estimates: Tensor) -> Tensor:
        """Return the thresholded estimates (B, C, H, W), within -1 and 1."""
        size = torch.quantile(estimates.abs().flatten(1), self.ratio, dim=1).clamp(1, self.largest)  # (B,)
        size = size.reshape(-1, *[1] * (estimates.ndim - 1))
        return estimates.clamp(-size, size) / size


@dataclass(frozen=True)
class Denoiser:
    """A network wrapped as the one function that samplers call; `as_denoiser` makes it.

    The sampling loop does not call it but folds its factors into the tables, and calls the network itself.

    Attributes:
        network: see `Network`.
        prediction_type: what the network outputs; None for an x0 estimate from x itself, in sigma coordinates.
        self_conditioning: whether the network is also given the x0 estimate of the call before, zeros at first.
        limit: largest absolute value that data has, to which estimates are clamped: 1 for pixels; None for no limit.
        thresholding: what bounds estimates instead, for models that were made for it.
    """

    network: Network
    prediction_type: str | None
    self_conditioning: bool = False
    limit: float | None = None
    thresholding: Thresholding | None = None

    @property
    def bounds_estimates(self) -> bool:
        """Whether x0 estimates are kept in a range."""
        return self.limit is not None or self.thresholding is not None

    def bounded(self, estimates: Tensor) -> Tensor:
        """Return x0 estimates (B, C, H, W) in the range that data has."""
        if self.thresholding is not None:
            return self.thresholding(estimates)
        return estimates if self.limit is None else estimates.clamp(-self.limit, self.limit)

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        """Return the x0 estimate (b, C, H, W) of x (b, C, H, W), in the dtype of x, without an earlier estimate."""
        return self.with_variance(x, call)[0]

    def with_variance(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
        """Return the same and where between the small and the large variance, -1 to 1, a step is, if that is learned.

        Source: Karras et al. 2022, arXiv 2206.00364, Eq. 7; Nichol & Dhariwal 2021, arXiv 2102.09672, Eq. 15.
        """
        c_skip, c_out, c_in = self.factors(call.sigmas.reshape(-1, *[1] * (x.ndim - 1)))  # (b, 1, 1, 1)
        inputs = c_in * x
        output = self.network(torch.cat([inputs, torch.zeros_like(x)], 1) if self.self_conditioning else inputs, call)
        output, share = (output, None) if output.shape[1] == x.shape[1] else halves(output)
        estimate = self.bounded(c_skip * x + c_out * output.to(x.dtype))
        return estimate, None if share is None else share.to(x.dtype)

    def factors(self, sigmas: Tensor) -> Preconditioning:
        """Return the factors at some noise levels, each of their shape."""
        if self.prediction_type is None:
            return Preconditioning(torch.zeros_like(sigmas), torch.ones_like(sigmas), torch.ones_like(sigmas))
        return preconditioning(self.prediction_type, sigmas)


def halves(output: Tensor) -> tuple[Tensor, Tensor]:
    """Split the output (B, 2C, H, W) of a network that learns its variance into prediction and variance."""
    prediction, share = output.chunk(2, dim=1)
    return prediction, share


def as_denoiser(
    network: Network,
    prediction_type: str,
    self_conditioning: bool = False,
    limit: float | None = None,
    thresholding: Thresholding | None = None,
) -> Denoiser:
    """Wrap a network as the one function that samplers call.

    Args:
        network: (model_input (b, C, H, W), call) -> model_output (b, C, H, W). It may run in half precision; the
            estimate is made in the dtype of x, because c_out multiplies every rounding error by sigma.
        prediction_type: what the network outputs.
        self_conditioning: whether the input has the x0 estimate of the call before in a second half of channels.
        limit: largest absolute value that data has, None where it has no range, as latents.
        thresholding: bounds estimates instead of `limit`; `NoiseSchedule.thresholding` is that of a model.

    Returns:
        denoise(x (b, C, H, W), call) -> x0 estimate (b, C, H, W).

    Source: self-conditioning: Chen et al. 2022, arXiv 2208.04202, algorithm 2.
    """
    return Denoiser(network, prediction_type, self_conditioning, limit, thresholding)

"""Bits per dimension of pictures under a model; for a latent one of its latents, and of its autoencoder apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from latentdiff.checkpoints import Components
from latentdiff.diffusion import draw_noise, image_generator
from latentdiff.diffusion.likelihood import LEVELS, Bound, discretised, ode_likelihood, variational_bound
from latentdiff.diffusion.prediction import Call, Denoiser
from latentdiff.errors import InputError
from latentdiff.evaluate.evaluation import Evaluation
from latentdiff.evaluate.figure import Figure
from latentdiff.evaluate.intervals import Estimate
from latentdiff.models.pixels import PixelSpace

__all__ = ["negative_log_likelihood", "network_of", "nll"]

BATCH = 64
IMAGES = 32  # unless a request says otherwise: each takes hundreds of network calls


def nll(evaluation: Evaluation) -> list[Figure]:
    """Measure how many bits per dimension test pictures cost; see `negative_log_likelihood`.

    Raises:
        InputError: a figure is not finite, or the model is one that `negative_log_likelihood` refuses.
    """
    reference, components = evaluation.reference("test"), evaluation.model.components
    chosen = sample_of(evaluation)
    images = reference.load(chosen).to(evaluation.model.device)
    captions, seed = [reference.captions[number] for number in chosen], evaluation.request.seed
    found = negative_log_likelihood(components, images, captions, seed=seed, progress=evaluation.request.progress)
    figures = []
    for name, (value, error) in _leaves(found):
        if not math.isfinite(value):
            raise InputError(f"the model makes values that are not finite (nll/{name}); try --dtype float32")
        half = 1.96 * error
        estimate = Estimate(value, value - half, value + half, len(chosen))
        protocol = {"of": found["of"], "seed": seed}
        figures.append(evaluation.figure(f"nll/{name}", estimate, "lower", protocol, drawn=False, unit="bits/dim"))
    return figures


def sample_of(evaluation: Evaluation) -> list[int]:
    """Return the numbers of the test pictures that are measured; see `Evaluation.sample`."""
    return evaluation.sample(IMAGES)


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield the path, mean and standard error of each figure of a tree."""
    for name, value in tree.items():
        if isinstance(value, dict) and "mean" in value:
            yield path + name, (value["mean"], value["standard_error"])
        elif isinstance(value, dict):
            yield from _leaves(value, f"{path}{name}/")


def negative_log_likelihood(
    components: Components,
    images: Tensor,
    captions: Sequence[str],
    *,
    seed: int = 0,
    ode_steps: int = 100,
    probes: int = 2,
    progress: bool = False,
) -> dict[str, Any]:
    """Return how many bits per dimension pictures cost, given their captions: mean and standard error over them.

    A model of pixels gets the variational bound with the discretised decoder, and the probability-flow ODE on pixels
    with uniform noise of one level added; both are bits per 8-bit value. For a latent model both are of the density of
    latents, in bits per latent value, which is no likelihood of pictures and may be negative; what the autoencoder
    costs stands beside it and is not added: bits per 8-bit value of the picture given its latents, by a Gaussian of the
    measured error, and the entropy of the latents given the picture.

    Args:
        components: of the model.
        images: (N, 3, H, W) in [-1, 1], 8-bit values.
        captions: one of each.
        seed: image i draws its noise from seed + i.
        ode_steps: of the ODE, two network calls each.
        probes: of Hutchinson's estimator.
        progress: show a bar on stderr.

    Raises:
        InputError: the model is told more than a text: it fills in, enlarges, or is of Stable Diffusion XL's kind.

    Source: Ho et al. 2020, arXiv 2006.11239, section 3.3; Song et al. 2021, arXiv 2011.13456, section 4.3.
    """
    _require_text_alone(components)
    in_pixels = isinstance(components.autoencoder, PixelSpace)
    bounds: dict[str, list[Tensor]] = {}
    ode, errors, shares = [], [], []
    steps = min(ode_steps, components.schedule.num_train_timesteps - 1)
    for start in tqdm(range(0, len(images), BATCH), disable=not progress, unit="batch"):
        batch = images[start : start + BATCH]
        generators = [image_generator(seed + start + row) for row in range(len(batch))]
        latents, share = _latents(components, batch, generators)
        shares.append(share)
        denoise, variance = network_of(components, captions[start : start + BATCH]), components.schedule.variance_type
        if not components.schedule.ends_in_pure_noise:
            bound = variational_bound(denoise, components.schedule, latents, generators, variance, eight_bit=in_pixels)
            for name, values in _terms(bound).items():
                bounds.setdefault(name, []).append(values)
        if in_pixels:
            jitter = torch.stack([torch.rand(latents.shape[1:], generator=one) for one in generators])
            latents = latents + (jitter.to(latents) - 0.5) * 2 / LEVELS
        found = ode_likelihood(denoise, components.schedule, latents, generators, steps=steps, probes=probes)
        ode.append(found.bits_per_dim(2 / LEVELS if in_pixels else 1.0))
        errors.append(found.standard_error / found.dimensions / math.log(2))
    whole = {"bound": {name: _mean(torch.cat(values)) for name, values in bounds.items()}} if bounds else {}
    figures: dict[str, Any] = {"images": len(images), "of": "pixels" if in_pixels else "latents", **whole}
    hutchinson = float(torch.cat(errors).square().mean().sqrt() / math.sqrt(len(images)))
    figures["ode"] = {**_mean(torch.cat(ode)), "standard_error_of_probes": hutchinson}
    if not in_pixels:
        figures["autoencoder"] = _autoencoder_terms(torch.cat([error for error, _ in shares]), images, shares)
    return figures


def _terms(bound: Bound) -> dict[str, Tensor]:
    return {"L_T": bound.prior, "L_t": bound.terms[1:].sum(dim=0), "L_0": bound.terms[0], "total": bound.total}


def network_of(components: Components, texts: Sequence[str]) -> Denoiser:
    """Return the denoiser of a batch of images with a text each, without guidance.

    Texts of equally many windows are called together, so that the length of one changes nothing for another.
    """
    unet, dtype, groups = components.unet, components.unet.conv_in.weight.dtype, dict[int, list[int]]()
    states = [encoded.states.flatten(0, 1).to(dtype) for encoded in components.prompt_encoder(texts)]  # (n * L, D) each
    for image, own in enumerate(states):
        groups.setdefault(len(own), []).append(image)
    device = states[0].device
    places = [torch.tensor(images, device=device) for images in groups.values()]
    contexts = [torch.stack([states[image] for image in images]) for images in groups.values()]  # (b, n * L, D)
    back = torch.cat(places).argsort()

    def network(x: Tensor, call: Call) -> Tensor:
        x, timesteps = x.to(dtype), call.timesteps
        outputs = [unet(x[images], timesteps[images], context) for images, context in zip(places, contexts)]
        return torch.cat(outputs)[back].float()

    return components.denoiser(network)


def _require_text_alone(components: Components) -> None:
    config = components.unet.config
    conditions = {
        "fills in components of pictures": components.inpaints,
        "enlarges pictures": components.upscales,
        "is told sizes too, as Stable Diffusion XL is": config.expects_sizes,
        "is told a guidance scale too, as consistency models are": config.time_cond_proj_dim is not None,
    }
    for what in (name for name, holds in conditions.items() if holds):
        raise InputError(f"only models of pictures given a text alone are measured, got one that {what}; use another")


@torch.no_grad()
def _latents(
    components: Components, images: Tensor, generators: Sequence[torch.Generator]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return scaled latents (B, C, h, w) drawn from their distribution, with the decoder's errors and their entropy."""
    autoencoder, scale = components.autoencoder, components.autoencoder.config.scaling_factor
    weight = next(autoencoder.parameters())
    images = images.to(weight)
    posterior = autoencoder.encode(images)
    if isinstance(autoencoder, PixelSpace):
        return posterior.mode().float(), (images[:0], images[:0])
    latents = posterior.sample(draw_noise(generators, posterior.mean.shape[1:]))
    errors = images - autoencoder.decode(latents)
    # Of a Gaussian, in nats: half the logarithm of 2 pi e times its variance, measured in scaled latents.
    entropy = 0.5 * (posterior.logvar.float() + math.log(2 * math.pi * math.e)) + math.log(scale)
    return latents.float() * scale, (errors.float(), entropy.flatten(1).mean(dim=1) / math.log(2))


def _autoencoder_terms(
    errors: Tensor, images: Tensor, shares: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, dict[str, float]]:
    log_variance = errors.square().mean().log()
    pixels = images.to(errors)
    nats = -discretised(pixels, pixels - errors, log_variance)
    return {
        "bits_per_pixel_value": _mean(nats.flatten(1).mean(dim=1) / math.log(2)),
        "entropy_per_latent_value": _mean(torch.cat([entropy for _, entropy in shares])),
    }


def _mean(values: Tensor) -> dict[str, float]:
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return {"mean": float(values.mean()), "standard_error": error}

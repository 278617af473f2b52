"""Degradations for super-resolution: what may have happened to a picture before it came to be so small.

x = JPEG((y * k) downscaled + n), the classical model (Wang et al. 2021, arXiv 2107.10833, section 3.1, Eq. 1): blur,
downscale, noise, compression, in this order and each by chance.
"""

from __future__ import annotations

import io

import numpy as np
import scipy.fft
from PIL import Image

KERNELS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
# How often each happens at full strength.
BLURRED = 0.8
NOISY = 0.8
COMPRESSED = 0.8
# Ranges at full strength: standard deviations in pixels of the large picture and in values of 0 to 255, JPEG quality.
BLUR = (0.2, 3.0)
NOISE = (1.0, 30.0)
QUALITY = (30, 95)


def degrade(picture: np.ndarray, factor: int, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Make a picture smaller as pictures on the web are, a pure function of the arguments.

    Args:
        picture: RGB (H, W, 3) uint8, H and W multiples of `factor`.
        factor: how much smaller, along each side.
        rng: all chance is from it.
        strength: 0 to 1; 0 is downscaled by a random kernel and nothing else, up to 1 more and more of the pictures
            are also blurred, noisy and compressed, and that by ever wider ranges.

    Returns:
        (H / factor, W / factor, 3) uint8.
    """
    height, width = picture.shape[:2]
    assert height % factor == 0 and width % factor == 0, f"{height} x {width} in steps of {factor}"
    if rng.random() < BLURRED * strength:
        sigmas = rng.uniform(BLUR[0], BLUR[0] + strength * (BLUR[1] - BLUR[0]), 2)
        if rng.random() < 0.5:
            sigmas[1] = sigmas[0]
        picture = blur(picture, sigmas, rng.uniform(0, np.pi))
    kernel = KERNELS[rng.integers(len(KERNELS))]
    small = np.array(Image.fromarray(picture).resize((width // factor, height // factor), kernel))
    if rng.random() < NOISY * strength:
        sigma = rng.uniform(NOISE[0], NOISE[0] + strength * (NOISE[1] - NOISE[0]))
        small = add_noise(small, sigma, rng, shot=rng.random() < 0.5, gray=rng.random() < 0.4)
    if rng.random() < COMPRESSED * strength:
        lowest = QUALITY[1] - strength * (QUALITY[1] - QUALITY[0])
        small = compress(small, round(rng.uniform(lowest, QUALITY[1])))
    return small


def blur(picture: np.ndarray, sigmas: np.ndarray, angle: float) -> np.ndarray:
    """Blur by a Gaussian, exactly: its Fourier transform is known, so no kernel is cut off and none is summed over.

    Args:
        picture: (H, W, 3) uint8, mirrored beyond its edges.
        sigmas: (2,), standard deviations in pixels along two axes; equal ones are an isotropic Gaussian.
        angle: of the first axis to the rows, in radians.

    Source: Wang et al. 2021, arXiv 2107.10833, section 3.1, Eqs. 2 and 3.
    """
    margin = [min(int(np.ceil(4 * max(sigmas))), side - 1) for side in picture.shape[:2]]
    padded = np.pad(picture.transpose(2, 0, 1).astype(np.float32), [(0, 0), *((m, m) for m in margin)], mode="reflect")
    size = [scipy.fft.next_fast_len(side, real=True) for side in padded.shape[1:]]
    y, x = np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])[None]
    along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    transfer = np.exp(-2 * np.pi**2 * ((sigmas[0] * along) ** 2 + (sigmas[1] * across) ** 2))
    spectrum = scipy.fft.rfft2(padded, size) * transfer.astype(np.float32)
    blurred = scipy.fft.irfft2(spectrum, size)[:, margin[0] :, margin[1] :]
    height, width = picture.shape[:2]
    return _to_bytes(blurred[:, :height, :width].transpose(1, 2, 0))


def add_noise(
    picture: np.ndarray, sigma: float, rng: np.random.Generator, *, shot: bool = False, gray: bool = False
) -> np.ndarray:
    """Add Gaussian noise to a picture (H, W, 3) uint8.

    Args:
        sigma: standard deviation, in values of 0 to 255.
        shot: let the variance grow with the light, from none in black to that of `sigma` in white, as it does where
            photons are counted (a Poisson distribution, by its Gaussian limit).
        gray: the same noise in all three channels.
    """
    noise = sigma * rng.standard_normal((*picture.shape[:2], 1 if gray else 3), dtype=np.float32)
    if shot:
        light = picture.mean(axis=2, keepdims=True) if gray else picture
        noise = noise * np.sqrt(light / 255)
    return _to_bytes(picture + noise)


def compress(picture: np.ndarray, quality: int) -> np.ndarray:
    """Return what JPEG of a quality of 1 to 95 leaves of a picture (H, W, 3) uint8."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=quality)
    with Image.open(buffer) as image:
        return np.array(image)


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return (values.clip(0, 255) + 0.5).astype(np.uint8)

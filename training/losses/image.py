"""Loss terms of the autoencoder, each a function of pictures; the one that needs a network is in `lpips`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def multiscale_gradient(prediction: Tensor, target: Tensor, scales: int = 3) -> Tensor:
    """Compare horizontal and vertical differences at several resolutions, so that edges stay sharp.

    Args:
        prediction, target: images (B, C, H, W).
        scales: resolutions, each half the one before.

    Returns:
        Mean absolute difference of the differences, summed over the scales; a scalar.

    Source: multi-scale gradient matching, Li and Snavely 2018, arXiv 1804.00607, Eq. 5 (here on pictures, not depth).
    """
    loss = prediction.new_zeros(())
    difference = prediction - target
    for scale in range(scales):
        if scale:
            if min(difference.shape[-2:]) < 4:
                break
            difference = F.avg_pool2d(difference, 2)
        loss = loss + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return loss


def ssim(prediction: Tensor, target: Tensor, window: int = 7) -> Tensor:
    """Return the mean structural similarity, 1 for equal pictures.

    Args:
        prediction, target: images (B, C, H, W) in [-1, 1].
        window: side of the averaging square in pixels, odd.

    Source: Wang et al. 2004, IEEE TIP 13(4), Eq. 13, with a uniform window.
    """
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    channels = prediction.shape[1]

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, window, stride=1)

    mu = mean(torch.cat([prediction, target], dim=1))  # (B, 2C, H', W')
    squares = mean(torch.cat([prediction**2, target**2, prediction * target], dim=1))  # (B, 3C, H', W')
    mu_p, mu_t = mu[:, :channels], mu[:, channels:]
    var_p = squares[:, :channels] - mu_p**2
    var_t = squares[:, channels : 2 * channels] - mu_t**2
    covariance = squares[:, 2 * channels :] - mu_p * mu_t
    similarity = ((2 * mu_p * mu_t + c1) * (2 * covariance + c2)) / ((mu_p**2 + mu_t**2 + c1) * (var_p + var_t + c2))
    return similarity.mean()


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of each image, for images (B, C, H, W) in [-1, 1]: (B,)."""
    error = (prediction.clamp(-1, 1) - target).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4.0 / error.clamp_min(1e-10))


class PatchDiscriminator(nn.Module):
    """Score overlapping patches as real or reconstructed.

    Images (B, 3, H, W) give scores (B, 1, H/4, W/4), each of a receptive field of 22 pixels.

    Source: Isola et al. 2017, arXiv 1611.07004, section 3.2.2.
    """

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, channels * 2, 4, stride=2, padding=1),
            nn.GroupNorm(8, channels * 2),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels * 2, 1, 3, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)  # (B, 1, H/4, W/4)


def discriminator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Return the hinge loss of the discriminator (Lim and Ye 2017, arXiv 1705.02894, Eq. 2)."""
    return 0.5 * (F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean())


def r1_penalty(discriminator: PatchDiscriminator, images: Tensor) -> Tensor:
    """Return how steep the scores of real pictures are; without a bound on it a discriminator outruns its generator.

    Args:
        images: real ones, (B, 3, H, W).

    Returns:
        Half the squared gradient of the scores by the pixels, over the number of scores; a scalar, in float32 whatever
        the precision of the run.

    Source: Mescheder et al. 2018, arXiv 1801.04406, Eq. 9 without gamma; each score is one of a sample of its own.
    """
    images = images.detach().requires_grad_()
    with torch.autocast(images.device.type, enabled=False):
        # Not its forward, which a run puts under autocast; and a view, as what counts FLOPs takes no leaf.
        scores = discriminator.layers(images.view_as(images))
        (slope,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return 0.5 * slope.square().sum() / scores.numel()


def adaptive_weight(
    reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor, average: Callable[[Tensor], Tensor]
) -> Tensor:
    """Balance the adversarial term by the gradients both send into the decoder's last layer.

    Args:
        average: makes the mean over all processes of a gradient.

    Source: Esser et al. 2021, arXiv 2012.09841, Eq. 7.
    """
    wanted = average(torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)[0]).norm()
    given = average(torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)[0]).norm()
    return (wanted / (given + 1e-4)).clamp(0, 1e4).detach()

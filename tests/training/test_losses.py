"""Autoencoder loss terms: zero or maximal where they should be, and each moves the weights."""

import pytest
import torch
from latentdiff.training.losses.image import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    multiscale_gradient,
    psnr,
    ssim,
)


def test_equal_pictures_have_no_gradient_loss_and_full_similarity() -> None:
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert multiscale_gradient(images, images) == 0
    assert ssim(images, images) == pytest.approx(1.0, abs=1e-5)


def test_gradient_term_sees_blur_that_l1_hardly_sees() -> None:
    checker = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1
    images = checker.expand(1, 3, 32, 32) * 0.1
    blurred = torch.zeros_like(images)
    assert multiscale_gradient(blurred, images) > 3 * (blurred - images).abs().mean()


def test_ssim_matches_scikit_image_with_a_uniform_window() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(1, 1, 24, 24, generator=generator) * 2 - 1
    second = first * 0.7 + 0.1 * torch.randn(1, 1, 24, 24, generator=generator)
    _, full = metrics.structural_similarity(
        first[0, 0].double().numpy(),
        second[0, 0].double().numpy(),
        win_size=7,
        data_range=2.0,
        use_sample_covariance=False,
        full=True,
    )
    assert ssim(second.double(), first.double()).item() == pytest.approx(full[3:-3, 3:-3].mean(), abs=1e-6)


def test_psnr_of_a_known_error() -> None:
    images = torch.zeros(1, 3, 8, 8)
    assert psnr(images + 0.2, images).item() == pytest.approx(20.0, abs=1e-3)


def test_discriminator_learns_to_tell_and_its_weight_balances_gradients() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(channels=8)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    real, fake = torch.ones(4, 3, 16, 16) * 0.5, -torch.ones(4, 3, 16, 16) * 0.5
    first = discriminator_loss(discriminator(real), discriminator(fake))
    for _ in range(20):
        optimizer.zero_grad()
        loss = discriminator_loss(discriminator(real), discriminator(fake))
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * first
    layer = torch.nn.Linear(2, 1)
    output = layer(torch.ones(1, 2)).sum()
    assert adaptive_weight(output, 0.1 * output, layer.weight, lambda gradient: gradient).item() == pytest.approx(
        10.0, rel=1e-2
    )

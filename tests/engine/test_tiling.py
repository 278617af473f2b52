"""Decoding in tiles: the pixels of decoding at once, no map larger than a tile, a model that stays as it is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from latentdiff import Pipeline
from latentdiff.checkpoints import embedded_model, load_autoencoder
from latentdiff.engine import tiled_decoding as tiling
from latentdiff.engine.tiled_decoding import _stages, decode, decode_tiled, needs_tiles
from latentdiff.errors import InputError
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.pixels import PixelSpace, PixelSpaceConfig
from tests.models.tiny import AUTOENCODERS, randomize, relative_error

ASSETS = Path(__file__).parents[2] / "assets"


def tiny(name: str = "no-attention") -> AutoencoderKL:
    model = AutoencoderKL(AutoencoderConfig.from_dict(AUTOENCODERS[name]))
    randomize(model)
    return model


def uneven_latents(model: AutoencoderKL, height: int = 21, width: int = 34, count: int = 1) -> Tensor:
    """Return latents whose tiles have statistics far apart."""
    noise = torch.randn(count, model.config.latent_channels, height, width, generator=torch.Generator().manual_seed(0))
    return noise * torch.linspace(0.1, 3, width) + torch.linspace(-2, 2, height)[:, None]


@pytest.mark.parametrize("name", AUTOENCODERS)
@pytest.mark.parametrize("tile", [5, 8, 32])
def test_tiles_change_no_more_than_rounding(name: str, tile: int) -> None:
    model = tiny(name)
    latents = uneven_latents(model)
    with torch.no_grad():
        whole = model.decode(latents)
        alone = model.decode(latents[:, :, :, :17])
    assert relative_error(decode_tiled(model, latents, tile), whole) < 1e-5
    assert relative_error(alone[:, :, :, :8], whole[:, :, :, :8]) > 0.1  # which statistics count, that is


def test_pictures_of_the_embedded_autoencoder() -> None:
    model = load_autoencoder(embedded_model())
    assert isinstance(model, AutoencoderKL)
    gallery = torch.from_numpy(np.array(Image.open(ASSETS / "gallery.png").convert("RGB")))
    with torch.no_grad():
        latents = model.encode(gallery[:128, :256].permute(2, 0, 1)[None] / 127.5 - 1).mode()
        whole = model.decode(latents)
    assert (decode_tiled(model, latents, 16) - whole).abs().max() / 2 < 0.001 / 255


def test_each_image_of_a_batch_has_its_own_statistics() -> None:
    model = tiny()
    latents = uneven_latents(model, count=2) * torch.tensor([1.0, 0.3]).reshape(2, 1, 1, 1)
    both = decode_tiled(model, latents, 8)
    assert torch.equal(both, torch.cat([decode_tiled(model, one, 8) for one in latents.split(1)]))


def test_layers_behind_the_middle_see_no_more_than_a_tile_and_its_halo(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sides = tiny(), []
    forward = nn.Conv2d.forward

    def watched(self: nn.Conv2d, x: Tensor) -> Tensor:
        sides.append(max(x.shape[2:]))
        return forward(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", watched)
    decode_tiled(model, uneven_latents(model, 40, 40), 8)
    assert max(sides) == 8 * 4 + 2 * 6  # 4 pixels for each latent; the finest stage reaches 6 pixels


def test_stages_are_all_layers_in_their_order() -> None:
    model = tiny()
    blocks = [(*block.resnets, *block.upsamplers) for block in model.decoder.up_blocks]
    assert [layer for stage in _stages(model) for layer in stage if layer in blocks[0] + blocks[1] + blocks[2]] == [
        layer for block in blocks for layer in block
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = tiny("stable-diffusion").to(dtype)
    latents = uneven_latents(model).to(dtype)
    tiled = decode_tiled(model, latents, 8)
    with torch.no_grad():
        whole = model.decode(latents)
        exact = model.float().decode(latents.float())
    assert tiled.dtype == dtype
    assert relative_error(tiled.float(), exact) < 2 * relative_error(whole.float(), exact)


def test_an_overflow_stays_visible() -> None:
    model = tiny()
    assert not decode_tiled(model, torch.full((1, 4, 16, 16), torch.inf), 8).isfinite().any()


def test_the_model_is_shared_by_threads_and_left_as_it_is() -> None:
    model = tiny()
    before = [*model.named_modules()], [*model.named_parameters()]
    several = [uneven_latents(model, *size) for size in ((20, 20), (21, 34), (34, 21))]
    alone = [decode_tiled(model, latents, 8) for latents in several]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda latents: decode_tiled(model, latents, 8), several))
    assert all(torch.equal(one, other) for one, other in zip(alone, together))
    assert all(
        name == other and one is another
        for then, now in zip(before, ([*model.named_modules()], [*model.named_parameters()]))
        for (name, one), (other, another) in zip(then, now)
    )


def test_what_needs_tiles() -> None:
    published = AutoencoderConfig(block_out_channels=(128, 256, 512, 512))
    assert not needs_tiles(published, 1024, 1024, torch.float32)
    assert needs_tiles(published, 1024, 1032, torch.float32)
    assert not needs_tiles(published, 1024, 1032, torch.float16)
    assert not needs_tiles(AutoencoderConfig(), 2048, 2048, torch.float32)


def test_tiles_are_used_when_wanted_or_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, used = tiny(), list[int]()
    latents = uneven_latents(model)

    def watched(autoencoder: AutoencoderKL, latents: Tensor, tile: int) -> Tensor:
        used.append(tile)
        return decode_tiled(autoencoder, latents, tile)

    monkeypatch.setattr(tiling, "decode_tiled", watched)
    decode(model, latents)
    assert used == []
    decode(model, latents, 8)
    decode(model, latents, large=1)
    assert used == [8, tiling.TILE]
    pixels = torch.zeros(1, 3, 64, 64)
    assert torch.equal(decode(PixelSpace(PixelSpaceConfig()), pixels, 8), pixels)


def test_a_pipeline_draws_the_same_in_tiles(built_model: Path, pipe: Pipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt", "height": 96, "width": 96}
    tiled = Pipeline.from_pretrained(built_model, device="cpu", tile_size=8)("cat", **options).images
    whole = pipe("cat", **options).images
    assert not torch.equal(tiled, whole)
    assert (tiled - whole).abs().max() < 1e-4
    with pytest.raises(InputError, match=r"tile_size must be .* got 4; try 32"):
        Pipeline.from_pretrained(built_model, device="cpu", tile_size=4)

"""What it takes to enlarge a picture: more for more, within bounds that were measured."""

from __future__ import annotations

from latentdiff.checkpoints import Components, load_pipeline
from latentdiff.engine.memory_estimate import RUNTIME, enlarging_bytes
from latentdiff.engine.tiled_denoising import make_windows


def need(components: Components, side: int, window: int = 32, batch: int = 2) -> float:
    """Return the megabytes of a picture of so many latents on each side."""
    assert components.unet is not None
    networks = [components.unet, components.autoencoder, components.text_encoder]
    windows = make_windows(side, side, (window, window), 4)
    return enlarging_bytes(networks, components.unet, components.autoencoder, windows, batch) / 2**20


def test_the_need_of_the_embedded_upscaler() -> None:
    """Measured (tests/benchmarks/upscale_cost.py, 1 step): 778, 955, 1624 and 1234 MB; the last is decoded in tiles."""
    components = load_pipeline("embedded-upscale")
    for side, measured in ((64, 778), (128, 955), (256, 1624), (512, 1234)):
        assert 0.9 * measured < need(components, side) < 1.6 * measured
    assert RUNTIME / 2**20 < need(components, 64) < need(components, 64, batch=8)
    assert need(components, 256, batch=16) < need(components, 256, window=256, batch=16)

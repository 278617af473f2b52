"""Decode in tiles and at once: seconds, memory, and how far the pictures are apart.

    python tests/benchmarks/tiled_decoding.py
    python tests/benchmarks/tiled_decoding.py --model stable-diffusion-1.5 --sizes 512 1024

Without --model the embedded autoencoder decodes the gallery, repeated and in places darkened until it fills the size;
a published shape (of random weights) decodes noise that grows from left to right. Every decode is a process of its own;
memory is what its largest resident size (VmHWM) is above the size before decoding. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from latentdiff.checkpoints import embedded_model, load_autoencoder
from latentdiff.engine.tiled_decoding import TILE, decode_tiled
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from tests.parity.published import AUTOENCODERS

EMBEDDED = "embedded"
GALLERY = Path(__file__).parents[2] / "assets" / "gallery.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED, choices=[EMBEDDED, *AUTOENCODERS])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="sides of the pictures in pixels")
    parser.add_argument("--tile", type=int, default=TILE, help="side of the tiles in latents")
    parser.add_argument("--decode", nargs=2, help=argparse.SUPPRESS)  # what the processes are called with
    arguments = parser.parse_args()
    autoencoder = load(arguments.model)
    if arguments.decode:
        decode(autoencoder, arguments.tile, *arguments.decode)
        return
    threads = torch.get_num_threads()
    print(f"{platform.machine()}, {threads} threads, torch {torch.__version__}, float32, {arguments.model}")
    figures = {}
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            np.save(f"{folder}/latents.npy", latents_of(autoencoder, arguments.model, size).numpy())
            runs = {
                name: run(arguments.model, tile, folder) for name, tile in (("whole", 0), ("tiled", arguments.tile))
            }
            whole, tiled = (np.load(f"{folder}/{tile}.npy") for tile in (0, arguments.tile))
        difference = float(np.abs(whole - tiled).max()) / 2  # on a scale of 0 to 1
        seconds, memory = (runs["tiled"][key] / runs["whole"][key] for key in ("seconds", "mb"))
        components = ", ".join(f"{name} {one['seconds']:.1f} s and {one['mb']:.0f} MB" for name, one in runs.items())
        print(f"{size} px: {components} ({seconds:.1f} x the time, {memory:.2f} x the memory);", end=" ")
        print(f"largest difference {255 * difference:.1e} / 255", flush=True)
        figures[str(size)] = {**runs, "max_abs_difference": difference}
    print(json.dumps({"model": arguments.model, "tile": arguments.tile, "threads": threads, "sizes": figures}))


def load(model: str) -> AutoencoderKL:
    if model == EMBEDDED:
        autoencoder = load_autoencoder(embedded_model())
        assert isinstance(autoencoder, AutoencoderKL)
        return autoencoder
    torch.manual_seed(0)
    return AutoencoderKL(AutoencoderConfig.from_dict(AUTOENCODERS[model])).eval()


@torch.no_grad()
def latents_of(autoencoder: AutoencoderKL, model: str, size: int) -> Tensor:
    """Return latents (1, C, h, w) of a picture that is not everywhere alike."""
    side = size // autoencoder.config.downsample_factor
    if model != EMBEDDED:
        noise = torch.randn(1, autoencoder.config.latent_channels, side, side)
        return noise * torch.linspace(0.2, 2, side)
    gallery = np.asarray(Image.open(GALLERY).convert("RGB"))
    height, width = gallery.shape[:2]
    picture = np.tile(gallery, (-(-size // height), -(-size // width), 1))[:size, :size]
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    pixels[:, :, height:] = pixels[:, :, height:] * 0.6 - 0.4
    return autoencoder.encode(pixels).mode()


def run(model: str, tile: int, folder: str) -> dict[str, float]:
    """Decode the latents in `folder` in a new process."""
    paths = [f"{folder}/latents.npy", f"{folder}/{tile}.npy"]
    command = [sys.executable, __file__, "--model", model, "--tile", str(tile), "--decode", *paths]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


@torch.no_grad()
def decode(autoencoder: AutoencoderKL, tile: int, source: str, target: str) -> None:
    """Decode once, at once where `tile` is 0; write the picture and print what it took."""
    latents = torch.from_numpy(np.load(source))
    before, begin = resident("VmRSS"), time.perf_counter()
    picture = decode_tiled(autoencoder, latents, tile) if tile else autoencoder.decode(latents)
    seconds, peak = time.perf_counter() - begin, resident("VmHWM")
    np.save(target, picture.numpy())
    print(json.dumps({"seconds": round(seconds, 2), "mb": round(peak - before)}))


def resident(field: str) -> float:
    """Return a size of this process in megabytes, from Linux' status file."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()

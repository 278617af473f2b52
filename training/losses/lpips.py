"""LPIPS: how different two pictures look, by the features of a network that was trained to tell what is on pictures.

The weights are in other packages; one file is made of them, once, where VGG16 can be fetched:

    pip install 'latentdiff[lpips]' && python -m latentdiff.training.losses.lpips lpips.safetensors
    latentdiff train configs/emoji-autoencoder.yaml --set loss.lpips=0.5 --set loss.lpips_weights=lpips.safetensors
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.checkpoints import read_header
from latentdiff.checkpoints.saver import save_tensors
from latentdiff.checkpoints.weights import FLOATS, read_weights, stored_weights
from latentdiff.errors import InputError, LatentDiffError, MissingDependencyError, ModelMismatchError

# Channels of VGG16's convolutions; a pooling stands between two blocks.
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Of the published metric: what channels in [-1, 1] are shifted and scaled by, to be what the network was trained on.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPS = 1e-8  # of a feature vector's squared length
HEADS = "functional/image/lpips_models/vgg.pth"  # in torchmetrics


class Lpips(nn.Module):
    """Compare pictures by VGG16's features, each channel weighed by how much people saw of its differences.

    Source: Zhang et al. 2018, arXiv 1801.03924, Eq. 1; Simonyan and Zisserman 2014, arXiv 1409.1556, table 1, D.
    """

    def __init__(self) -> None:
        super().__init__()
        inputs = (3, *(block[-1] for block in BLOCKS))
        self.blocks = nn.ModuleList(_convolutions(before, block) for before, block in zip(inputs, BLOCKS))
        self.heads = nn.ModuleList(nn.Conv2d(block[-1], 1, 1, bias=False) for block in BLOCKS)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Return the distance, (B,), of each of two batches of images (B, 3, H, W) in [-1, 1], of 16 pixels or more."""
        distance = reconstruction.new_zeros(len(reconstruction))
        for head, ours, theirs in zip(self.heads, self.features(reconstruction), self.features(images)):
            difference = _unit(ours) - _unit(theirs)
            distance = distance + head(difference.square()).mean(dim=(1, 2, 3))
        return distance

    def features(self, images: Tensor) -> list[Tensor]:
        """Return what each block makes of images (B, 3, H, W), after its last ReLU: (B, C, H / 2^i, W / 2^i)."""
        shift, scale = (images.new_tensor(values)[:, None, None] for values in (SHIFT, SCALE))
        x, found = (images - shift) / scale, []
        for number, block in enumerate(self.blocks):
            if number:
                x = F.max_pool2d(x, 2)
            x = block(x)
            found.append(x)
        return found


def _convolutions(before: int, channels: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in channels:
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
        before = width
    return nn.Sequential(*layers)


def _unit(features: Tensor) -> Tensor:
    """Scale the vector of channels at each place to length one."""
    return features * (features.square().sum(dim=1, keepdim=True) + EPS).rsqrt()


def load_lpips(file: Path, device: str | torch.device = "cpu") -> Lpips:
    """Return the network with the weights of a file; they are frozen, and gradients go through to the pictures.

    Raises:
        InputError: there is no such file.
        ModelLoadError: the file was refused; the subclass says why.
    """
    remedy = f"make it with `python -m latentdiff.training.losses.lpips {file}`, or set loss.lpips to 0"
    if not file.is_file():
        raise InputError(f"loss.lpips needs a file of weights, and {file} is none; {remedy}")
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


def convert(out: Path) -> None:
    """Write the file of weights that `load_lpips` reads.

    Raises:
        MissingDependencyError: torchvision or torchmetrics is not there.
        InputError: VGG16 cannot be fetched.
        StorageError: the file cannot be written.
    """
    spec = find_spec("torchmetrics")
    heads = Path(spec.origin).parent / HEADS if spec is not None and spec.origin is not None else None
    if heads is None or not heads.is_file() or find_spec("torchvision") is None:
        raise MissingDependencyError(
            "the weights of LPIPS come with torchmetrics and torchvision; `pip install 'latentdiff[lpips]'`"
        )
    # Pickles, of which only tensors are taken: one of an installed package, one that torchvision fetches and verifies.
    linear = torch.load(heads, map_location="cpu", weights_only=True)
    save_tensors(stored_weights(_named(_vgg16(), linear), torch.float32), out)


def _vgg16() -> dict[str, Tensor]:
    from torchvision.models import VGG16_Weights

    weights = VGG16_Weights.IMAGENET1K_V1
    try:
        return weights.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        place = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        raise InputError(
            f"VGG16 cannot be fetched ({error}); get its weights elsewhere and put them at {place}"
        ) from error


def _named(vgg16: dict[str, Tensor], linear: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights by their names here.

    Args:
        vgg16: torchvision's, whose layers are numbered: convolutions and their ReLUs in turn, poolings between blocks.
        linear: those of the published heads.
    """
    weights, number = {}, 0
    for block, channels in enumerate(BLOCKS):
        for layer in range(0, 2 * len(channels), 2):
            for leaf in ("weight", "bias"):
                weights[f"blocks.{block}.{layer}.{leaf}"] = vgg16[f"features.{number + layer}.{leaf}"]
        number += 2 * len(channels) + 1
        weights[f"heads.{block}.weight"] = linear[f"lin{block}.model.1.weight"]
    return weights


def main() -> int:
    """Make the file that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="safetensors file to write")
    try:
        convert(parser.parse_args().out)
    except LatentDiffError as error:
        print(f"latentdiff: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

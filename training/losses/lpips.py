"""Make the file of weights that LPIPS needs, of what other packages have; the network is `latentdiff.models.lpips`.

Once, where VGG16 can be fetched:

    pip install 'latentdiff[lpips]' && python -m latentdiff.training.losses.lpips lpips.safetensors
    latentdiff train configs/emoji-autoencoder.yaml --set loss.lpips=0.5 --set loss.lpips_weights=lpips.safetensors
    latentdiff evaluate embedded --data pictures --metrics lpips --lpips-weights lpips.safetensors
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.checkpoints.saver import save_tensors
from latentdiff.checkpoints.weights import stored_weights
from latentdiff.errors import InputError, LatentDiffError, MissingDependencyError
from latentdiff.models.lpips import BLOCKS

HEADS = "functional/image/lpips_models/vgg.pth"  # in torchmetrics


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

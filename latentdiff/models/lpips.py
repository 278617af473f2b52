"""LPIPS: how different two pictures look, by the features of a network that was trained to tell what is on pictures."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Lpips"]

# Channels of VGG16's convolutions; a pooling stands between two blocks.
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Of the published metric: what channels in [-1, 1] are shifted and scaled by, to be what the network was trained on.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPS = 1e-8  # of a feature vector's squared length


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

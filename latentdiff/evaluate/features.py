"""Networks that turn pictures into features, behind one small interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.errors import InputError, shown, suggest
from latentdiff.evaluate.intervals import Floats

__all__ = ["FEATURES", "FeatureNetwork", "features_of", "find_features"]

IMAGES_AT_ONCE = 64


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that turns pictures into features.

    Attributes:
        name: how protocols call it.
        digest: of its weights.
        resize: how pictures are brought to its size, with the filter: "bilinear antialiased to 64".
        network: images (B, 3, H, W) in [-1, 1] -> (B, D).
    """

    name: str
    digest: str
    resize: str
    network: Callable[[Tensor], Tensor]

    @property
    def protocol(self) -> dict[str, str]:
        """What values depend on."""
        return {"features": self.name, "features_hash": self.digest, "resize": self.resize}


def image_text_features(model: Any = None, device: str | torch.device = "cpu") -> FeatureNetwork:
    """Return the features of the image-text model that ships with the package, or of another folder."""
    from latentdiff.evaluate.judge import load_judge

    judge = load_judge(model, device)
    side = judge.model.config.image_size
    return FeatureNetwork("image-text", judge.digest, f"bilinear antialiased to {side}", judge.model.features)


FEATURES: dict[str, Callable[..., FeatureNetwork]] = {"image-text": image_text_features}
"""Name -> (what follows ":" in the choice, or None, device) -> the network."""


def find_features(choice: str, device: str | torch.device = "cpu") -> FeatureNetwork:
    """Return a feature network by name, "dinov2", or with a model of that kind, "dinov2:folder".

    Raises:
        InputError: there is none of that name.
        MissingDependencyError: a package that it needs is not installed.
    """
    name, _, model = choice.partition(":")
    if name not in FEATURES:
        raise InputError(f"features {shown(name)} are unknown{suggest(name, FEATURES)}")
    return FEATURES[name](model or None, device)


@torch.no_grad()
def features_of(images: Tensor, network: FeatureNetwork) -> Floats:
    """Return the features (N, D) of images (N, 3, H, W) in [-1, 1].

    Raises:
        InputError: one is not finite.
    """
    parts = [network.network(part).float().cpu() for part in images.split(IMAGES_AT_ONCE)]
    found: Floats = torch.cat(parts).double().numpy()
    if not np.isfinite(found).all():
        raise InputError(f"features of {network.name} are not finite; look at the pictures")
    return found

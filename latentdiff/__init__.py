"""latentdiff: latent text-to-image diffusion, from captioned drawings to pictures, in one small codebase.

`from latentdiff import Pipeline` is all most programs need. Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentdiff.checkpoints import load_pipeline, save_pipeline
    from latentdiff.diffusion import SAMPLERS
    from latentdiff.errors import (
        InputError,
        LatentDiffError,
        MissingDependencyError,
        ModelConfigError,
        ModelFormatError,
        ModelLoadError,
        ModelMismatchError,
        ModelPathError,
        ModelValueError,
        StorageError,
        UnsafeModelError,
    )
    from latentdiff.generation.request import Settings
    from latentdiff.generation.result import GeneratedImage, Result
    from latentdiff.pipeline import Pipeline

__all__ = [
    "SAMPLERS",
    "GeneratedImage",
    "InputError",
    "LatentDiffError",
    "MissingDependencyError",
    "ModelConfigError",
    "ModelFormatError",
    "ModelLoadError",
    "ModelMismatchError",
    "ModelPathError",
    "ModelValueError",
    "Pipeline",
    "Result",
    "Settings",
    "StorageError",
    "UnsafeModelError",
    "__version__",
    "load_pipeline",
    "save_pipeline",
]

__version__ = "0.1.0"

# Where public names that are not errors come from; each is imported when it is first asked for.
HOMES = {
    "SAMPLERS": "latentdiff.diffusion",
    "GeneratedImage": "latentdiff.generation.result",
    "Pipeline": "latentdiff.pipeline",
    "Result": "latentdiff.generation.result",
    "Settings": "latentdiff.generation.request",
    "load_pipeline": "latentdiff.checkpoints",
    "save_pipeline": "latentdiff.checkpoints",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(HOMES.get(name, "latentdiff.errors")), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""What a run is measured by while it trains: the section `evaluate`, and whether it fits the stage."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from latentdiff.errors import suggest

from .sections import Section, TextPath

Better = Literal["lower", "higher"]

# Metrics of `latentdiff.evaluate`, each with the figures of it that a best checkpoint can be chosen by.
OF_PICTURES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "fid": ("fid", "fid_infinite"),
        "kid": ("kid",),
        "mmd": ("mmd",),
        "precision_recall": ("precision", "recall"),
        "clip": ("clip",),
        "retrieval": ("retrieval_top1", "retrieval_top5"),
        "neighbours": ("neighbours",),
    }
)
# The same by what a model draws from, with those that are of one task alone.
OF_TASKS: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "text_to_image": {**OF_PICTURES, "nll": ("nll/ode",), "compose": ("compose",)},
        "inpaint": {**OF_PICTURES, "inpainting": ("inpainting/psnr",)},
        "upscale": {
            **OF_PICTURES,
            "upscaling": tuple(f"upscaling/{name}" for name in ("psnr", "ssim", "degraded_psnr", "degraded_ssim")),
        },
    }
)
OF_AUTOENCODERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"rfid": ("rfid",), "psnr": ("psnr",), "ssim": ("ssim",), "lpips": ("lpips",)}
)
# What the log has of held-out pictures, and which values are better.
HELD_OUT: Mapping[str, Better] = MappingProxyType({"held_out/loss": "lower", "held_out_psnr": "higher"})
NOT_OF_STAGE = "is not measured while training; leave it to latentdiff evaluate"


class EvaluateConfig(Section):
    """What is measured of the averaged weights while training, and what of it decides."""

    # Steps between two evaluations, the last step being one too; 0 for none.
    every: int = Field(0, ge=0)
    # Of `latentdiff.evaluate`, besides the held-out values of the log; of all of them a report is written at the end.
    metrics: list[str] = Field([])
    # Held-out pictures that each metric takes, fewer where there are fewer.
    n: int = Field(100, ge=2, le=1_000_000)
    # Network of distances: image-text, efficientnet-lite0, inception, dinov2 or clip, and a folder may follow a colon;
    # or latents, those of the model's autoencoder.
    features: str = "image-text"
    # Folder of the image-text model that clip, retrieval and compose ask; that of the package when null.
    judge: TextPath | None = None
    # Value whose best step is kept in best/ of the run: held_out/loss, held_out_psnr, or a figure of the metrics.
    keep_best: str | None = None
    # Evaluations in a row without a better value after which the run ends; 0 for none.
    patience: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse what does not go together."""
        if len({*self.metrics}) < len(self.metrics):
            raise ValueError("evaluate.metrics names one twice; leave that out")
        if self.patience and self.keep_best is None:
            raise ValueError("evaluate.patience waits for a better value; name it as evaluate.keep_best")
        if self.keep_best is not None and not self.every:
            raise ValueError("evaluate.keep_best chooses among evaluations; set evaluate.every above 0")
        return self


def check_evaluate(evaluate: EvaluateConfig, metrics: Mapping[str, Collection[str]], held_out: str) -> None:
    """Raise ValueError where a stage has no metric or value of a name.

    Args:
        metrics: the metrics of the stage with the names of their figures.
        held_out: name of what the stage measures by itself.
    """
    for name in evaluate.metrics:
        if name in metrics:
            continue
        if any(name in others for others in (*OF_TASKS.values(), OF_AUTOENCODERS)):
            reason = "does not change in this stage, or needs pictures that it does not draw"
            raise ValueError(f"evaluate.metrics: {name} {reason}; leave it out")
        if name in ("memorised", "speed"):
            raise ValueError(f"evaluate.metrics: {name} {NOT_OF_STAGE}")
        raise ValueError(f"evaluate.metrics: {name[:80]!r} is unknown{suggest(name, metrics)}")
    measured = [held_out, *(figure for name in evaluate.metrics for figure in metrics[name])]
    best = evaluate.keep_best
    if best is not None and best not in measured:
        parent = next((name for name, figures in metrics.items() if best in figures), None)
        remedy = suggest(best, measured) if parent is None else f"; add {parent} to evaluate.metrics"
        raise ValueError(f"evaluate.keep_best: {best[:80]!r} is not measured{remedy}")

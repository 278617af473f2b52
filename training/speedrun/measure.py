"""Measure the model of a speedrun, by held-out pictures, or by those it was trained on where they are few."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from latentdiff.checkpoints import EMBEDDED, load_pipeline
from latentdiff.checkpoints.components import moved
from latentdiff.errors import InputError
from latentdiff.evaluate.evaluation import Evaluation, Reference, Request
from latentdiff.evaluate.features import LATENTS, FeatureNetwork
from latentdiff.evaluate.figure import Figure
from latentdiff.evaluate.judge import load_judge
from latentdiff.evaluate.latents import has_latents, latent_features
from latentdiff.evaluate.matching import label_of
from latentdiff.evaluate.run import evaluate
from latentdiff.pipeline import Pipeline

from ..config import DiffusionTraining
from ..data.dataset import load_images, open_held_out
from ..monitor.evaluation import LEAST, reference_of

FOLDER = "evaluation"
MOST = 1000  # real pictures that are measured by
DIFFERENT = 8  # captions, below which to find the own one among them says little


def open_reference(config: DiffusionTraining, folder: Path) -> Reference:
    """Return held-out pictures to measure by, or those that were trained on where none are held out."""
    cache = folder / "cache"
    held_out = open_held_out(config.data, cache, MOST)
    if held_out is not None and len(held_out) >= LEAST:
        return reference_of(config.data, "validation", held_out)
    return reference_of(config.data, "train", load_images(config.data, "train", cache, MOST))


def metrics_of(reference: Reference, emoji: bool, reads_text: bool) -> list[str]:
    """Return what can be measured by some real pictures, here; nothing where they are too few.

    Args:
        emoji: whether the image-text model of the package knows them.
        reads_text: whether pictures have captions.
    """
    if len(reference) < LEAST:
        return []
    labels = {label_of(row) for row in reference.rows}
    if not reads_text or len(labels) < DIFFERENT:
        return ["kid"]
    return ["kid", "neighbours", *(["retrieval"] if emoji and _is_judged() else [])]


def _is_judged() -> bool:
    """Say whether this copy of the package came with an image-text model."""
    try:
        load_judge()
    except InputError:
        return False
    return True


def measure_model(
    config: DiffusionTraining,
    folder: Path,
    reference: Reference,
    metrics: list[str],
    n: int,
    device: torch.device,
) -> list[Figure]:
    """Return figures of the model in a speedrun's folder, and write their report beside it.

    Args:
        n: pictures of each metric.

    Raises:
        InputError: what it draws cannot be measured.
        StorageError: the report cannot be written.
    """
    settings = {"guidance_scale": config.samples.guidance_scale}
    request = Request(folder / FOLDER, n=n, settings=settings, features=LATENTS, progress=sys.stderr.isatty())
    pipe = Pipeline.from_pretrained(folder / "model", device=device)
    evaluation = Evaluation(request, pipe, {"test": reference})
    if not has_latents(pipe.components):
        evaluation.network = embedded_latents(device)
    _, figures = evaluate(evaluation, metrics)
    return figures


def embedded_latents(device: torch.device) -> FeatureNetwork:
    """Return the latents of the embedded autoencoder as features, of pictures that are drawn without latents."""
    found = latent_features(moved(load_pipeline(EMBEDDED), device))
    return replace(found, name="latents of the embedded autoencoder")

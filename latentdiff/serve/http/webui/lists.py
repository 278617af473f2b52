"""Lists of what there is, as clients of the web UI read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentdiff.checkpoints.header import read_header
from latentdiff.errors import ModelLoadError
from latentdiff.serve.http.models import Models
from latentdiff.serve.http.webui.extras import LARGER

__all__ = ["list_embeddings", "list_loras", "list_upscalers"]


def list_upscalers(models: Models) -> list[dict[str, Any]]:
    """Return interpolation, and the models that enlarge."""
    scales = dict.fromkeys(LARGER, 4)
    scales |= {
        name: pipe.components.autoencoder.config.downsample_factor
        for name, pipe in models.pipes.items()
        if pipe.components.upscales
    }
    return [
        {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": scale}
        for name, scale in scales.items()
    ]


def list_loras(models: Models) -> list[dict[str, Any]]:
    """Return the LoRAs that prompts may name, with what their files say of them."""
    return [
        {"name": name, "alias": name, "path": file.name, "metadata": _metadata(file)}
        for name, file in models.loras.files().items()
    ]


def _metadata(file: Path) -> dict[str, str]:
    try:
        return dict(read_header(file).metadata)
    except ModelLoadError:  # which naming it in a prompt will say
        return {}


def list_embeddings(models: Models) -> dict[str, Any]:
    """Return the learned words of the models."""
    words = {str(one["word"]) for pipe in models.pipes.values() for one in pipe.components.embeddings}
    plain = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None}
    return {"loaded": dict.fromkeys(sorted(words), plain), "skipped": {}}

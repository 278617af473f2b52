"""Model files: read with every check, written for diffusers to read. Only safetensors and JSON are ever opened."""

from __future__ import annotations

from latentdiff.checkpoints.components import Components, Encoders, ModelSource
from latentdiff.checkpoints.find import EMBEDDED, embedded_model, find_model
from latentdiff.checkpoints.header import Header, TensorInfo, read_header
from latentdiff.checkpoints.loader import load_schedule
from latentdiff.checkpoints.read import load_autoencoder, load_pipeline, load_text_encoder
from latentdiff.checkpoints.saver import save_model, save_pipeline

__all__ = [
    "EMBEDDED",
    "Components",
    "Encoders",
    "Header",
    "ModelSource",
    "TensorInfo",
    "embedded_model",
    "find_model",
    "load_autoencoder",
    "load_pipeline",
    "load_schedule",
    "load_text_encoder",
    "read_header",
    "save_model",
    "save_pipeline",
]

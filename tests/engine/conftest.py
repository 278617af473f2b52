"""Conversions that take no time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentdiff import Pipeline
from latentdiff.engine import openvino_engine
from latentdiff.engine.graphs import DecoderGraph, EncoderGraph, TextsGraph, UNetGraph
from latentdiff.engine.openvino_engine import GRAPH, TEXTS, OpenVINO, core
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.bert import BertModel


@pytest.fixture
def read_at_once(pipe: Pipeline, converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion of the tiny model is read from those that are there, since making one takes long."""
    engine, components = OpenVINO(torch.float32), pipe.components
    assert isinstance(components.autoencoder, AutoencoderKL) and isinstance(components.text_encoder, BertModel)
    unet = engine.graphs(pipe.unet)
    files = {
        DecoderGraph: engine.graphs(components.autoencoder)[GRAPH].file,
        EncoderGraph: engine.graphs(components.text_encoder)[GRAPH].file,
        UNetGraph: unet[GRAPH].file,
        TextsGraph: unet[TEXTS].file,
    }
    monkeypatch.setattr(openvino_engine, "convert", lambda traced: core().read_model(files[type(traced.network)]))

"""OpenVINO's conversion of the tiny model, which is made once for all tests that need it."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from latentdiff import Pipeline
from latentdiff.engine import openvino_engine
from latentdiff.engine.conversions import CACHE
from latentdiff.engine.graphs import DecoderGraph, EncoderGraph, TextsGraph, UNetGraph
from latentdiff.engine.openvino_engine import GRAPH, TEXTS, OpenVINO, core
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.bert import BertModel
from tests.needs import leave_out


@pytest.fixture(scope="session")
def conversions(built_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of conversions with those of the tiny model."""
    if find_spec("openvino") is None:
        leave_out("needs openvino, which the extra openvino installs")
    folder = tmp_path_factory.mktemp("conversions")
    with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        patched.setenv(CACHE, str(folder))
        Pipeline.from_pretrained(built_model, device="cpu", engine="openvino").make_ready()
    texts = [str(one.message) for one in said]
    assert [text for text in texts if "converting" in text] == [
        f"converting {what} for OpenVINO, once; this takes a while"
        for what in ("the U-Net", "the decoder", "the text encoder")
    ]
    return folder


@pytest.fixture
def converted(conversions: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder, in use."""
    monkeypatch.setenv(CACHE, str(conversions))
    return conversions


@pytest.fixture
def read_at_once(pipe: Pipeline, converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What of the tiny model is converted anew is read from its conversions, since that takes long."""
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

"""OpenVINO's conversion of the tiny model, which is made once for all tests that need it."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

from latentdiff import Pipeline
from latentdiff.engine.conversions import CACHE
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

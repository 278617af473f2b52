"""A whole model of a few thousand random weights, in the layout of a real one, for every test that needs one."""

from __future__ import annotations

import os
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from latentdiff import Pipeline
from latentdiff.checkpoints import Components, save_pipeline
from latentdiff.diffusion import NoiseSchedule
from latentdiff.engine.conversions import CACHE
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.bert import BertConfig, BertModel
from latentdiff.models.tokenizer import Tokenizer
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from tests.models.tiny import BERT, write_bert_vocabulary
from tests.needs import leave_out

UNET = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
AUTOENCODER = {"block_out_channels": [8, 8, 16], "norm_num_groups": 4, "scaling_factor": 0.5, "sample_size": 32}


def build_model(place: Path) -> Path:
    """Write a model folder in float32, `tiny`: pictures of 32 x 32 from latents (4, 8, 8), windows of 8 tokens."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        networks = (
            UNet2DConditionModel(UNetConfig.from_dict(UNET)),
            AutoencoderKL(AutoencoderConfig.from_dict(AUTOENCODER)),
            BertModel(BertConfig.from_dict({**BERT, "vocab_size": 256, "use_attention_mask": True})),
        )
        for parameter in (parameter for network in networks for parameter in network.parameters()):
            if parameter.ndim > 1 and not parameter.any():  # the layers that start at zero
                parameter.normal_(std=0.1)
        networks[1].decoder.conv_out.weight *= 4  # contrast
    schedule = NoiseSchedule(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    tokenizer = Tokenizer.from_folder(write_bert_vocabulary(place / "vocabulary"))
    save_pipeline(
        Components(
            unet=networks[0], autoencoder=networks[1], text_encoder=networks[2], tokenizer=tokenizer, schedule=schedule
        ),
        place / "tiny",
        dtype=None,
    )
    return place / "tiny"


@pytest.fixture(scope="session")
def built_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model, which is not to be changed; see `build_model`."""
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model_folder(built_model: Path, tmp_path: Path) -> Path:
    """A copy of the model folder that a test may damage."""
    return shutil.copytree(built_model, tmp_path / "model")


@pytest.fixture(scope="session")
def pipe(built_model: Path) -> Pipeline:
    """The model, loaded."""
    return Pipeline.from_pretrained(built_model, device="cpu")


@pytest.fixture(scope="session")
def conversions(built_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OpenVINO's conversions of the tiny model, which are made once for all processes that run tests."""
    if find_spec("openvino") is None:
        leave_out("needs openvino, which the extra openvino installs")
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "conversions"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _convert(built_model, folder)
    return folder


def _convert(built_model: Path, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        patched.setenv(CACHE, str(folder))
        Pipeline.from_pretrained(built_model, device="cpu", engine="openvino").make_ready()
    texts = [str(one.message) for one in said]
    assert [text for text in texts if "converting" in text] == [
        f"converting {what} for OpenVINO, once; this takes a while"
        for what in ("the U-Net", "the decoder", "the text encoder")
    ]


@pytest.fixture
def converted(conversions: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Those conversions, in use."""
    monkeypatch.setenv(CACHE, str(conversions))
    return conversions

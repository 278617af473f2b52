"""What counts for the hash of a model: not what other programs are told beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from latentdiff import Pipeline
from latentdiff.checkpoints import embedded_model, load_pipeline, save_pipeline
from latentdiff.checkpoints.hashes import model_hash
from latentdiff.checkpoints.inspect import describe_folder

# As pictures have them that were drawn before the text encoder's config.json said what it is to be computed in.
EMBEDDED = {
    "embedded": "868aff66eda076be0c58dffd39f6724387e5d96559201fae2e8d2d764ccfe96e",
    "embedded-inpaint": "252555b4b2837db9159389ea32dadc5b36af18da480fd2c8e009913afacdb687",
    "embedded-upscale": "79d68faefc7367253c386257ca4081aca4092c81d131082e55689aaf0d122b29",
}


@pytest.mark.parametrize("name", list(EMBEDDED))
def test_pictures_of_the_embedded_models_can_still_be_drawn_again(name: str) -> None:
    assert model_hash(embedded_model(name)) == EMBEDDED[name]
    assert json.loads((embedded_model() / "text_encoder" / "config.json").read_text())["dtype"] == "float32"


def test_only_our_own_entry_does_not_count(pipe: Pipeline, tmp_path: Path) -> None:
    save_pipeline(pipe.components, tmp_path / "half", torch.float16)
    config = tmp_path / "half" / "text_encoder" / "config.json"
    text = config.read_text()
    assert text.startswith('{\n  "dtype": "float32",\n  "')
    before = load_pipeline(tmp_path / "half").model_hash
    config.write_text(text.replace('\n  "dtype": "float32",', "", 1))
    assert load_pipeline(tmp_path / "half").model_hash == before
    config.write_text(text.replace('"float32"', '"float16"', 1))
    assert load_pipeline(tmp_path / "half").model_hash == before
    config.write_text(text.replace('"hidden_act": "gelu"', '"hidden_act": "gelu_new"'))
    assert model_hash(tmp_path / "half") != before
    save_pipeline(pipe.components, tmp_path / "whole", None)
    assert "dtype" not in json.loads((tmp_path / "whole" / "text_encoder" / "config.json").read_text())
    assert "dtype" not in json.loads((tmp_path / "half" / "unet" / "config.json").read_text())


@pytest.mark.parametrize(("version", "side"), [("0.6.0", 64), ("0.8.1", 64), ("0.9.0", 8), ("0.31.0", 8), ("", 8)])
def test_old_folders_draw_at_the_size_that_diffusers_draws_at(model_folder: Path, version: str, side: int) -> None:
    path = model_folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_diffusers_version": version}))
    unet = load_pipeline(model_folder).unet
    assert unet is not None and unet.config.sample_size == side
    assert describe_folder(model_folder)["image_size"] == 4 * side

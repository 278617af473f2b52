"""OpenCLIP's own checkpoints, tiny and with random weights: the numbers of OpenCLIP, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from latentdiff.checkpoints import load_text_encoder
from latentdiff.checkpoints.openclip import load_open_clip
from latentdiff.errors import InputError, MissingDependencyError, ModelConfigError, ModelMismatchError
from latentdiff.models.encoding import TokenStates

open_clip = pytest.importorskip("open_clip", reason="needs OpenCLIP", exc_type=ImportError)

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3}
VISION = {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8}
TEXTS = ["a photo of a red fox", "", "zorilla, on grass!"]


def write(folder: Path, *, custom: bool = False, **config: Any) -> Any:
    """A model of OpenCLIP in the folder, as on the hub; returns the model."""
    torch.manual_seed(0)
    shape = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT, **config}
    model = (open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP)(**shape).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": {}}))
    return model


@pytest.mark.parametrize("options", [{}, {"custom": True}, {"quick_gelu": True}])
def test_states_and_pooled_vectors_are_those_of_openclip(tmp_path: Path, options: dict[str, Any]) -> None:
    model = write(tmp_path / "model", **options)
    encoder, tokenizer = load_text_encoder(tmp_path / "model")
    ids = open_clip.tokenizer.SimpleTokenizer()(TEXTS)
    assert torch.equal(tokenizer(TEXTS).input_ids, ids)
    last = {}
    norm = (model.text if options.get("custom") else model).ln_final
    norm.register_forward_hook(lambda module, inputs, output: last.update(before=inputs[0], after=output))
    with torch.no_grad():
        pooled = model.encode_text(ids)
    encoded = TokenStates(encoder, tokenizer)(TEXTS)
    torch.testing.assert_close(torch.stack([one.pooled for one in encoded]), pooled, rtol=1e-5, atol=1e-5)
    states = torch.cat([one.states for one in encoded])
    torch.testing.assert_close(states, last["after"], rtol=1e-5, atol=1e-5)


def test_a_file_needs_the_name_of_its_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write(tmp_path / "model")
    file = tmp_path / "model" / "open_clip_model.safetensors"
    with pytest.raises(InputError, match='pass its OpenCLIP name, as in architecture="ViT-H-14"'):
        load_open_clip(file)
    with pytest.raises(InputError, match="no model 'ViT-H-15'; did you mean 'ViT-H-1"):
        load_open_clip(file, "ViT-H-15")
    with pytest.raises(ModelMismatchError, match=r"is F32 \[49408, 16\] instead of \[49408, 512\]"):
        load_open_clip(file, "ViT-B-32")
    config = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config)
    encoder, _ = load_open_clip(file, "ours")
    assert torch.equal(encoder.text_projection.weight, model.text_projection.T)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingDependencyError, match=r"pip install latentdiff\[openclip\]"):
        load_open_clip(file, "ours")


def test_text_towers_of_another_kind_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "model")
    config = {"embed_dim": 8, "text_cfg": {"hf_model_name": "roberta-base"}}
    (tmp_path / "model" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(ModelConfigError, match=r"is not CLIP's own \(it has hf_model_name\)"):
        load_text_encoder(tmp_path / "model")
    (tmp_path / "model" / "open_clip_config.json").write_text("{}")
    with pytest.raises(ModelConfigError, match="expected a configuration of OpenCLIP with text_cfg, got none"):
        load_text_encoder(tmp_path / "model")

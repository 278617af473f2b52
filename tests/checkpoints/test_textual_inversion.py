"""Learned words: drawn with, recorded, replayed, saved; and what diffusers draws with the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from latentdiff import Pipeline
from latentdiff.checkpoints import save_pipeline
from latentdiff.checkpoints.textual_inversion import TABLES
from latentdiff.cli import main
from latentdiff.errors import InputError, ModelLoadError, ModelMismatchError, UnsafeModelError
from latentdiff.generation.result import read_record
from tests.checkpoints.test_single_file import components_of, tiny

SETTINGS: dict[str, Any] = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "pt"}


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """An embedding of three vectors in the form of the web UI."""
    torch.manual_seed(0)
    save_file({"emb_params": torch.randn(3, 16)}, tmp_path / "foxtoy.safetensors")
    return tmp_path / "foxtoy.safetensors"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline(components_of(tiny("Stable Diffusion 1.x")))


@pytest.mark.parametrize("family", ["Stable Diffusion 1.x", "Stable Diffusion 2.x"])
@pytest.mark.parametrize("form", ["diffusers", "diffusers, one vector", "webui"])
def test_same_picture_as_in_diffusers(tmp_path: Path, family: str, form: str) -> None:
    pipe = Pipeline(components_of(tiny(family)))
    pipe.save_pretrained(tmp_path / "model")
    vectors = 3 * torch.randn(16) if "one" in form else 3 * torch.randn(4, 16)
    file = tmp_path / "foxtoy.safetensors"
    save_file({"emb_params" if form == "webui" else "<fox>": vectors}, file)
    word = "foxtoy" if form == "webui" else "<fox>"
    peer = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "model", torch_dtype=torch.float32, local_files_only=True
    )
    peer.load_textual_inversion(str(file), token=word, local_files_only=True)
    peer.scheduler = diffusers.DDIMScheduler.from_config(peer.scheduler.config)
    peer.set_progress_bar_config(disable=True)
    prompt = f"a photo of a {word}, {word} on grass"
    expected = peer(prompt, generator=torch.Generator().manual_seed(3), **SETTINGS).images
    learned = pipe.with_embedding(file)
    drawn = learned(prompt, seed=3, sampler="ddim", **SETTINGS).images
    assert (drawn - expected).abs().max() <= 2 / 255
    states = peer.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(learned.components.prompt_encoder([prompt])[0].states, states, rtol=0, atol=1e-5)
    assert not torch.allclose(pipe.components.prompt_encoder([prompt])[0].states, states, rtol=0, atol=0.1)
    assert learned.components.unet is pipe.components.unet


def test_both_encoders_of_xl_learn_it(tmp_path: Path) -> None:
    components = components_of(tiny("Stable Diffusion XL"))
    pipe, file = Pipeline(components), tmp_path / "foxtoy.safetensors"
    save_file({"clip_l": torch.randn(2, 16), "clip_g": torch.randn(2, 16)}, file)
    learned = pipe.with_embedding(file)
    count = len(components.tokenizer)  # type: ignore[arg-type]
    for encoder, words in (
        (learned.components.text_encoder, learned.components.tokenizer),
        (learned.components.text_encoder_2, learned.components.tokenizer_2),
    ):
        assert words is not None and encoder is not None
        assert words(["a foxtoy"]).input_ids[0, 2:5].tolist() == [count, count + 1, 49407]
        assert len(encoder.state_dict()["text_model.embeddings.token_embedding.weight"]) == count + 2
    assert learned("a foxtoy", **SETTINGS).token_counts == [5]
    refiner = Pipeline(components_of(tiny("Stable Diffusion XL refiner")))
    assert len(refiner.with_embedding(file).components.tokenizer) == count + 2  # type: ignore[arg-type]


def test_words_of_a_saved_model_are_still_there(pipe: Pipeline, one: Path, tmp_path: Path) -> None:
    """In our folder and in diffusers' pipeline of it; a LoRA taken out leaves them where they are."""
    learned = pipe.with_embedding(one).with_loras({}).with_embedding(one, "toyfox")
    plain = learned("a foxtoy and toyfox", **SETTINGS)
    assert plain.token_counts == [2 + 2 + 3 + 3]
    learned.save_pretrained(tmp_path / "model")
    again = Pipeline.from_pretrained(tmp_path / "model", device="cpu")
    torch.testing.assert_close(again("a foxtoy and toyfox", **SETTINGS).images, plain.images, rtol=1e-3, atol=1e-3)
    peer = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    count = len(pipe.components.tokenizer)  # type: ignore[arg-type]
    assert peer.tokenizer.convert_tokens_to_ids(["foxtoy", "foxtoy_1", "toyfox_2"]) == [count, count + 1, count + 5]


def test_bert_learns_words_too(built_model: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(built_model, device="cpu")
    save_file({"<fox>": torch.randn(16)}, tmp_path / "a.safetensors")
    learned = pipe.with_embedding(tmp_path / "a.safetensors", "<zorilla>")
    assert learned("a <zorilla>", num_inference_steps=2).token_counts == [4]
    learned.save_pretrained(tmp_path / "model")
    again = Pipeline.from_pretrained(tmp_path / "model", device="cpu")
    assert again("a <zorilla>", num_inference_steps=2).token_counts == [4]


def test_command_line_and_replay(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pipeline(components_of(tiny("Stable Diffusion 1.x")), "model", dtype=None)
    call = ["generate", "a toy", "--model", "model", "--steps", "2", "--size", "32x32", "-o", "a.png", "--json"]
    assert main([*call, "--embedding", f"{one}:<toy>"]) == 0
    (recorded,) = read_record("a.png")["embeddings"]
    assert recorded["word"] == "<toy>" and recorded["path"] == one.name and len(recorded["hash"]) == 64
    capsys.readouterr()
    assert main(["replay", "a.png", "--embedding", str(one), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["identical"] is True
    save_file({"emb_params": torch.zeros(1, 16)}, one)
    assert main(["replay", "a.png", "--embedding", str(one)]) == 2
    assert "no longer the embedding" in capsys.readouterr().err
    assert main([*call, "--embedding", "none.safetensors"]) == 2
    assert ", and there is no such file; check the path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tensors", "word", "error", "message"),
    [
        ({"emb_params": torch.zeros(2, 24)}, None, ModelMismatchError, "expected vectors 16 wide .* got emb_params"),
        ({"a": torch.zeros(16), "b": torch.zeros(16)}, None, ModelMismatchError, "expected an embedding .* got a, b"),
        ({"clip_l": torch.zeros(1, 16), "clip_g": torch.zeros(1, 24)}, None, ModelMismatchError, "16 wide .* clip_g"),
        ({"emb_params": torch.zeros(1, 1, 16)}, None, ModelMismatchError, r"got emb_params of F32 \[1, 1, 16\]"),
        ({"emb_params": torch.zeros(2, 16).int()}, None, ModelMismatchError, "got emb_params of I32"),
        ({"emb_params": torch.full((2, 16), torch.nan)}, None, ModelLoadError, "32 values that are NaN"),
        ({"emb_params": torch.zeros(2, 16)}, "a toy", InputError, "text without blanks, got 'a toy'"),
        ({"emb_params": torch.zeros(2, 16)}, "fox</w>", InputError, "is a word of the vocabulary already"),
    ],
)
def test_odd_files_are_refused(
    pipe: Pipeline, tmp_path: Path, tensors: Any, word: str | None, error: type[Exception], message: str
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(error, match=message):
        pipe.with_embedding(tmp_path / "a.safetensors", word)


def test_pickles_are_refused(pipe: Pipeline, tmp_path: Path) -> None:
    torch.save({"string_to_param": {"*": torch.zeros(1, 16)}}, tmp_path / "a.safetensors")
    with pytest.raises(UnsafeModelError):
        pipe.with_embedding(tmp_path / "a.safetensors")


def test_vectors_of_float8_are_read(pipe: Pipeline, tmp_path: Path) -> None:
    vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    save_file({"foxtoy": vectors}, tmp_path / "a.safetensors")
    learned = pipe.with_embedding(tmp_path / "a.safetensors")
    table = learned.components.text_encoder.get_submodule(TABLES["CLIPTextModel"]).weight
    assert torch.equal(table[-2:], vectors.float())

"""T5 as a text encoder: the numbers of transformers, a model folder around it, and the picture of diffusers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tokenizers
import torch
import transformers

from latentdiff import Pipeline
from latentdiff.checkpoints import load_pipeline, load_text_encoder, save_pipeline
from latentdiff.errors import InputError, ModelConfigError
from latentdiff.models.encoding import TokenStates
from latentdiff.models.t5 import T5Config, T5EncoderModel
from tests.fake_device import FakeDevice
from tests.models.tiny import CONTEXT, randomize

WORDS = ("a", "red", "fox", "cat", "the")
SHAPE = {"vocab_size": 16, "d_model": CONTEXT, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 3}


@pytest.fixture(scope="module", params=["relu", "gated-gelu"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder and a tokenizer as transformers writes them."""
    place = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = transformers.T5Config(**SHAPE, feed_forward_proj=request.param, dropout_rate=0.0)
    transformers.T5EncoderModel(config).save_pretrained(place / "text_encoder")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((f"▁{word}", -3.0) for word in WORDS)]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    options: dict[str, Any] = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "model_max_length": 8}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **options).save_pretrained(place / "tokenizer")
    return place


def test_states_are_those_of_transformers(folder: Path) -> None:
    encoder, tokenizer = load_text_encoder(folder)
    peer = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder").eval()
    words = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    texts = ["a red fox", "the cat", "", "zebra"]
    batch = words(texts, padding="max_length", return_tensors="pt")
    assert torch.equal(tokenizer(texts).input_ids, batch.input_ids)
    assert torch.equal(tokenizer(texts).attention_mask, batch.attention_mask)
    for masked in (False, True):
        encoder.config = replace(encoder.config, use_attention_mask=masked)  # type: ignore[assignment, type-var]
        with torch.no_grad():
            mask = batch.attention_mask if masked else None
            expected = peer(input_ids=batch.input_ids, attention_mask=mask).last_hidden_state
        states = torch.cat([one.states for one in TokenStates(encoder, tokenizer)(texts)])
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-6)


def test_half_precision_keeps_in_float32_what_transformers_keeps(folder: Path) -> None:
    """Products of these weights overflow in float16; casting a model that is loaded keeps them too."""
    place, texts = folder / "text_encoder", ["a red fox", "the cat"]
    peer = transformers.T5EncoderModel.from_pretrained(place, torch_dtype=torch.float16).eval()
    expected = {name: weight.dtype for name, weight in peer.named_parameters() if name.endswith("wo.weight")}
    assert set(expected.values()) == {torch.float32}
    loaded, tokenizer = load_text_encoder(folder, torch.float16)
    cast = load_text_encoder(folder)[0].to(torch.float16)
    words = tokenizer(texts).input_ids
    with torch.no_grad():
        states = peer(input_ids=words).last_hidden_state
    for encoder in (loaded, cast, load_text_encoder(folder)[0].half()):
        dtypes = {name: weight.dtype for name, weight in encoder.named_parameters()}
        assert {name: dtype for name, dtype in dtypes.items() if name in expected} == expected
        assert {dtype for name, dtype in dtypes.items() if name not in expected} == {torch.float16}
        assert all(torch.equal(weight, dict(peer.named_parameters())[name]) for name, weight in _exact(encoder))
        found = torch.cat([one.states for one in TokenStates(encoder, tokenizer)(texts)])
        assert found.dtype == torch.float16
        torch.testing.assert_close(found, states, rtol=0, atol=2e-3)
    assert {weight.dtype for weight in load_text_encoder(folder, torch.bfloat16)[0].parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in cast.float().parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_states_on_a_device(folder: Path, kind: str) -> None:
    encoder, tokenizer = load_text_encoder(folder, torch.float16)
    encode = TokenStates(encoder, tokenizer)
    expected = encode(["a red fox", "the cat a red fox the cat a fox"])
    with FakeDevice(kind) as device:
        encoder.to(device.device)
        for ours, theirs in zip(encode(["a red fox", "the cat a red fox the cat a fox"]), expected):
            assert device.holds(ours.states) and torch.equal(ours.states.cpu(), theirs.states)
    assert {weight.dtype for _, weight in _exact(encoder)} == {torch.float32}


def _exact(encoder: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, weight) for name, weight in encoder.named_parameters() if weight.dtype == torch.float32]


def test_windows_of_a_long_prompt(folder: Path) -> None:
    encoder, tokenizer = load_text_encoder(folder)
    (encoded,) = TokenStates(encoder, tokenizer)(["a red fox the cat a red fox the"])
    assert encoded.tokens == 10 and encoded.states.shape == (2, 8, CONTEXT)
    with pytest.raises(InputError, match="clip_skip is for CLIP text encoders, got T5EncoderModel"):
        TokenStates(encoder, tokenizer)(["a"], clip_skip=1)


def test_a_whole_model_with_t5_draws_what_diffusers_draws(folder: Path, built_model: Path, tmp_path: Path) -> None:
    encoder, tokenizer = load_text_encoder(folder)
    components = load_pipeline(built_model)
    assert components.unet is not None
    unet = type(components.unet)(replace(components.unet.config, cross_attention_dim=CONTEXT))
    randomize(unet)
    save_pipeline(
        replace(components, unet=unet, text_encoder=encoder, tokenizer=tokenizer), tmp_path / "model", dtype=None
    )
    peer = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    peer.scheduler = diffusers.DDIMScheduler.from_config(peer.scheduler.config)
    peer.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": noise, "output_type": "pt"}
    expected = peer("a red fox", height=32, width=32, **options).images
    drawn = Pipeline.from_pretrained(tmp_path / "model", device="cpu")("a red fox", sampler="ddim", **options).images
    assert (drawn - expected).abs().max() <= 2 / 255


def test_a_config_for_another_activation_is_refused() -> None:
    with pytest.raises(ModelConfigError, match="feed_forward_proj must be relu or gated-gelu, got 'gated-silu'"):
        T5Config.from_dict({"feed_forward_proj": "gated-silu"})
    assert T5EncoderModel(T5Config.from_dict(SHAPE)).config.hidden_size == CONTEXT

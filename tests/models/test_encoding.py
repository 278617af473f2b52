"""Prompts to states: windows, masks, pooled vectors and weights, the same for every text encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from latentdiff.checkpoints import load_pipeline
from latentdiff.models.clip import CLIPTextConfig, CLIPTextModel
from latentdiff.models.encoding import PenultimateStates, PromptEncoder, TokenStates
from latentdiff.models.tokenizer import Tokenizer
from latentdiff.prompts import parse_weights
from tests.models.tiny import CLIP, randomize, write_clip_vocabulary

WORDS = {**CLIP, "vocab_size": 600, "bos_token_id": 522, "eos_token_id": 523}


def clip(folder: Path, **changes: Any) -> tuple[CLIPTextModel, Tokenizer]:
    model = CLIPTextModel(CLIPTextConfig.from_dict(WORDS | changes))
    randomize(model)
    return model.eval(), Tokenizer.from_folder(write_clip_vocabulary(folder))


@pytest.fixture(params=["clip", "xl", "bert"])
def encoder(request: pytest.FixtureRequest, tmp_path: Path, built_model: Path) -> PromptEncoder:
    if request.param == "bert":
        return load_pipeline(built_model).prompt_encoder
    if request.param == "clip":
        return TokenStates(*clip(tmp_path))
    projected = {"architectures": ["CLIPTextModelWithProjection"]}
    return PenultimateStates([clip(tmp_path), clip(tmp_path, **projected)])


def test_each_text_has_its_own_windows_whatever_is_beside_it(encoder: PromptEncoder) -> None:
    texts = ["red fox", "", "fox " * 25]
    together, alone = encoder(texts), [encoder([text])[0] for text in texts]
    for one, other in zip(together, alone):
        assert one.states.shape == other.states.shape and one.tokens == other.tokens
        torch.testing.assert_close(one.states, other.states)
        torch.testing.assert_close(one.pooled, other.pooled)
        assert torch.equal(one.mask, other.mask)
        assert int(one.mask.sum()) == one.tokens + 2 * (len(one.states) - 1)
    assert [len(one.states) for one in together][:2] == [1, 1] and len(together[2].states) > 1


def test_weights_scale_the_tokens_they_enclose(encoder: PromptEncoder) -> None:
    plain = encoder(["red fox"])[0]
    heavy, light, literal = encoder(["red (fox:1.5)", "[red fox]", r"red \(fox\)"], weighted=True)
    assert torch.equal(encoder(["red fox"], weighted=True)[0].states, plain.states)
    assert heavy.tokens == light.tokens == plain.tokens < literal.tokens
    ratio = heavy.states / plain.states
    inner = plain.tokens - 2  # of tokens between begin and end
    first, last = ratio[0, 0, 0], ratio[0, inner, 0]
    torch.testing.assert_close(last / first, torch.tensor(1.5))
    torch.testing.assert_close(ratio[0, inner + 1 :], first.expand_as(ratio[0, inner + 1 :]))
    torch.testing.assert_close(heavy.pooled, plain.pooled)


def test_weighted_clip_states_keep_their_mean(tmp_path: Path) -> None:
    """As the web UIs do it: every state times its weight, then all of a window to the mean that they had."""
    encoder = TokenStates(*clip(tmp_path))
    plain, heavy = encoder(["red fox"])[0].states, encoder(["red (fox:1.5)"], weighted=True)[0].states
    torch.testing.assert_close(heavy.mean(), plain.mean())
    expected = plain.clone()
    expected[0, 2:3] *= 1.5
    tokens = encoder(["red fox"])[0].tokens
    assert tokens == 4, "one token a word"
    torch.testing.assert_close(heavy, expected * plain.mean() / expected.mean())


def with_words(encoder: CLIPTextModel, tokenizer: Tokenizer, words: list[str]) -> tuple[CLIPTextModel, Tokenizer]:
    """Add learned words, whose numbers are higher than that of the end token."""
    larger = CLIPTextModel(replace(encoder.config, vocab_size=len(tokenizer) + len(words)))
    randomize(larger)
    return larger.eval(), tokenizer.with_words(words)


@pytest.mark.parametrize("eos", [2, 523])
def test_pooled_text_is_that_of_the_first_end_token(tmp_path: Path, eos: int) -> None:
    """Wherever words with higher numbers stand; most published configs name the end token 2, which it is not."""
    projected = {"architectures": ["CLIPTextModelWithProjection"], "eos_token_id": eos}
    pair = with_words(*clip(tmp_path, **projected), ["zzztoy", "zzztoy_1"])
    for encoder in (PenultimateStates([pair]), TokenStates(*pair)):
        texts = ["red zzztoy fox", "red zzztoy", "red zzztoy <|endoftext|> fox", "red zzztoy <|endoftext|>"]
        pooled = [one.pooled for one in encoder(texts)]
        assert not torch.allclose(pooled[0], pooled[1])  # type: ignore[arg-type]
        torch.testing.assert_close(pooled[2], pooled[3])  # what comes after an end is not looked at
        torch.testing.assert_close(pooled[1], pooled[3])


def centred(encoder: CLIPTextModel) -> CLIPTextModel:
    """Give the states of the last layer a mean of zero, as a last norm without weights does."""
    norm = encoder.text_model.final_layer_norm
    norm.weight.data.fill_(1)
    norm.bias.data.fill_(0)
    return encoder


@pytest.mark.parametrize("prompt", ["(red fox:{})", "red (fox:{})", "(red:{}) fox", "((red:{}) fox)", "[red] (fox:{})"])
@pytest.mark.parametrize("weight", [1.05, 1.1, 1.3, 1.5])
def test_weights_keep_size_and_direction_where_the_mean_is_zero(tmp_path: Path, prompt: str, weight: float) -> None:
    encoder, tokenizer = clip(tmp_path)
    states = TokenStates(centred(encoder), tokenizer)
    text = prompt.format(weight)
    plain, weighted = states(["red fox"])[0].states, states([text], weighted=True)[0].states
    most = max(abs(one) for _, one in parse_weights(text)) * (1.1 if "[" in text else 1)
    assert torch.cosine_similarity(plain.flatten(), weighted.flatten(), dim=0) > 0.9
    assert 1 / most - 1e-4 <= weighted.norm() / plain.norm() <= most + 1e-4


@pytest.mark.parametrize("prompt", ["red (fox:0)", "(red fox:0)", "red (fox:-1)", "(red fox:-1.5)", "[[red]] fox"])
@pytest.mark.parametrize("kind", ["centred", "plain", "xl"])
def test_any_weight_leaves_finite_states_of_about_the_same_size(tmp_path: Path, prompt: str, kind: str) -> None:
    encoder, tokenizer = clip(tmp_path, architectures=["CLIPTextModelWithProjection"])
    if kind == "centred":
        centred(encoder)
    states: PromptEncoder = TokenStates(encoder, tokenizer)
    if kind == "xl":
        states = PenultimateStates([(encoder, tokenizer)])
    plain, weighted = states(["red fox"])[0].states, states([prompt], weighted=True)[0].states
    assert torch.isfinite(weighted).all()
    assert 0.25 <= weighted.norm() / plain.norm() <= 4
    torch.testing.assert_close(weighted[0, 0] / weighted[0, 0].norm(), plain[0, 0] / plain[0, 0].norm())

"""Prompts to states: windows, masks, pooled vectors and weights, the same for every text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from latentdiff.checkpoints import load_pipeline
from latentdiff.models.clip import CLIPTextConfig, CLIPTextModel
from latentdiff.models.encoding import PenultimateStates, PromptEncoder, TokenStates
from latentdiff.models.tokenizer import Tokenizer
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

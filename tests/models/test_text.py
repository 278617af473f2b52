"""The text encoders BERT and CLIP: masks, pooled vectors, skipped layers, gradients, refused configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from latentdiff.errors import InputError, ModelConfigError
from latentdiff.models.bert import BertConfig, BertModel
from latentdiff.models.clip import CLIPTextConfig, CLIPTextModel
from tests.models.tiny import BERT, CLIP, randomize

IDS = torch.tensor([[58, 4, 9, 59, 59, 59], [58, 7, 30, 12, 5, 59]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])


def bert() -> BertModel:
    model = BertModel(BertConfig.from_dict(BERT))
    randomize(model)
    return model


def clip(**changes: Any) -> CLIPTextModel:
    model = CLIPTextModel(CLIPTextConfig.from_dict(CLIP | changes))
    randomize(model)
    return model


@pytest.mark.parametrize("make", [bert, clip, lambda: clip(with_projection=True, hidden_act="gelu")])
def test_every_parameter_gets_a_gradient(make: Any) -> None:
    model = make()
    states = model(torch.arange(60).reshape(5, 12), torch.ones(5, 12))
    (states.last_hidden_state.square().mean() + states.pooled.square().mean()).backward()
    without = [key for key, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert without == []


@pytest.mark.parametrize("make", [bert, clip])
def test_padding_that_is_masked_has_no_influence(make: Any) -> None:
    model = make()
    with torch.no_grad():
        padded, short = model(IDS[:1], MASK[:1]), model(IDS[:1, :4])
    torch.testing.assert_close(padded.last_hidden_state[:, :4], short.last_hidden_state)
    torch.testing.assert_close(padded.pooled, short.pooled)


def test_clip_sees_only_what_came_before() -> None:
    model = clip()
    with torch.no_grad():
        states = model(IDS).last_hidden_state
        changed = model(torch.cat([IDS[:, :4], IDS[:, :2]], dim=1)).last_hidden_state
    torch.testing.assert_close(states[:, :4], changed[:, :4])
    assert not torch.allclose(states[:, 4:], changed[:, 4:])


def test_clip_pools_the_first_end_token() -> None:
    model = clip()
    with torch.no_grad():
        states = model(IDS)
    torch.testing.assert_close(
        states.pooled, torch.stack([states.last_hidden_state[0, 3], states.last_hidden_state[1, 5]])
    )


def test_clip_skips_layers() -> None:
    model = clip()
    with torch.no_grad():
        full, skipped = model(IDS), model(IDS, clip_skip=2)
        expected = model.text_model.final_layer_norm(full.hidden_states[-3])
    torch.testing.assert_close(skipped.last_hidden_state, expected)
    torch.testing.assert_close(skipped.pooled, full.pooled)
    assert len(full.hidden_states) == CLIP["num_hidden_layers"] + 1
    with pytest.raises(InputError, match="clip_skip must be from 0 to 2, got 3"):
        model(IDS, clip_skip=3)


@pytest.mark.parametrize("make", [bert, clip])
def test_windows_longer_than_the_encoder_are_refused(make: Any) -> None:
    with pytest.raises(InputError, match="windows of 12 tokens, got 13"):
        make()(torch.zeros(1, 13, dtype=torch.int64))


def test_configs_survive_the_way_through_json() -> None:
    for config in (BertConfig.from_dict(BERT), CLIPTextConfig.from_dict(CLIP | {"with_projection": True})):
        assert type(config).from_dict(config.to_dict() | {"dtype": "float16"}) == config


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (
            BertConfig,
            {"num_attention_heads": 3},
            r"hidden_size must be a multiple of num_attention_heads \(3\), got 16",
        ),
        (BertConfig, {"hidden_act": "relu"}, "BertModel here needs hidden_act = \"gelu\", got 'relu'"),
        (BertConfig, {"model_type": "t5"}, "needs model_type = \"bert\", got 't5'"),
        (BertConfig, {"pad_token_id": 60}, r"pad_token_id must be null or a token below vocab_size \(60\), got 60"),
        (BertConfig, {"vocab_size": -1}, "vocab_size must be at least 1, got -1"),
        (CLIPTextConfig, {"hidden_act": "relu"}, "hidden_act must be gelu or quick_gelu, got 'relu'"),
        (CLIPTextConfig, {"num_attention_heads": 3}, "hidden_size must be a multiple of num_attention_heads"),
        (CLIPTextConfig, {"eos_token_id": [1]}, r"eos_token_id must be of type int, got \(1,\)"),
    ],
)
def test_refused_configurations(config: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message) as caught:
        config.from_dict((BERT if config is BertConfig else CLIP) | change)
    assert "\n" not in str(caught.value)

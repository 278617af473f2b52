"""The BERT encoder against transformers: same weights, same numbers, and each reads the other's."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig as ReferenceConfig
from transformers import BertModel as Reference

from latentdiff.models.bert import BertConfig, BertModel
from tests.models.tiny import BERT, randomize, relative_error


@pytest.mark.parametrize("masked", [False, True])
def test_same_numbers(masked: bool) -> None:
    reference = Reference(ReferenceConfig(**BERT)).eval()
    randomize(reference)
    ours = BertModel(BertConfig.from_dict(reference.config.to_dict()))
    ours.load_state_dict(reference.state_dict(), strict=True)
    input_ids = torch.randint(0, BERT["vocab_size"], (2, 12))
    mask = torch.tensor([[1] * 4 + [0] * 8, [1] * 12]) if masked else torch.ones(2, 12)
    with torch.no_grad():
        expected = reference(input_ids, mask, output_hidden_states=True)
        states = ours(input_ids, mask if masked else None)
    assert relative_error(states.last_hidden_state, expected.last_hidden_state) < 1e-5
    assert relative_error(states.pooled, expected.pooler_output) < 1e-5
    for hidden, reference_hidden in zip(states.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(hidden, reference_hidden) < 1e-5


def test_transformers_reads_what_we_write() -> None:
    ours = BertModel(BertConfig.from_dict(BERT | {"use_attention_mask": True}))
    reference = Reference(ReferenceConfig.from_dict(ours.config.to_dict()))
    reference.load_state_dict(ours.state_dict(), strict=True)
    assert reference.config.use_attention_mask is True
    assert BertConfig.from_dict(reference.config.to_dict()) == ours.config

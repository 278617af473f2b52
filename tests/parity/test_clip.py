"""The CLIP encoders against transformers: same weights, same numbers, and each reads the other's.

transformers 5 drops the `text_model.` of the published files from CLIPTextModel when it loads them; `renamed` puts it
back, which is all that differs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig as ReferenceConfig
from transformers import CLIPTextModel as Reference
from transformers import CLIPTextModelWithProjection as ProjectedReference

from latentdiff.models.clip import CLIPTextConfig, CLIPTextModel
from tests.models.tiny import CLIP, randomize, relative_error
from tests.parity.published import CLIPS, shapes_on_meta

IDS = torch.tensor([[58, 4, 9, 59, 59, 59], [58, 7, 30, 12, 5, 59]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
CASES = [
    pytest.param(Reference, {"hidden_act": "quick_gelu"}, id="sd1"),
    pytest.param(Reference, {"hidden_act": "gelu", "eos_token_id": 2}, id="sd2-legacy-end"),
    pytest.param(ProjectedReference, {"hidden_act": "gelu"}, id="xl"),
]


def renamed(weights: dict[str, Any]) -> dict[str, Any]:
    kept = ("text_model.", "text_projection.")
    return {name if name.startswith(kept) else f"text_model.{name}": weight for name, weight in weights.items()}


def both(kind: Any, changes: dict[str, Any]) -> tuple[CLIPTextModel, Any]:
    reference = kind(ReferenceConfig(**CLIP | changes)).eval()
    randomize(reference)
    written = reference.config.to_dict() | {"architectures": [kind.__name__]}
    ours = CLIPTextModel(CLIPTextConfig.from_dict(written))
    ours.load_state_dict(renamed(reference.state_dict()), strict=True)
    return ours, reference


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_same_numbers(kind: Any, changes: dict[str, Any], mask: Tensor | None) -> None:
    ours, reference = both(kind, changes)
    with torch.no_grad():
        states = ours(IDS, mask)
        expected = reference(IDS, mask, output_hidden_states=True)
    pooled = expected.text_embeds if kind is ProjectedReference else expected.pooler_output
    assert relative_error(states.last_hidden_state, expected.last_hidden_state) < 1e-5
    assert relative_error(states.pooled, pooled) < 1e-5
    for hidden, reference_hidden in zip(states.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(hidden, reference_hidden) < 1e-5


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_transformers_reads_what_we_write(kind: Any, changes: dict[str, Any]) -> None:
    projected = kind is ProjectedReference
    ours = CLIPTextModel(CLIPTextConfig.from_dict(CLIP | changes | {"with_projection": projected}))
    written = ours.config.to_dict()
    assert written["architectures"] == [kind.__name__]
    reference = kind(ReferenceConfig.from_dict(written))
    weights = ours.state_dict()
    names = renamed({name: name for name in reference.state_dict()})  # ours -> theirs
    reference.load_state_dict({names[name]: weight for name, weight in weights.items()}, strict=True)
    again = reference.config.to_dict() | {"architectures": written["architectures"]}
    assert CLIPTextConfig.from_dict(again) == ours.config


@pytest.mark.parametrize("name", CLIPS)
def test_published_configurations_have_the_same_weights(name: str) -> None:
    config = CLIPTextConfig.from_dict(CLIPS[name])
    kind = ProjectedReference if config.with_projection else Reference
    expected = renamed(shapes_on_meta(lambda: kind(ReferenceConfig.from_dict(CLIPS[name]))))
    assert shapes_on_meta(lambda: CLIPTextModel(config)) == expected

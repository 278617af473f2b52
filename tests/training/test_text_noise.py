"""Noise on text states: half of the samples have it, and it is a difference of captions of as many words."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from latentdiff.training.config import parse_config
from latentdiff.training.data.batches import Batch, draw_batch
from latentdiff.training.data.latents import EncodedTexts, LatentSet
from latentdiff.training.data.text_noise import TextNoise
from latentdiff.training.setup import load_components, prepare_data

from latentdiff.errors import InputError

from .test_objective import pictures, recipe

CAPTIONS = ["", "a", "b", "c", "two words", "other words", "three words here"]


def test_a_difference_is_of_captions_of_as_many_words() -> None:
    noise, rng = TextNoise(CAPTIONS, 0.7), np.random.default_rng(0)
    drawn = [noise.draw(1, rng) for _ in range(2000)]
    shares = np.array([share for share, _, _ in drawn])
    assert {row for _, *pair in drawn for row in pair} == {1, 2, 3}
    assert shares.min() == 0 and 0.69 < shares.max() <= 0.7 and abs((shares == 0).mean() - 0.5) < 0.05
    assert {noise.draw(4, rng)[1] for _ in range(50)} == {4, 5}
    assert noise.draw(0, rng)[1:] == (0, 0)  # so that the null prompt stays what it is


def test_states_move_and_nothing_else_does(tmp_path: Path) -> None:
    plain, noisy, config = drawn_with(tmp_path)
    batches = [(draw_batch(plain, config, step), draw_batch(noisy, config, step)) for step in range(8)]
    moved = 0
    for before, after in batches:
        assert torch.equal(before.latents, after.latents) and torch.equal(before.dropped, after.dropped)
        assert torch.equal(before.context[before.dropped], after.context[before.dropped])
        moved += int((before.context != after.context).any(dim=(1, 2)).sum())
    assert 4 < moved < 24  # of 32, of which half have none
    shares = [draw_batch(noisy, config, 3, slice(place, place + 1)) for place in range(4)]
    whole: Batch = batches[3][1]
    assert torch.equal(torch.cat([share.context for share in shares]), whole.context)


def drawn_with(tmp_path: Path) -> tuple[LatentSet, LatentSet, Any]:
    """Return the same data without and with noise, with states of their own, and the config."""
    pictures(tmp_path / "pictures", 8)
    config: Any = parse_config(yaml_tree(recipe(tmp_path)))
    data = prepare_data(config, load_components(config), tmp_path / "run")
    states = torch.randn(len(data.captions), 2, 5, generator=torch.Generator().manual_seed(0))
    plain = replace(data, texts=EncodedTexts(states))
    return plain, replace(plain, text_noise=TextNoise(data.captions, 0.7)), config


def yaml_tree(file: str) -> dict[str, Any]:
    """Return what a config file says."""
    tree: dict[str, Any] = yaml.safe_load(Path(file).read_text())
    return tree


@pytest.mark.parametrize("changes", [{"text_encoder": "labels"}, {"train": {"kind": "unet_and_text"}}])
def test_only_states_of_an_encoder_that_stays_have_noise(tmp_path: Path, changes: dict[str, Any]) -> None:
    tree = yaml_tree(recipe(tmp_path)) | {"text_encoder": "embedded"} | changes
    with pytest.raises(
        InputError, match=r"objective\.text_noise is for the states of a text encoder that is not trained"
    ):
        parse_config({**tree, "objective": {"text_noise": 0.7}})

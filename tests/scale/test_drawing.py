"""Rows drawn with a model: the pictures of the pipeline, failures that are one row's alone, batches that fit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff.pipeline import Pipeline
from latentdiff.scale import drawing
from latentdiff.scale.drawing import Artist, Style
from latentdiff.scale.formats import Picture
from latentdiff.scale.rows import Row


def row(prompt: Any = "a", image: Any = None, mask: Any = None, loras: Any = (), **settings: Any) -> Row:
    return Row(1, 0, prompt, {"num_inference_steps": 2, **settings}, image, mask, loras)


def pixels(picture: Picture | str) -> np.ndarray:
    assert isinstance(picture, Picture), picture
    return np.asarray(Image.open(io.BytesIO(picture.data)).convert("RGB"), dtype=int)


def test_rows_of_any_settings_are_drawn_as_the_pipeline_draws_them(pipe: Pipeline, tmp_path: Path) -> None:
    start = tmp_path / "start.png"
    pipe("b", seed=9, num_inference_steps=1).save(start)
    rows = [
        row(seed=3),
        row("another", seed=4, num_inference_steps=3, sampler="heun"),
        row(seed=5, width=48, guidance_scale=1.0),
        row("c", image=str(start), seed=6, strength=0.5),
        row("c", image=str(start), mask=[0, 0, 16, 32], seed=7),
        row("d", seed=8, negative_prompt="e", hires=1.5),
    ]
    together = list(Artist(pipe, Style(batch=6)).draw(rows))
    alone = list(Artist(pipe, Style(batch=1)).draw(rows))
    for one, other, asked in zip(together, alone, rows):
        expected = pipe(asked.prompt, image=asked.image, mask=asked.mask, **asked.settings)
        assert (pixels(other) == np.asarray(expected.images[0])).all()
        assert np.abs(pixels(one) - pixels(other)).max() <= 1  # what shares a call has a say in the rounding alone
        assert isinstance(other, Picture) and other.settings["seed"] == asked.settings["seed"]
        written = tmp_path / "expected.png"
        expected.save(written)
        assert other.data == written.read_bytes()


def test_the_same_rows_give_the_same_bytes(pipe: Pipeline) -> None:
    rows = [row(f"{number}", seed=number) for number in range(5)]
    first, second = (list(Artist(pipe, Style(batch=2)).draw(rows)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (row(seed="x"), "seed must be a whole number"),
        (row(""), "prompt must say what to draw"),
        (row(7), "prompt must be text, got int"),
        (row(num_images=0), "num_images must be a whole number"),
        (row(sampler="dimm"), "did you mean 'ddim'"),
        (row(image="none.png"), "cannot read image"),
        (row(image="memory://none.png"), "cannot be read"),
        (row(mask="alpha"), "got no image"),
        (row(loras=(("none.safetensors", (1.0,)),)), "none.safetensors"),
        (row(loras=(("a", (1.0,)), ("a", (1.0,)))), "each file once"),
        (row(width=10**6), "width"),
    ],
)
def test_a_row_that_cannot_be_drawn_fails_alone(pipe: Pipeline, bad: Row, why: str) -> None:
    before, failed, after = Artist(pipe, Style(batch=3)).draw([row(seed=1), bad, row(seed=2)])
    assert isinstance(before, Picture) and isinstance(after, Picture)
    assert isinstance(failed, str) and why in failed


def test_a_picture_behind_a_url(pipe: Pipeline, tmp_path: Path) -> None:
    start = tmp_path / "start.png"
    pipe("b", seed=9, num_inference_steps=1).save(start)
    with fsspec.open("memory://inputs/start.png", "wb") as file:
        file.write(start.read_bytes())
    here, there = Artist(pipe, Style()).draw([row(image=str(start)), row(image="memory://inputs/start.png")])
    assert (pixels(here) == pixels(there)).all()


def test_where_memory_is_short_batches_are_halved_and_stay_so(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    real, sizes = drawing.sample_together, list[int]()

    def short(drawings: Any) -> Any:
        sizes.append(len(drawings))
        if len(drawings) > 2:
            raise torch.cuda.OutOfMemoryError("no more")
        return real(drawings)

    monkeypatch.setattr(drawing, "sample_together", short)
    artist = Artist(pipe, Style(batch=8))
    rows = [row(seed=number) for number in range(12)]
    pictures = list(artist.draw(rows))
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2] and artist.batch == 2
    assert pictures == list(Artist(pipe, Style(batch=2)).draw(rows))


def test_what_fails_in_a_batch_fails_alone(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    real = drawing.sample_together

    def failing(drawings: Any) -> Any:
        if any(one.job.settings.seed == 2 for one in drawings):
            raise RuntimeError("a fault of\nours")
        return real(drawings)

    monkeypatch.setattr(drawing, "sample_together", failing)
    found = list(Artist(pipe, Style(batch=4)).draw([row(seed=number) for number in range(4)]))
    assert found[2] == "RuntimeError: a fault of ours"
    assert all(isinstance(found[number], Picture) for number in (0, 1, 3))


def test_without_metadata_and_mark(pipe: Pipeline) -> None:
    (plain,) = Artist(pipe, Style(metadata=False, mark=False)).draw([row(seed=1)])
    assert (
        isinstance(plain, Picture) and b"latentdiff" not in plain.data and b"trainedAlgorithmicMedia" not in plain.data
    )
    assert plain.settings["seed"] == 1

"""The tokenizer: windows, files that come back as they went, refused folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latentdiff.errors import (
    InputError,
    ModelConfigError,
    ModelFormatError,
    ModelLoadError,
    ModelPathError,
    StorageError,
)
from latentdiff.models.tokenizer import Tokenizer
from tests.models.tiny import write_bert_vocabulary, write_clip_vocabulary


def test_a_long_prompt_fills_several_windows_and_shorter_ones_get_empty_windows(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_clip_vocabulary(tmp_path, window=5))
    batch = tokenizer(["the red fox", "the red cat the red fox the cat", ""])
    assert batch.n_chunks == 3
    assert batch.counts == [5, 10, 2]
    assert batch.input_ids.shape == batch.attention_mask.shape == (3, 15)
    begin, end = batch.input_ids[2, 0].item(), batch.input_ids[2, 1].item()
    windows = batch.input_ids.unflatten(1, (3, 5))
    assert (windows[:, :, 0] == begin).all()
    short = windows[0].tolist()
    assert short[1:] == [[begin, end, tokenizer.pad_token_id, tokenizer.pad_token_id, tokenizer.pad_token_id]] * 2
    the, red, fox = short[0][1:4]
    cat = windows[1, 0, 3].item()
    assert windows[1].tolist() == [
        [begin, the, red, cat, end],
        [begin, the, red, fox, end],
        [begin, the, cat, end, end],
    ]
    assert batch.attention_mask.unflatten(1, (3, 5)).sum(dim=2).tolist() == [[5, 2, 2], [5, 5, 4], [2, 2, 2]]


def test_no_prompts_give_an_empty_batch(tmp_path: Path) -> None:
    batch = Tokenizer.from_folder(write_bert_vocabulary(tmp_path))([])
    assert batch.input_ids.shape == (0, 8)
    assert batch.counts == []


def test_one_string_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must be a list of strings, got one string; write \[prompt\]"):
        Tokenizer.from_folder(write_bert_vocabulary(tmp_path))("a fox")


def test_saved_files_are_the_ones_that_were_read(tmp_path: Path) -> None:
    source = write_clip_vocabulary(tmp_path / "source")
    Tokenizer.from_folder(source).save(tmp_path / "copy")
    assert {file.name for file in (tmp_path / "copy").iterdir()} == {file.name for file in source.iterdir()}
    for file in source.iterdir():
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_bert_vocabulary(tmp_path))
    with pytest.raises(StorageError, match="could not write the tokenizer to"):
        tokenizer.save(tmp_path / "vocab.txt")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelPathError, match=r"must have tokenizer.json, vocab.json with merges.txt, or vocab.txt"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", b"{"),
        ("vocab.json", b'{"a": "b"}'),
        ("vocab.json", b"[]"),
        ("merges.txt", b"\xff\xfe"),
        ("merges.txt", b"a b c\n"),
        ("merges.txt", b"not inside\n"),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b"[1]"),
        ("tokenizer_config.json", b'{"model_max_length": 8, "pad_token": 3}'),
        ("tokenizer_config.json", b'{"model_max_length": 8, "added_tokens_decoder": {"x": {"content": "y"}}}'),
        ("special_tokens_map.json", b"\x80"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    folder = write_clip_vocabulary(tmp_path)
    if name == "tokenizer_config.json":
        (folder / "special_tokens_map.json").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(ModelFormatError) as caught:
        Tokenizer.from_folder(folder)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_max_length": None}, "must have model_max_length"),
        ({"model_max_length": 2}, r"at least 3\), got 2"),
        ({"model_max_length": 10**30}, "must have model_max_length"),
        ({"model_max_length": 8, "pad_token": "<pad>"}, "special token '<pad>' is not in the vocabulary"),
        (
            {"model_max_length": 8, "added_tokens_decoder": {"9999": {"content": "<style>"}}},
            "token '<style>' cannot have the number 9999",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    folder = write_clip_vocabulary(tmp_path)
    (folder / "special_tokens_map.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelConfigError, match=message):
        Tokenizer.from_folder(folder)


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(ModelLoadError, match=r"must be a BERT .* tokenizer, got WordLevel"):
        Tokenizer.from_folder(tmp_path)


def parts(tokenizer: Tokenizer, prompt: str) -> list[list[str]]:
    """The tokens of each window, without its marks and padding."""
    batch = tokenizer([prompt])
    windows = batch.input_ids.reshape(batch.n_chunks, -1).tolist()
    mask = batch.attention_mask.reshape(batch.n_chunks, -1).sum(1).tolist()
    backend = tokenizer._backend
    return [[backend.id_to_token(number) for number in window[1 : count - 1]] for window, count in zip(windows, mask)]


@pytest.mark.parametrize("before", range(8))
def test_words_are_not_cut_at_the_end_of_a_window(tmp_path: Path, before: int) -> None:
    """Words of the vocabulary, numbers with letters, and learned words of several vectors go to the next window."""
    tokenizer = Tokenizer.from_folder(write_clip_vocabulary(tmp_path)).with_words(["toy", "toy_1", "toy_2"])  # room: 6
    for word, tokens in (
        ("zzz", ["z", "z", "z</w>"]),
        ("toy", ["toy", "toy_1", "toy_2"]),
        ("1920s", ["1</w>", "9</w>", "2</w>", "0</w>", "s</w>"]),
        ("é", tokenizer._backend.encode("é").tokens),
    ):
        found = parts(tokenizer, "fox " * before + word + " cat")
        flat = [token for window in found for token in window]
        assert flat == ["fox</w>"] * before + tokens + ["cat</w>"]
        assert all(len(window) <= 6 for window in found)
        (home,) = [window for window in found if tokens[0] in window]
        assert home[home.index(tokens[0]) :][: len(tokens)] == tokens
        assert tokenizer(["fox " * before + word + " cat"]).counts == [before + len(tokens) + 3]


def test_a_word_longer_than_a_window_is_cut_in_one_of_its_own(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_clip_vocabulary(tmp_path))  # room for 6
    assert [len(part) for part in parts(tokenizer, "fox " + "z" * 14 + " cat")] == [1, 6, 6, 3]


def test_weights_stay_with_the_words_that_are_moved(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_clip_vocabulary(tmp_path))
    batch = tokenizer([[("fox fox fox fox ", 1.0), ("zzz", 1.5), (" cat", 1.0)]])
    assert batch.windows == [2]
    assert batch.weights.tolist() == [[1.0] * 8 + [1.0, 1.5, 1.5, 1.5, 1.0, 1.0, 1.0, 1.0]]

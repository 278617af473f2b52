"""Prompts to token numbers, on the `tokenizers` library alone: what transformers' tokenizers of BERT, CLIP and T5 give.

A prompt longer than the text encoder's window becomes several windows, between words; nothing is cut off.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tokenizers
from tokenizers import AddedToken

from latentdiff.errors import (
    InputError,
    LatentDiffError,
    ModelConfigError,
    ModelFormatError,
    ModelPathError,
    StorageError,
)
from latentdiff.models.tokenizer_rules import (
    SPECIAL_TOKENS,
    TokenEntry,
    bert_backend,
    check_rules,
    clip_backend,
    content_of,
)

if TYPE_CHECKING:
    from torch import Tensor

FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TOKEN_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
PLAIN_WORD = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": False}
TOKEN_FLAGS = ("lstrip", "normalized", "rstrip", "single_word")
BEGIN_END = {
    "WordPiece": ("cls_token", "sep_token"),
    "BPE": ("bos_token", "eos_token"),
    "Unigram": (None, "eos_token"),
}
LONGEST_WINDOW = 100_000
PROBE = "a\U0001f98a\u4e2d\u0001 \u0378\ue000"  # letters that few vocabularies have
Pieces = Sequence[tuple[str, float]]
"""A prompt in pieces, each with its weight."""

Token = tuple[int, float]
"""A token with its weight."""


class TokenLists(NamedTuple):
    """The same as `TokenBatch`, as lists: of each prompt its n_chunks * L tokens, and so on."""

    input_ids: list[list[int]]
    attention_mask: list[list[int]]
    weights: list[list[float]]
    n_chunks: int
    counts: list[int]
    windows: list[int]


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of several prompts, L to a window.

    Attributes:
        input_ids: (B, n_chunks * L) int64, window after window, each with its own begin and end token and padding.
        attention_mask: (B, n_chunks * L) int64, 0 for padding.
        weights: (B, n_chunks * L) float32, how much each token counts; 1 for those that no prompt asked for.
        n_chunks: windows per prompt, the same for all; prompts with fewer have empty ones at the end.
        counts: tokens of each prompt with one begin and one end token; above L it fills several windows.
        windows: how many windows each prompt fills.
    """

    input_ids: Tensor
    attention_mask: Tensor
    weights: Tensor
    n_chunks: int
    counts: list[int]
    windows: list[int]


class Tokenizer:
    """A vocabulary and its rules.

    Args:
        files: contents of the files of a tokenizer folder, by name; see `FILES`.
        place: where they come from, for messages.
        longest: window of the text encoder, for files that name none; None where it is not known.

    Attributes:
        model_max_length: tokens in a window, begin and end token included.
        end_token_id: what ends a window.
        pad_token_id: what fills a window.

    Raises:
        ModelPathError: no file has a vocabulary.
        ModelFormatError: a file cannot be read.
        ModelConfigError: a special token is not in the vocabulary, or there is no usable model_max_length.
    """

    def __init__(self, files: Mapping[str, bytes], place: str = "the tokenizer", longest: int | None = None) -> None:
        self._files = dict(files)
        self._place = place
        self._longest = longest
        with self._library("has no readable vocabulary"):
            self._build(self._settings())
            self._backend.encode(PROBE, add_special_tokens=False)

    @classmethod
    def from_folder(cls, folder: str | Path, longest: int | None = None) -> Tokenizer:
        """Read a tokenizer folder of diffusers or transformers; `longest` is as of the class itself.

        Raises:
            ModelLoadError: as of the class itself.
        """
        folder = Path(folder)
        try:
            files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        except OSError as error:
            raise ModelPathError(f"could not read the tokenizer in {folder}: {error}; check the folder") from error
        return cls(files, str(folder), longest)

    @contextmanager
    def _library(self, what: str) -> Iterator[None]:
        """Raise ModelFormatError for whatever the library or odd JSON raise; it panics in a class of its own."""
        try:
            yield
        except LatentDiffError:
            raise
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = str(error).partition("\n")[0][:200]
            raise ModelFormatError(f"{self._place} {what}: {reason}; get its files again") from error

    @property
    def size(self) -> int:
        """The largest number of a token, and one: how many rows its text encoder's table must have."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def __len__(self) -> int:
        """Return how many tokens there are, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def with_words(self, words: Sequence[str]) -> Tokenizer:
        """Return a tokenizer with one more token for each word; where one is typed, those with _1, _2, ... follow it.

        Raises:
            InputError: a word has a token already.
        """
        files, first = dict(self._files), len(self)
        for word in words:
            if self.knows(word):
                raise InputError(f"{word!r} is a word of the vocabulary already; choose another for the embedding")
        settings = self._json("tokenizer_config.json")
        if "added_tokens_decoder" in settings:
            added = {str(first + i): {"content": word, **PLAIN_WORD} for i, word in enumerate(words)}
            settings["added_tokens_decoder"] |= added
            files["tokenizer_config.json"] = json.dumps(settings, indent=2).encode()
        else:
            numbers = {**self._json("added_tokens.json"), **{word: first + i for i, word in enumerate(words)}}
            files["added_tokens.json"] = json.dumps(numbers).encode()
        return Tokenizer(files, self._place, self._longest)

    def vocabulary(self) -> list[str]:
        """Return all tokens, as the files write them, in the order of their numbers."""
        numbers = self._backend.get_vocab(with_added_tokens=True)
        return sorted(numbers, key=lambda token: numbers[token])

    def knows(self, word: str) -> bool:
        """Say whether a word is one token, or was added as several."""
        return self._backend.token_to_id(word) is not None

    def same_as(self, other: Tokenizer) -> bool:
        """Say whether two tokenizers have the same words, special tokens and window, however they are stored."""
        ours, theirs = ((*one._begin, *one._end, one.pad_token_id, one.model_max_length) for one in (self, other))
        return ours == theirs and self._backend.get_vocab() == other._backend.get_vocab()

    @property
    def digest(self) -> str:
        """SHA-256 over the names and contents of the files that this was read from."""
        digest = hashlib.sha256()
        for name, content in sorted(self._files.items()):
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the files that this was read from into an existing or new folder.

        Raises:
            StorageError: they cannot be written.
        """
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            for name, content in self._files.items():
                (Path(folder) / name).write_bytes(content)
        except OSError as error:
            raise StorageError(
                f"could not write the tokenizer to {folder}: {error}; free space or choose another folder"
            ) from error

    def __call__(self, prompts: Sequence[str | Pieces]) -> TokenBatch:
        """Return the tokens of each prompt, in as many windows as the longest one needs.

        Args:
            prompts: each a text, or pieces of one with their weights.

        Raises:
            InputError: `prompts` is one string instead of a list.
        """
        import torch

        lists = self.lists(prompts)
        shape = (len(lists.counts), lists.n_chunks * self.model_max_length)
        return TokenBatch(
            torch.tensor(lists.input_ids, dtype=torch.int64).reshape(shape),
            torch.tensor(lists.attention_mask, dtype=torch.int64).reshape(shape),
            torch.tensor(lists.weights, dtype=torch.float32).reshape(shape),
            *lists[3:],
        )

    def lists(self, prompts: Sequence[str | Pieces]) -> TokenLists:
        """Return the same as a call, without loading torch."""
        if isinstance(prompts, str):
            raise InputError("prompts must be a list of strings, got one string; write [prompt]")
        marks = len(self._begin) + len(self._end)
        contents = [_windows(self._words(prompt), self.model_max_length - marks) for prompt in prompts]
        n_chunks = max([1, *map(len, contents)])
        counts, windows = [sum(map(len, content)) + marks for content in contents], [*map(len, contents)]
        found = TokenLists([], [], [], n_chunks, counts, windows)
        for content in contents:
            ids, mask, weights = list[int](), list[int](), list[float]()
            for part in content + [[]] * (n_chunks - len(content)):
                window = [*self._begin, *(number for number, _ in part), *self._end]
                padding = self.model_max_length - len(window)
                ids += window + [self.pad_token_id] * padding
                mask += [1] * len(window) + [0] * padding
                own = [1.0] * len(self._begin) + [weight for _, weight in part]
                weights += own + [1.0] * (self.model_max_length - len(own))
            found.input_ids.append(ids)
            found.attention_mask.append(mask)
            found.weights.append(weights)
        return found

    def _words(self, prompt: str | Pieces) -> list[list[Token]]:
        """Return the tokens of a prompt with their weights, word by word; a learned word has all of its tokens."""
        pieces = [(prompt, 1.0)] if isinstance(prompt, str) else prompt
        words: list[list[Token]] = []
        for text, weight in pieces:
            with self._library("cannot take this prompt apart"):
                encoded = self._backend.encode(text, add_special_tokens=False)
            last = None  # the word that the token before belongs to, as the library counts; None for a learned one
            for number, place, (start, _) in zip(encoded.ids, encoded.word_ids, encoded.offsets):
                tokens = [(one, weight) for one in self._runs.get(number, (number,))]
                if last is not None and (place == last or _inside_number(text, start)) and number not in self._runs:
                    words[-1] += tokens
                else:
                    words.append(tokens)
                last = None if number in self._runs else place
        return words

    def _build(self, settings: Mapping[str, Any]) -> None:
        self._backend = self._read_backend(settings)
        self._backend.no_padding()
        self._backend.no_truncation()
        kind = type(self._backend.model).__name__
        if kind not in SPECIAL_TOKENS:
            raise ModelConfigError(
                f"{self._place} must be a BERT (WordPiece), CLIP (BPE) or T5 (Unigram) tokenizer, got {kind}"
            )
        special = {**SPECIAL_TOKENS[kind], **{key: settings[key] for key in TOKEN_KEYS if settings.get(key)}}
        self._add_tokens(special, settings.get("added_tokens_decoder") or {})
        begin, end = BEGIN_END[kind]
        self._begin = [] if begin is None else [self._number(special[begin])]
        self.end_token_id = self._number(special[end])
        self._end = [self.end_token_id]
        self._runs = _runs(self._backend)
        self.pad_token_id = self._number(special["pad_token"])
        self.model_max_length = self._window(settings)

    def _json(self, name: str) -> dict[str, Any]:
        content = json.loads(self._files.get(name, b"{}"))
        if not isinstance(content, dict):
            raise ModelFormatError(f"{name} of {self._place} must be a JSON object; get its files again")
        return content

    def _settings(self) -> dict[str, Any]:
        """Return tokenizer_config.json; in older folders special_tokens_map.json has the last word, as there."""
        settings = self._json("tokenizer_config.json")
        if "added_tokens_decoder" in settings:
            return settings
        settings = {**settings, **self._json("special_tokens_map.json")}
        added = self._json("added_tokens.json")
        return {**settings, "added_tokens_decoder": {number: {"content": token} for token, number in added.items()}}

    def _read_backend(self, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
        files = self._files
        if "tokenizer.json" in files:
            check_rules(self._json("tokenizer.json"), self._place)
            return tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
        if "vocab.json" in files and "merges.txt" in files:
            return clip_backend(json.loads(files["vocab.json"]), files["merges.txt"].decode("utf-8"), settings)
        if "vocab.txt" in files:
            return bert_backend(files["vocab.txt"].decode("utf-8"), settings)
        raise ModelPathError(
            f"{self._place} must have tokenizer.json, vocab.json with merges.txt, or vocab.txt; has none"
        )

    def _add_tokens(self, special: Mapping[str, Any], added: Mapping[str, Any]) -> None:
        """Make the backend treat special tokens in a prompt as transformers does: as one token each."""
        for number, entry in sorted((int(number), entry) for number, entry in added.items()):
            token = _token(entry, special=bool(entry.get("special", False)))
            (self._backend.add_special_tokens if token.special else self._backend.add_tokens)([token])
            if self._backend.token_to_id(token.content) != number:
                raise ModelConfigError(f"{self._place}: token {token.content!r} cannot have the number {number}")
        for entry in special.values():
            token = _token(entry, special=True)
            if not isinstance(entry, str) and entry.get("special") is False:
                continue  # a sign that is also a word of prompts
            if self._backend.token_to_id(token.content) is not None:
                self._backend.add_special_tokens([token])

    def _number(self, entry: TokenEntry) -> int:
        token = _token(entry, special=True).content
        number = self._backend.token_to_id(token)
        if number is None:
            raise ModelConfigError(
                f"{self._place}: special token {token!r} is not in the vocabulary; use its own files"
            )
        return number

    def _window(self, settings: Mapping[str, Any]) -> int:
        length = settings.get("model_max_length")
        if isinstance(length, (int, float)) and length > LONGEST_WINDOW and self._longest is not None:
            length = self._longest  # transformers writes 1e30 for none
        if not isinstance(length, int) or not 3 <= length <= LONGEST_WINDOW:
            raise ModelConfigError(
                f"{self._place}: tokenizer_config.json must have model_max_length, the text encoder's window in tokens "
                f"(at least 3), got {length}; set it"
            )
        return length


def _inside_number(text: str, place: int) -> bool:
    """Say whether a place in a text is within a number or between its digits and letters, as in 1920s."""
    beside = text[max(place - 1, 0) : place + 1]
    return len(beside) == 2 and beside.isalnum() and any(sign.isdecimal() for sign in beside)


def _windows(words: Sequence[list[Token]], room: int) -> list[list[Token]]:
    """Return the tokens of each window, at most `room`: a word that does not fit goes to the next one.

    A word that is longer than a window is cut, beginning in one of its own.
    """
    windows: list[list[Token]] = [[]]
    for word in words:
        if len(windows[-1]) + len(word) > room and windows[-1]:
            windows.append([])
        windows[-1] += word
        while len(windows[-1]) > room:
            windows.append(windows[-1][room:])
            del windows[-2][room:]
    return windows


def _runs(backend: tokenizers.Tokenizer) -> dict[int, list[int]]:
    """Return the tokens that stand for one added word of several vectors, by the first: `toy`, `toy_1`, `toy_2`, ..."""
    numbers = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}
    runs = {}
    for word, number in numbers.items():
        run = [number]
        while f"{word}_{len(run)}" in numbers:
            run.append(numbers[f"{word}_{len(run)}"])
        if len(run) > 1:
            runs[number] = run
    return runs


def _token(entry: TokenEntry, *, special: bool) -> AddedToken:
    """Return a token from a string, or from an object with its content and how blanks around it are treated."""
    flags = {} if isinstance(entry, str) else {name: entry[name] for name in TOKEN_FLAGS if name in entry}
    return AddedToken(content_of(entry), **{"normalized": not special, **flags}, special=special)

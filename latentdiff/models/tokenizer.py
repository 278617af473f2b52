"""Prompts to token numbers, on the `tokenizers` library alone: what transformers' tokenizers of BERT, CLIP and T5 give.

A prompt longer than the text encoder's window becomes several windows, between words; nothing is cut off.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from torch import Tensor

from latentdiff.errors import (
    InputError,
    LatentDiffError,
    ModelConfigError,
    ModelFormatError,
    ModelPathError,
    StorageError,
)

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
# Special tokens where the folder names none, by the model inside tokenizer.json: that of BERT, CLIP and T5.
SPECIAL_TOKENS = {
    "WordPiece": {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
    },
    "BPE": {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    },
    "Unigram": {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
}
BEGIN_END = {
    "WordPiece": ("cls_token", "sep_token"),
    "BPE": ("bos_token", "eos_token"),
    "Unigram": (None, "eos_token"),
}
# What CLIP takes for a word: endings after an apostrophe, runs of letters, single digits, runs of other signs.
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
LONGEST_WINDOW = 100_000

Pieces = Sequence[tuple[str, float]]
"""A prompt in pieces, each with its weight."""

Token = tuple[int, float]
"""A token with its weight."""


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

    Attributes:
        model_max_length: tokens in a window, begin and end token included.
        end_token_id: what ends a window.
        pad_token_id: what fills a window.

    Raises:
        ModelPathError: no file has a vocabulary.
        ModelFormatError: a file cannot be read.
        ModelConfigError: a special token is not in the vocabulary, or there is no usable model_max_length.
    """

    def __init__(self, files: Mapping[str, bytes], place: str = "the tokenizer") -> None:
        self._files = dict(files)
        self._place = place
        try:
            self._build(self._settings())
        except LatentDiffError:
            raise
        except Exception as error:  # the library raises bare Exception; odd JSON raises anything
            reason = str(error).partition("\n")[0]
            raise ModelFormatError(f"{place} has no readable vocabulary: {reason}; get its files again") from error

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read a tokenizer folder of diffusers or transformers.

        Raises:
            ModelLoadError: as of the class itself.
        """
        folder = Path(folder)
        try:
            files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        except OSError as error:
            raise ModelPathError(f"could not read the tokenizer in {folder}: {error}; check the folder") from error
        return cls(files, str(folder))

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
            if self._backend.token_to_id(word) is not None:
                raise InputError(f"{word!r} is a word of the vocabulary already; choose another for the embedding")
        settings = self._json("tokenizer_config.json")
        if "added_tokens_decoder" in settings:
            added = {str(first + i): {"content": word, **PLAIN_WORD} for i, word in enumerate(words)}
            settings["added_tokens_decoder"] |= added
            files["tokenizer_config.json"] = json.dumps(settings, indent=2).encode()
        else:
            numbers = {**self._json("added_tokens.json"), **{word: first + i for i, word in enumerate(words)}}
            files["added_tokens.json"] = json.dumps(numbers).encode()
        return Tokenizer(files, self._place)

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
        if isinstance(prompts, str):
            raise InputError("prompts must be a list of strings, got one string; write [prompt]")
        marks = len(self._begin) + len(self._end)
        contents = [_windows(self._words(prompt), self.model_max_length - marks) for prompt in prompts]
        n_chunks = max([1, *map(len, contents)])
        ids, mask, weights = [], [], []
        for content in contents:
            for part in content + [[]] * (n_chunks - len(content)):
                window = [*self._begin, *(number for number, _ in part), *self._end]
                padding = self.model_max_length - len(window)
                ids.append(window + [self.pad_token_id] * padding)
                mask.append([1] * len(window) + [0] * padding)
                own = [1.0] * len(self._begin) + [weight for _, weight in part]
                weights.append(own + [1.0] * (self.model_max_length - len(own)))
        shape = (len(contents), n_chunks * self.model_max_length)
        return TokenBatch(
            torch.tensor(ids, dtype=torch.int64).reshape(shape),
            torch.tensor(mask, dtype=torch.int64).reshape(shape),
            torch.tensor(weights, dtype=torch.float32).reshape(shape),
            n_chunks,
            [sum(map(len, content)) + marks for content in contents],
            [len(content) for content in contents],
        )

    def _words(self, prompt: str | Pieces) -> list[list[Token]]:
        """Return the tokens of a prompt with their weights, word by word; a learned word has all of its tokens."""
        pieces = [(prompt, 1.0)] if isinstance(prompt, str) else prompt
        words: list[list[Token]] = []
        for text, weight in pieces:
            encoded, last = self._backend.encode(text, add_special_tokens=False), None
            for number, place, (start, _) in zip(encoded.ids, encoded.word_ids, encoded.offsets):
                continues = place is not None and last is not None and (place == last or _inside_number(text, start))
                if number in self._runs:
                    words.append([(one, weight) for one in self._runs[number]])
                    last = None
                    continue
                if continues:
                    words[-1].append((number, weight))
                else:
                    words.append([(number, weight)])
                last = place
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
            return tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
        if "vocab.json" in files and "merges.txt" in files:
            return _clip_backend(json.loads(files["vocab.json"]), files["merges.txt"].decode("utf-8"), settings)
        if "vocab.txt" in files:
            return _bert_backend(files["vocab.txt"].decode("utf-8"), settings)
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

    def _number(self, entry: Any) -> int:
        token = _token(entry, special=True).content
        number = self._backend.token_to_id(token)
        if number is None:
            raise ModelConfigError(
                f"{self._place}: special token {token!r} is not in the vocabulary; use its own files"
            )
        return number

    def _window(self, settings: Mapping[str, Any]) -> int:
        length = settings.get("model_max_length")
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


def _content(entry: Any) -> str:
    return entry if isinstance(entry, str) else entry["content"]


def _token(entry: Any, *, special: bool) -> AddedToken:
    """Return a token from a string, or from an object with its content and how blanks around it are treated."""
    flags = {} if isinstance(entry, str) else {name: entry[name] for name in TOKEN_FLAGS if name in entry}
    return AddedToken(_content(entry), **{"normalized": not special, **flags}, special=special)


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def _clip_backend(vocabulary: dict[str, int], merges: str, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    lines = [line for line in _lines(merges) if line and not line.startswith("#version")]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(first, second) for first, second in (line.split() for line in lines)],
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=_content(settings.get("unk_token") or SPECIAL_TOKENS["BPE"]["unk_token"]),
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return backend


def _bert_backend(vocabulary: str, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    numbers = {token: number for number, token in enumerate(_lines(vocabulary))}
    unknown = _content(settings.get("unk_token") or SPECIAL_TOKENS["WordPiece"]["unk_token"])
    backend = tokenizers.Tokenizer(models.WordPiece(numbers, unk_token=unknown))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend

"""Rules of BERT's and CLIP's tokenizers, and the check that a tokenizer.json has no others."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers

from latentdiff.errors import ModelConfigError, shown

__all__ = ["SPECIAL_TOKENS", "TokenEntry", "bert_backend", "check_rules", "clip_backend", "content_of"]

TokenEntry = str | Mapping[str, Any]
"""A token in the JSON of a tokenizer: its text, or an object with that as "content" and how blanks are treated."""

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
# What CLIP takes for a word: endings after an apostrophe, runs of letters, single digits, runs of other signs.
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Normalizers and pre-tokenizers that a tokenizer.json may have, and those of them that insert text.
RULES = (
    *(
        "BertNormalizer",
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Lowercase",
        "Strip",
        "StripAccents",
        "Replace",
        "Prepend",
        "Nmt",
    ),
    *("Precompiled", "BertPreTokenizer", "ByteLevel", "Split", "Metaspace", "Whitespace", "WhitespaceSplit"),
    *("Punctuation", "Digits", "UnicodeScripts"),
)
GROWING, MAX_GROWING, MAX_RULES = ("Replace", "Prepend"), 4, 16
MAX_EXPRESSION = 1000  # characters
ATOM = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]")  # of an expression: an escaped sign, a class
REPEATED_GROUP = re.compile(r"\)[*+{]")  # what can be matched in exponentially many ways is one


def check_rules(content: Mapping[str, Any], place: str) -> None:
    """Raise ModelConfigError where a tokenizer.json has rules that could make of a prompt a text without bounds."""
    rules = [*_rules(content.get("normalizer")), *_rules(content.get("pre_tokenizer"))]
    growing = [rule for rule in rules if rule.get("type") in GROWING]
    longest = max((len(str(rule.get(key, ""))) for rule in growing for key in ("content", "prepend")), default=0)
    odd = [str(rule.get("type"))[:40] for rule in rules if rule.get("type") not in RULES]
    if odd or len(rules) > MAX_RULES or len(growing) > MAX_GROWING or longest > 1:
        reason = f"the rule {odd[0]}" if odd else f"{len(rules)} rules, {len(growing)} of which insert text"
        raise ModelConfigError(f"{place}: has {reason}, as no tokenizer of BERT, CLIP or T5 has; use another")
    for rule in rules:  # the library would print much about these before it fails
        if rule.get("type") == "Precompiled" and not _is_table(rule.get("precompiled_charsmap")):
            raise ModelConfigError(f"{place}: has no readable table in its rule Precompiled; get its files again")
        pattern = rule.get("pattern")
        expression = str(pattern.get("Regex", "")) if isinstance(pattern, Mapping) else ""
        if len(expression) > MAX_EXPRESSION or REPEATED_GROUP.search(ATOM.sub("x", expression)):
            raise ModelConfigError(f"{place}: has {shown(expression)}, which may match without end; use another")


def _is_table(given: object) -> bool:
    """Say whether a Precompiled rule has a table: in base64 the size of a trie, the trie, and replacements in UTF-8."""
    try:
        data = base64.b64decode(given, validate=True) if isinstance(given, str) else b""
        size = int.from_bytes(data[:4], "little")
        data[4 + size // 4 * 4 :].decode()
    except ValueError:
        return False
    return 4 <= size <= len(data) - 4


def _rules(tree: object) -> Iterator[Mapping[str, Any]]:
    """Yield the rules of a normalizer or pre-tokenizer, those within others too."""
    if not isinstance(tree, Mapping):
        return
    inner = [tree.get("normalizers"), tree.get("pretokenizers")]
    if tree.get("type") != "Sequence":
        yield tree
    for rules in inner:
        for rule in rules if isinstance(rules, list) else ():
            yield from _rules(rule)


def content_of(entry: TokenEntry) -> str:
    """Return the text of a token that is given as a string or an object."""
    return entry if isinstance(entry, str) else entry["content"]


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def clip_backend(vocabulary: dict[str, int], merges: str, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Return the tokenizer of CLIP with a vocabulary, given its vocab.json and merges.txt."""
    lines = [line for line in _lines(merges) if line and not line.startswith("#version")]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(first, second) for first, second in (line.split() for line in lines)],
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=content_of(settings.get("unk_token") or SPECIAL_TOKENS["BPE"]["unk_token"]),
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


def bert_backend(vocabulary: str, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Return the tokenizer of BERT with a vocabulary, given its vocab.txt."""
    numbers = {token: number for number, token in enumerate(_lines(vocabulary))}
    unknown = content_of(settings.get("unk_token") or SPECIAL_TOKENS["WordPiece"]["unk_token"])
    backend = tokenizers.Tokenizer(models.WordPiece(numbers, unk_token=unknown))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend

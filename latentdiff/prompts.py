"""Prompts: what text is accepted, how parts of it are weighted, and the file name a prompt suggests."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from latentdiff.errors import InputError

__all__ = ["MAX_PROMPT_LENGTH", "check_prompt", "check_prompts", "parse_weights", "prompt_notes", "slug"]

MAX_PROMPT_LENGTH = 4000  # characters
MAX_WEIGHT = 10
BRACKET_WEIGHT = 1.1
CLOSING = {")": "(", "]": "["}
# What web UIs read in a prompt and this package does not: pattern -> what it would mean there.
LITERAL_SYNTAX = {
    re.compile(r"\bBREAK\b"): "starting a new window",
    re.compile(r"\bAND\b"): "drawing several prompts together",
    re.compile(r"\[[^\[\]|]*:\s*\d*\.?\d+\s*\]"): "changing the prompt between steps",
    re.compile(r"\[[^\[\]]*\|[^\[\]]*\]"): "alternating between words",
    re.compile(r"\{[^{}]*\|[^{}]*\}"): "choosing one of several words",
    re.compile(r"<(?:lora|lyco|hypernet):[^<>]+>", re.IGNORECASE): "adding weights by the prompt (without --lora-dir)",
    re.compile(r"\bembedding:\S+"): "naming an embedding by its file",
    re.compile(r"__[\w/*-]+__"): "a wildcard",
    re.compile(r"^#.*|\s#\s.*", re.MULTILINE): "a comment",
}
# An escaped sign, a bracket, a weight with the bracket it closes, plain text.
WEIGHT_SIGNS = re.compile(
    r"\\(?P<plain>[()\[\]\\])|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|[^()\[\]\\:]+|."
)


def check_prompt(prompt: object, *, what: str = "prompt", allow_empty: bool = False) -> str:
    """Return `prompt` if it can be encoded.

    Args:
        prompt: text of at most `MAX_PROMPT_LENGTH` characters, without NUL and lone surrogates.
        what: how the error names it.
        allow_empty: accept text without any visible character (negative prompts may be empty).

    Raises:
        InputError: it is no text, too long, empty, or holds characters no encoder knows.
    """
    if not isinstance(prompt, str):
        raise InputError(f"{what} must be text, got {type(prompt).__name__}; pass a string")
    if len(prompt) > MAX_PROMPT_LENGTH:
        raise InputError(f"{what} must have at most {MAX_PROMPT_LENGTH} characters, got {len(prompt)}; shorten it")
    if "\0" in prompt:
        raise InputError(f"{what} must not hold NUL bytes, got one at position {prompt.index(chr(0))}; remove it")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise InputError(f"{what} must be valid Unicode text, got bytes that are not UTF-8; check the shell's encoding")
    if not allow_empty and not prompt.strip():
        raise InputError(f'{what} must not be empty, got {prompt[:20]!r}; say what to draw, as in "a red fox"')
    return prompt


def check_prompts(prompt: object, *, allow_empty: bool = False) -> list[str]:
    """Return one prompt or a sequence of prompts, empty ones or not, as a checked list; see `check_prompt`.

    Raises:
        InputError: a prompt is unusable, or there is none.
    """
    if isinstance(prompt, str):
        return [check_prompt(prompt, allow_empty=allow_empty)]
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        raise InputError(f"prompt must be text or a list of texts, got {type(prompt).__name__}; pass a string")
    if not prompt:
        raise InputError('prompt must not be empty, got an empty list; say what to draw, as in "a red fox"')
    names = [f"prompt {i + 1}" if len(prompt) > 1 else "prompt" for i in range(len(prompt))]
    return [check_prompt(one, what=name, allow_empty=allow_empty) for one, name in zip(prompt, names)]


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """Return the pieces of a prompt with their weights, in the notation of the web UIs of Stable Diffusion.

    `(fox)` weighs 1.1 times as much as the text around it, `[fox]` 1.1 times less, `(fox:1.3)` 1.3 times as much; they
    nest. A backslash makes a bracket plain text. A bracket that is never closed reaches to the end, and a closing one
    that was never opened is plain text.

    Raises:
        InputError: a weight is beyond 10.
    """
    pieces: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []  # brackets, and the number of the first piece in each

    def close(factor: float) -> None:
        start = opened.pop()[1]
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    for found in WEIGHT_SIGNS.finditer(prompt):
        sign, weight = found[0], found["weight"]
        last = opened[-1][0] if opened else ""
        if sign in ("(", "["):
            opened.append((sign, len(pieces)))
        elif weight is not None and last == "(":
            close(float(weight))
        elif sign in CLOSING and last == CLOSING[sign]:
            close(BRACKET_WEIGHT if sign == ")" else 1 / BRACKET_WEIGHT)
        else:
            pieces.append((found["plain"] or sign, 1.0))
    while opened:
        close(BRACKET_WEIGHT if opened[-1][0] == "(" else 1 / BRACKET_WEIGHT)
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if abs(weight) > MAX_WEIGHT:
            limits = f"from -{MAX_WEIGHT} to {MAX_WEIGHT}"
            raise InputError(
                f"a weight in a prompt must be {limits}, got {weight:g} for {text[:40]!r}; try 1.3, or \\( and \\) for "
                "brackets that belong to the text"
            )
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined or [("", 1.0)]


def prompt_notes(prompt: str) -> list[str]:
    """Return what a reader of a prompt may be surprised by: brackets around nothing, and syntax of other tools.

    There is one note for each syntax that is encoded as plain text here; a sign behind a backslash is text on purpose.
    The notes are for prompts whose weights are read.
    """
    text = re.sub(r"\\.", "", prompt, flags=re.DOTALL)
    found = [(pattern.search(text), meaning) for pattern, meaning in LITERAL_SYNTAX.items()]
    notes = [
        f"{match[0].strip()[:40]!r} in a prompt is encoded as text: {meaning} is not supported"
        for match, meaning in found
        if match is not None
    ]
    if prompt.strip() and not any(piece.strip() for piece, _ in parse_weights(prompt)):
        notes.append(f"{prompt[:40]!r} is brackets alone, drawn as an empty prompt; put a backslash before each")
    return notes


def slug(prompt: str, max_length: int = 40) -> str:
    """Return `prompt` as the stem of a file name: ASCII letters and digits joined by '-', "picture" if none is left."""
    ascii_text = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.findall(r"[a-z0-9]+", ascii_text)
    stem = ""
    for word in words:
        if stem and len(stem) + 1 + len(word) > max_length:
            break
        stem = f"{stem}-{word}" if stem else word[:max_length]
    return stem or "picture"

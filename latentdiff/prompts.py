"""Prompts: what text is accepted, and the file name a prompt suggests."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from latentdiff.errors import InputError

__all__ = ["MAX_PROMPT_LENGTH", "check_prompt", "check_prompts", "slug"]

MAX_PROMPT_LENGTH = 4000  # characters


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


def check_prompts(prompt: object) -> list[str]:
    """Return one prompt or a sequence of prompts as a checked list; see `check_prompt`.

    Raises:
        InputError: a prompt is unusable, or there is none.
    """
    if isinstance(prompt, str):
        return [check_prompt(prompt)]
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        raise InputError(f"prompt must be text or a list of texts, got {type(prompt).__name__}; pass a string")
    if not prompt:
        raise InputError('prompt must not be empty, got an empty list; say what to draw, as in "a red fox"')
    numbered = len(prompt) > 1
    return [check_prompt(one, what=f"prompt {i + 1}" if numbered else "prompt") for i, one in enumerate(prompt)]


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

"""Prompts: what is refused, with a remedy, and the file names they suggest."""

from __future__ import annotations

import pytest

from latentdiff.errors import InputError, suggest
from latentdiff.prompts import MAX_PROMPT_LENGTH, check_prompt, check_prompts, slug


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "must not be empty"),
        (" \n", "must not be empty"),
        ("a" * 10**6, "at most 4000 characters, got 1000000"),
        ("a\0fox", "NUL bytes, got one at position 1"),
        ("fox \udcff", "not UTF-8"),
        (7, "must be text or a list of texts, got int"),
        (b"fox", "bytes"),
        ([], "empty list"),
        (["a fox", ""], "prompt 2 must not be empty"),
    ],
)
def test_refused(prompt: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check_prompts(prompt)
    assert len(str(caught.value)) < 200


def test_accepted() -> None:
    assert check_prompts("ein Füchslein 🦊") == ["ein Füchslein 🦊"]
    assert check_prompts(("a", "b")) == ["a", "b"]
    assert check_prompt("x" * MAX_PROMPT_LENGTH)
    assert check_prompt("", allow_empty=True) == ""


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("A red fox!", "a-red-fox"),
        ("../../etc/passwd", "etc-passwd"),
        ("Füchse über Äpfeln", "fuchse-uber-apfeln"),
        ("狐", "picture"),
        ("x" * 90, "x" * 40),
        ("one two three four five six seven eight nine ten", "one-two-three-four-five-six-seven-eight"),
    ],
)
def test_slug(prompt: str, stem: str) -> None:
    assert slug(prompt) == stem


def test_suggest_names_the_nearest_or_all() -> None:
    assert suggest("dimm", ["ddim", "euler"]) == "; did you mean 'ddim'?"
    assert suggest("EULER", ["ddim", "euler"]) == "; did you mean 'euler'?"
    assert suggest("qqq", ["ddim", "euler"]) == "; choose one of ddim, euler"
    assert suggest("qqq", []) == ""

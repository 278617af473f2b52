"""Prompts: what is refused, with a remedy, and the file names they suggest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentdiff.errors import InputError, suggest
from latentdiff.prompts import MAX_PROMPT_LENGTH, check_prompt, check_prompts, parse_weights, prompt_notes, slug


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


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a red fox", [("a red fox", 1.0)]),
        ("", [("", 1.0)]),
        ("a (red) fox", [("a ", 1.0), ("red", 1.1), (" fox", 1.0)]),
        ("a [red] fox", [("a ", 1.0), ("red", 1 / 1.1), (" fox", 1.0)]),
        ("a (red:1.3) fox", [("a ", 1.0), ("red", 1.3), (" fox", 1.0)]),
        ("(red: .5 )", [("red", 0.5)]),
        ("(a (b:2) c)", [("a ", 1.1), ("b", 2.2), (" c", 1.1)]),
        ("((a))", [("a", 1.1 * 1.1)]),
        (r"a \(red\) fox \[x\] \\", [("a (red) fox [x] \\", 1.0)]),
        ("(a [b", [("a ", 1.1), ("b", 1 / 1.1 * 1.1)]),
        ("a) b] c:2) 16:9", [("a) b] c:2) 16:9", 1.0)]),
        ("[a:0.5]", [("a:0.5", 1 / 1.1)]),
        (r"a \n b", [(r"a \n b", 1.0)]),
    ],
)
def test_weights(prompt: str, pieces: list[tuple[str, float]]) -> None:
    found = parse_weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


def test_weights_beyond_reason_are_refused() -> None:
    with pytest.raises(InputError, match="must be from -10 to 10, got 11 for 'fox'"):
        parse_weights("a (fox:11)")
    with pytest.raises(
        InputError, match=r"got 64 for '1'; try 1\.3, or \\\( and \\\) for brackets that belong to the text"
    ):
        parse_weights("model car (1:64)")
    assert parse_weights(r"model car \(1:64\)") == [("model car (1:64)", 1.0)]


@pytest.mark.parametrize(
    ("prompt", "sign", "meaning"),
    [
        ("a fox BREAK a car", "BREAK", "starting a new window"),
        ("a cat AND a dog:0.8", "AND", "drawing several prompts together"),
        ("a [fox:car:0.5]", "[fox:car:0.5]", "changing the prompt between steps"),
        ("a [fox:car:10]", "[fox:car:10]", "changing the prompt between steps"),
        ("a [fox::0.5]", "[fox::0.5]", "changing the prompt between steps"),
        ("a [:car:.5 ]", "[:car:.5 ]", "changing the prompt between steps"),
        ("a [fox|car]", "[fox|car]", "alternating between words"),
        ("a {red|blue} fox", "{red|blue}", "choosing one of several words"),
        ("a fox <lora:style:0.8>", "<lora:style:0.8>", "adding weights by the prompt (without --lora-dir)"),
        ("a fox, embedding:easynegative", "embedding:easynegative", "naming an embedding by its file"),
        ("a __color__ fox", "__color__", "a wildcard"),
        ("# my fox\na fox", "# my fox", "a comment"),
        ("a fox # my fox", "# my fox", "a comment"),
    ],
)
def test_syntax_of_other_tools_is_told(prompt: str, sign: str, meaning: str) -> None:
    """Once for each syntax, however often it stands there; the prompt itself is read as before."""
    assert prompt_notes(prompt) == [f"{sign!r} in a prompt is encoded as text: {meaning} is not supported"]
    assert len(prompt_notes(f"{prompt}\n{prompt}")) == 1


@pytest.mark.parametrize(
    "prompt",
    [
        "a (red:1.2) fox, [dim], 16:9, {x}, salt and pepper, breakfast, a_b__c, #1 dad, C# code",
        r"a \[fox|car\], \{a|b\}, \<lora:x:1>",
        "",
        " ",
        r"\(\(",
        ")",
    ],
)
def test_other_text_is_not_told(prompt: str) -> None:
    assert prompt_notes(prompt) == []


@pytest.mark.parametrize("prompt", ["((((", "()", "[ ]", "(:1.3)", "[[(\n)"])
def test_brackets_around_nothing_are_told(prompt: str) -> None:
    (note,) = prompt_notes(prompt)
    assert note == f"{prompt!r} is brackets alone, drawn as an empty prompt; put a backslash before each"


@given(st.text(alphabet="ab ()[]:\\.123"))
def test_any_prompt_has_weights(prompt: str) -> None:
    try:
        pieces = parse_weights(prompt)
    except InputError:
        return
    assert all(-10 <= weight <= 10 for _, weight in pieces)
    if not set(prompt) & set("()[]\\"):
        assert pieces == [(prompt, 1.0)]

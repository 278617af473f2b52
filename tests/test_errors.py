"""Messages: one short, printable line, whatever was put into them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from latentdiff import errors
from latentdiff.errors import LONGEST_MESSAGE, InputError, LatentDiffError, printable, shown, suggest

CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LatentDiffError)]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_is_one_short_printable_line(kind: type[LatentDiffError]) -> None:
    error = kind("\x1b[2J\x1b]0;pwn\x07 one\r\ntwo\u202e\ud800" + "x" * 100_000 + "; try 8")
    assert str(error).isprintable()
    assert len(str(error)) <= LONGEST_MESSAGE
    assert str(error).startswith(r"\x1b[2J\x1b]0;pwn\x07 one two\u202e\ud800xx")
    assert str(error).endswith("xx; try 8")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (type(again), str(again)) == (kind, str(error))


def test_what_can_be_printed_stays_as_it_is() -> None:
    text = "Größe 512 must be “small” 🦊; try 狐"
    assert printable(text) == text
    assert printable(printable("\x1b" * 2000)) == printable("\x1b" * 2000)
    assert printable("while parsing\n  in line 3") == "while parsing in line 3"


class Odd:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


ITSELF: list[Any] = []
ITSELF.append(ITSELF)


@pytest.mark.parametrize(
    "value",
    [
        10**6000,
        -(10**6000),
        "x" * 100_000,
        "\x1b\n" * 50,
        b"\0" * 100_000,
        deep(100_000),
        list(range(10**6)),
        {"a" * 1000: "b" * 1000},
        Odd(),
        ITSELF,
        Path("a" * 1000),
        [10**6000],
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_value_is_shown_in_a_few_printable_characters(value: object) -> None:
    text = shown(value)
    assert 0 < len(text) <= 80
    assert text.isprintable()


def test_usual_values_are_shown_as_python_writes_them() -> None:
    for value in (7, -3.5, "fox", None, True, [1, "a"], {"a": 1}, (1, 2), b"ab"):
        assert shown(value) == repr(value)
    assert shown(10**6000) == "a whole number of some 6,001 digits"


def test_a_long_name_is_near_nothing() -> None:
    assert suggest("ddin", ["ddim", "euler"]) == "; did you mean 'ddim'?"
    assert suggest("d" * 10**7, ["ddim", "euler"]) == "; choose one of ddim, euler"


def test_an_input_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"^no$"):
        raise InputError("no")

"""Pictures, sets of pictures and messages that nobody should pass: read, or refused in a short line."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from latentdiff.errors import LONGEST_MESSAGE, InputError, LatentDiffError, printable, shown
from latentdiff.files import parse_json
from tests.hostile_inputs import Workplace, try_picture, try_set

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda one: st.lists(one))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    monkeypatch.chdir(tmp_path)
    return Workplace(tmp_path)


@pytest.mark.parametrize("door", [try_picture, try_set], ids=["picture", "set"])
@FEW
@given(seed=st.integers(0, 2**32))
def test_it_is_read_or_refused_in_a_short_line(workplace: Workplace, door: object, seed: int) -> None:
    assert callable(door)
    try:
        door(workplace, random.Random(seed))
    except LatentDiffError as error:
        assert 0 < len(str(error)) <= LONGEST_MESSAGE
        assert str(error).isprintable()


@given(text=st.text(st.characters(exclude_categories=())))
@example("\x1b[2J\n\ud800" * 1000)
def test_any_text_can_be_printed(text: str) -> None:
    line = printable(text)
    assert len(line) <= LONGEST_MESSAGE
    assert line.isprintable()
    assert printable(line) == line


@given(value=JSON | st.binary() | st.dictionaries(st.text(), JSON))
def test_any_value_can_be_shown(value: object) -> None:
    assert len(shown(value)) <= 80
    assert shown(value).isprintable()


@given(data=st.binary() | st.text().map(str.encode))
@example(b"[" * 100_000)
@example(b"9" * 5000)
def test_any_bytes_are_json_or_refused(data: bytes) -> None:
    try:
        parse_json(data, "x")
    except InputError as error:
        assert str(error).startswith("x is not JSON that can be read")

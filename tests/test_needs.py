"""Tests that are left out where something is not installed, and must not be where all must run."""

from __future__ import annotations

import pytest

from tests.needs import ALL, leave_out


def test_a_test_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ALL, raising=False)
    with pytest.raises(pytest.skip.Exception, match="needs a browser"):
        leave_out("needs a browser")


def test_where_every_test_must_run_none_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALL, "1")
    with pytest.raises(pytest.fail.Exception, match="needs a browser, and LATENTDIFF_ALL_TESTS is set"):
        leave_out("needs a browser")

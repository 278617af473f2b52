"""A few thousand mutated files and folders; `tests/benchmarks/fuzz_loader.py` runs many more."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from latentdiff.checkpoints import single_file
from tests.benchmarks import fuzz_loader
from tests.checkpoints.oracle import rules


def test_mutated_models_are_judged_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_loader, "SLOW", 5.0)  # other tests may be running
    for name in ("families", "clip_tokenizer"):  # which the script replaces
        monkeypatch.setattr(single_file, name, getattr(single_file, name))
    monkeypatch.chdir(tmp_path)
    shown: list[str] = []
    before = signal.getsignal(signal.SIGALRM)
    try:
        figures = fuzz_loader.fuzz(tmp_path / "fuzz", 1, range(3000), shown.append)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert shown == []
    assert not (tmp_path / "executed").exists()
    assert {"accepted", "UnsafeModelError", "ModelFormatError", "ModelValueError"} <= figures["outcomes"].keys()
    assert any(kind.startswith("folder") for kind in figures["kinds"]) and "single file" in figures["kinds"]


def test_a_failure_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge itself: rules that let nothing pass, and an error that is none of ours."""
    assert rules(b"") is None
    assert fuzz_loader._judge({}, {}, None) is None
    assert fuzz_loader._judge(fuzz_loader.ModelLoadError, {}, None) == "wrongly accepted"
    assert str(fuzz_loader._judge({}, {}, KeyError("x"))).startswith("crash")

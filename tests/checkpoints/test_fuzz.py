"""A few thousand mutated files and folders; `tests/benchmarks/fuzz_loader.py` runs many more."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from safetensors import SafetensorError, deserialize

from latentdiff.checkpoints import single_file
from latentdiff.errors import ModelLoadError
from tests.benchmarks import fuzz_loader
from tests.checkpoints.header_mutations import MUTATIONS, good
from tests.checkpoints.oracle import rules


@pytest.mark.long
def test_mutated_models_are_judged_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLOW", "ALARM"):  # other tests may be running
        monkeypatch.setattr(fuzz_loader, name, 60.0)
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


def test_the_rules_are_stricter_than_the_reference() -> None:
    """What they accept, the reference reads to the same bytes; it also reads what is ambiguous, which they refuse."""
    stricter = 0
    for number in range(3000):
        rng = random.Random(number)
        content = rng.choice(MUTATIONS)(rng, *good(rng))
        try:
            theirs = {name: (held["shape"], bytes(held["data"])) for name, held in deserialize(content)}
        except SafetensorError:
            assert rules(content) is None
            continue
        ours = rules(content)
        stricter += ours is None
        assert ours is None or {name: (list(shape), raw) for name, (_, shape, raw) in ours.items()} == theirs
    assert 0 < stricter < 300


def test_a_failure_is_found() -> None:
    """By the judge, who is judged here."""
    assert rules(b"") is None
    assert fuzz_loader._judge({}, {}, None) is None
    assert fuzz_loader._judge(ModelLoadError, {}, None) == "wrongly accepted"
    assert str(fuzz_loader._judge({}, {}, KeyError("x"))).startswith("crash")

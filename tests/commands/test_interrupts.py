"""Ctrl-C while modules are loaded ends the process at once, without a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from latentdiff import Pipeline
from latentdiff.interrupts import ending_at_once

ROOT = Path(__file__).parents[2]
PRESSED = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)

class Press:
    module = sys.argv.pop(1)

    def find_spec(self, name, *_):
        if name == self.module:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Press())
runpy.run_module("latentdiff", run_name="__main__")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are those of POSIX")
@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("latentdiff.cli", ["--version"]),
        ("numpy", ["--version"]),
        ("torch", ["generate", "a fox"]),
        ("torch", ["upscale", "fox.png"]),
        ("torch", ["replay", "fox.png"]),
        ("torch", ["plan"]),
        ("torch", ["inspect"]),
        ("torch", ["convert", "embedded", "model"]),
    ],
)
def test_ctrl_c_at_an_import_says_nothing(module: str, call: list[str], pipe: Pipeline, tmp_path: Path) -> None:
    pipe("fox", num_inference_steps=2).save(tmp_path / "fox.png")
    done = subprocess.run(
        [sys.executable, "-c", PRESSED, module, *call],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["fox.png"]


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_another_meaning_of_ctrl_c_stays(handler: Any) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        with ending_at_once():
            assert signal.getsignal(signal.SIGINT) is handler
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with ending_at_once():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)

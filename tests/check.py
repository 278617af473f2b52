"""Run every check of the repository in turn and stop at the first that fails.

python tests/check.py                # lint, formatting, types, and all tests but the long ones
python tests/check.py --quick        # the same, with the tests of the parts that everything else stands on
python tests/check.py --all          # the same, with every test, as CI runs it
python tests/check.py tests/models   # the same, with pytest given these arguments
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINT = (("ruff", "check", "."), ("ruff", "format", "--check", "."))
TYPES = ("mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache"), "latentdiff")
# A process of pytest-xdist that dies is not replaced, as pytest would wait for ever for what it had in hand.
TESTS = ("pytest", "-q", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "--max-worker-restart", "0")
WITHOUT_LONG = ("-m", "not long")
QUICK = ("tests/diffusion", "tests/models", "tests/generation", "tests/test_imports.py", "tests/test_cli.py")
# Two processes of tests share what are often two cores; those that wait leave them to the others.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def main() -> int:
    """Return the exit code of the first check that fails, or 0."""
    chosen = sys.argv[1:]
    match chosen[:1]:
        case []:
            chosen = [*WITHOUT_LONG]
        case ["--quick"]:
            chosen = [*QUICK, *chosen[1:]]
        case ["--all"]:
            chosen = chosen[1:]
    for command in LINT:
        if code := run(command, ROOT):
            return code
    with tempfile.TemporaryDirectory() as installed:
        lay_out(Path(installed))
        if code := run(TYPES, Path(installed)):
            return code
    return run((*TESTS, *chosen), ROOT)


def run(command: tuple[str, ...], folder: Path) -> int:
    """Run a Python module with arguments in a folder and return its exit code."""
    print("$", *command, flush=True)
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=os.environ | ENVIRONMENT, check=False
    ).returncode


def lay_out(folder: Path) -> None:
    """Copy the package as a wheel has it, with training/ inside, because type checkers find modules by their place."""
    leave_out = shutil.ignore_patterns("__pycache__", "training.py")
    shutil.copytree(ROOT / "latentdiff", folder / "latentdiff", ignore=leave_out)
    shutil.copytree(ROOT / "training", folder / "latentdiff/training", ignore=shutil.ignore_patterns("__pycache__"))


if __name__ == "__main__":
    sys.exit(main())

"""Run every check of the repository in turn and stop at the first that fails.

python tests/check.py                # lint, formatting, types, tests
python tests/check.py tests/models   # the same, with pytest given these arguments
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHECKS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy", "latentdiff", "training"),
    ("pytest", "-q", "-n", "2", "--dist", "loadfile"),
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}  # two processes of tests share what are often two cores


def main() -> int:
    """Return the exit code of the first check that fails, or 0."""
    root = Path(__file__).resolve().parent.parent
    for tool, *arguments in CHECKS:
        extra = sys.argv[1:] if tool == "pytest" else []
        print("$", tool, *arguments, *extra, flush=True)
        command = [sys.executable, "-m", tool, *arguments, *extra]
        code = subprocess.run(command, cwd=root, env=os.environ | ENVIRONMENT, check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())

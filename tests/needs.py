"""Tests that need what is not installed are left out, with one line, unless every test must run, as it must in CI."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import pytest

ALL = "LATENTDIFF_ALL_TESTS"  # set where nothing may be left out


def leave_out(reason: str, *, module: bool = False) -> NoReturn:
    """Skip a test, or all of a module; where every test must run, let it fail."""
    if os.environ.get(ALL):
        pytest.fail(f"{reason}, and {ALL} is set", pytrace=False)
    pytest.skip(reason, allow_module_level=module)


def needing(packages: Sequence[str]) -> Callable[[Path, pytest.Collector], pytest.Module | None]:
    """Return the hook `pytest_pycollect_makemodule` of a folder whose tests need packages that an extra installs."""
    missing = ", ".join(name for name in packages if find_spec(name) is None)

    class Left(pytest.Module):
        """The tests of a file that are not run."""

        def collect(self) -> Any:
            """Say why not."""
            leave_out(f"needs {missing}, which the extra dev installs", module=True)

    def make(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
        return Left.from_parent(parent, path=module_path) if missing else None

    return make

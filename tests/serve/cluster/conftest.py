"""These tests need what a server needs, and Ray Serve."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.needs import needing
from tests.serve.http.conftest import NEEDED

pytest_pycollect_makemodule = needing(NEEDED)
RAY = find_spec("ray") is not None  # which is left out where it is not installed, as everywhere

if RAY and all(find_spec(name) for name in NEEDED):
    with warnings.catch_warnings():  # of its own code, by newer releases of pydantic
        warnings.simplefilter("ignore")
        import ray.serve  # noqa: F401


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the tests out without Ray."""
    return True if not RAY and collection_path.name.startswith("test_") else None

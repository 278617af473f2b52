"""The start of the command line: how its threads wait, which they must know before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from latentdiff.__main__ import SPIN, SPINS, let_threads_give_way


@pytest.mark.parametrize("given", [{"OMP_WAIT_POLICY": "active"}, {SPIN: "7"}, {SPIN: ""}])
def test_whoever_has_chosen_how_threads_wait_keeps_that(given: dict[str, str]) -> None:
    environment = dict(given)
    let_threads_give_way(environment)
    assert environment == given


def test_it_is_set_before_torch_is_loaded() -> None:
    code = (
        "import os, sys\n"
        "from latentdiff.__main__ import main\n"
        f"assert {SPIN!r} not in os.environ\n"
        "sys.argv = ['latentdiff', 'plan', '--steps', '1']\n"
        "assert main() == 0 and 'torch' in sys.modules\n"
        f"print(os.environ[{SPIN!r}])\n"
    )
    without = {name: value for name, value in os.environ.items() if name not in (SPIN, "OMP_WAIT_POLICY")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=without)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == SPINS

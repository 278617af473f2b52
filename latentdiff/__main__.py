"""Start the command line, as `latentdiff` or `python -m latentdiff`."""

import os
import sys
from collections.abc import MutableMapping

from latentdiff.interrupts import ending_at_once

SPIN, POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"
SPINS = "3000"  # on a busy machine all but as good as none, on an idle one all but as good as the usual 300,000


def main() -> int:
    """Run one command and return its exit code."""
    let_threads_give_way(os.environ)
    with ending_at_once():
        from latentdiff import cli
    return cli.main()


def let_threads_give_way(environment: MutableMapping[str, str]) -> None:
    """Let the threads that torch computes with wait for each other without holding a core that others need.

    They read it when torch is loaded. Whoever has chosen how they wait keeps that.
    """
    if POLICY not in environment and SPIN not in environment:
        environment[SPIN] = SPINS


if __name__ == "__main__":
    sys.exit(main())

"""Start the command line, as `latentdiff` or `python -m latentdiff`."""

import sys

from latentdiff.interrupts import ending_at_once


def main() -> int:
    """Run one command and return its exit code."""
    with ending_at_once():
        from latentdiff import cli
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())

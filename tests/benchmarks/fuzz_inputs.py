"""Try input that nobody should pass at every door, offline, against what is promised of each refusal.

    python tests/benchmarks/fuzz_inputs.py
    python tests/benchmarks/fuzz_inputs.py --cases 2000 --seed 7 --door sets
    python tests/benchmarks/fuzz_inputs.py --seed 7 --door sets --only 123

Every case is drawn from (seed, door, number). Faults are: an error that is none of ours, an exit code other than 0, 2,
3, 4 and 130, a case that takes over a minute or over 3 GB, and a refusal of more than two lines or 600 characters, or
that a terminal would obey. Prints the first case of each kind of fault, counts, and a JSON line; ends with 1 if there
was any.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}
sys.path.insert(0, str(Path(__file__).parents[2]))

from latentdiff.errors import LatentDiffError
from tests.hostile_inputs import DOORS, Workplace

CODES = {0, 2, 3, 4, 130}
SECONDS, BYTES, LINES, CHARACTERS = 60, 3 * 2**30, 2, 600
# What cases are spread over; loading and drawing take longer than reading.
SHARES = {"arguments": 1, "records": 6, "configs": 6, "adapters": 4, "pictures": 12, "sets": 6}


class Outcome(NamedTuple):
    """What came of a case: whether it was refused, and its faults by kind."""

    refused: bool
    faults: dict[str, str]


class TooLongError(BaseException):
    """A case takes more than a minute."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--door", choices=list(DOORS), help="only this one")
    parser.add_argument("--only", type=int, help="only the case of this number, of --door")
    arguments = parser.parse_args()
    doors = [arguments.door] if arguments.door else list(DOORS)
    total = sum(SHARES[door] for door in doors)
    counts: dict[str, Counter[str]] = {door: Counter() for door in doors}
    first: dict[str, str] = {}
    begin = time.perf_counter()
    signal.signal(signal.SIGALRM, _stop)
    with tempfile.TemporaryDirectory() as place, _offline():
        os.chdir(place)
        work = Workplace(Path(place))
        for door in doors:
            cases = -(-arguments.cases * SHARES[door] // total)
            for number in range(cases) if arguments.only is None else [arguments.only]:
                outcome = attempt(lambda rng, door=door: DOORS[door](work, rng), f"{arguments.seed}/{door}/{number}")
                counts[door]["cases"] += 1
                counts[door]["refused"] += outcome.refused
                for kind, text in outcome.faults.items():
                    counts[door][kind.partition(":")[0]] += 1
                    if f"{door} {kind}" not in first:
                        first[f"{door} {kind}"] = text
                        print(f"--door {door} --only {number}: {kind}: {text}", flush=True)
            print(f"{door}: {dict(counts[door])}", flush=True)
        os.chdir("/")
    kinds = ("traceback", "code", "hang", "memory", "reply")
    figures = {"seed": arguments.seed, "seconds": round(time.perf_counter() - begin)}
    figures |= {kind: sum(count[kind] for count in counts.values()) for kind in ("cases", "refused", *kinds)}
    print(json.dumps(figures | {"kinds_of_faults": len(first)}))
    return int(bool(first))


def attempt(act: Callable[[random.Random], int | None], seed: str) -> Outcome:
    """Try one case and return what came of it.

    Args:
        act: tries it and returns an exit code, or None where there is none.
        seed: that it follows from.
    """
    said, faults, code = io.StringIO(), {}, 0
    _forget_peak()
    signal.alarm(SECONDS)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(said), warnings.catch_warnings():
            code = act(random.Random(seed)) or 0
    except LatentDiffError as error:
        code = error.exit_code
        said.write(f"latentdiff: {error}\n")
    except TooLongError:
        faults["hang"] = f"over {SECONDS} s"
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0
    except BaseException as error:  # some libraries raise what is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"traceback: {type(error).__name__} in {Path(place.filename).name}:{place.lineno}"
        faults[kind] = ascii(str(error))[:200]
    finally:
        signal.alarm(0)
    if code not in CODES:
        faults["code"] = str(code)
    if (peak := _peak()) > BYTES:
        faults["memory"] = f"{peak / 2**30:.1f} GB"
    if code and (fault := reply_fault(said.getvalue())):
        faults[f"reply: {fault}"] = ascii(said.getvalue())[:300]
    return Outcome(bool(code), faults)


def reply_fault(said: str) -> str | None:
    """Return what is wrong with what a refusal said, None where it is as promised."""
    lines = said.rstrip("\n").split("\n")
    if not said.strip():
        return "nothing is said"
    if len(lines) > LINES:
        return "lines"
    if len(said) > CHARACTERS:
        return "length"
    return None if all(line.isprintable() for line in lines) else "signs"


def _stop(signal_number: int, frame: FrameType | None) -> NoReturn:
    raise TooLongError


@contextmanager
def _offline() -> Iterator[None]:
    """Let nothing reach a network."""

    def refuse(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("socket.connect", "socket.getaddrinfo"):
            raise OSError("offline")

    sys.addaudithook(refuse)
    yield


def _forget_peak() -> None:
    """Begin to measure the peak of memory anew, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Return the peak of memory since then, in bytes; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


if __name__ == "__main__":
    sys.exit(main())

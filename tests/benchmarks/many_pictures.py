"""Peak memory of generating many pictures, and what an interrupt leaves of them.

python tests/benchmarks/many_pictures.py
python tests/benchmarks/many_pictures.py --count 1000 --steps 25

Generates 10 and then COUNT pictures with the embedded model in processes of their own, compares their peak memory, then
kills a third one (SIGKILL) halfway and counts the pictures that are there and whole.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

MEASURE = (
    "import resource, sys; from latentdiff.cli import main; code = main(sys.argv[1:]); "
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(code)"
)


def command(folder: Path, count: int, steps: int) -> list[str]:
    return ["generate", "a red fox", "-n", str(count), "--steps", str(steps), "-o", str(folder)]


def peak(count: int, steps: int) -> tuple[int, float]:
    """Return the peak memory in MB of generating pictures, and the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        call = [sys.executable, "-c", MEASURE, *command(Path(folder), count, steps)]
        run = subprocess.run(call, check=True, capture_output=True, text=True)
        assert len(list(Path(folder).glob("*.png"))) == count
        return int(run.stderr.split()[-1]) // 1024, time.perf_counter() - started


def killed(count: int, steps: int) -> int:
    """Kill a command when half of its pictures are there; return how many whole ones are left."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        process = subprocess.Popen(
            [sys.executable, "-m", "latentdiff", *command(place, count, steps)], stdout=subprocess.DEVNULL
        )
        while len(list(place.glob("*.png"))) < count // 2 and process.poll() is None:
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        for path in place.glob("*.png"):
            with Image.open(path) as picture:
                picture.load()
        return len(list(place.glob("*.png")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    (few, _), (many, seconds) = peak(10, options.steps), peak(options.count, options.steps)
    left = killed(options.count, options.steps)
    print(
        f"10 pictures {few} MB, {options.count} pictures {many} MB in {seconds:.0f} s; killed halfway {left} are whole"
    )
    print(json.dumps({"few_mb": few, "many_mb": many, "difference_mb": many - few, "seconds": seconds, "left": left}))


if __name__ == "__main__":
    main()

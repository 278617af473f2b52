"""Load mutated model files, folders and single files, each with a judge of its own: what is refused, and how.

    python tests/benchmarks/fuzz_loader.py
    python tests/benchmarks/fuzz_loader.py --files 2000 --seed 7
    python tests/benchmarks/fuzz_loader.py --seed 7 --only 1234

Every case is drawn from (seed, index). A failure is an error that is no `ModelLoadError`, a case that computes for more
than a second or waits for five, one that is accepted or refused against the rules, weights that differ in a bit, or a
message that is not one short printable line. Prints each of them, counts, speed and peak memory, and a JSON line; ends
with 1 if any failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from latentdiff.checkpoints import load_pipeline, read_header, single_file
from latentdiff.checkpoints.weights import read_weights
from latentdiff.errors import ModelLoadError, UnsafeModelError
from tests.checkpoints.folder_mutations import CHANGES, Folder
from tests.checkpoints.header_mutations import MUTATIONS, archives, good, many
from tests.checkpoints.oracle import FLOATS, bitwise_equal, finite, rules, tensor
from tests.checkpoints.single_mutations import SingleFile
from tests.checkpoints.small_models import BASE, VARIANTS, build_folders, weights_of

SLOW, ALARM = 1.0, 5.0  # seconds of computing that count as a hang, and of waiting after which a case is ended
LONGEST_MESSAGE = 1000
FOLDERS, SINGLE_FILES, SPECIAL = 0.015, 0.005, 0.03  # shares of all cases; the rest are files with a mutated header
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Case(NamedTuple):
    """What is loaded, what the rules say about it, and the kind it is counted under."""

    kind: str
    load: Callable[[], dict[str, Any]]
    verdict: dict[str, Any] | type[ModelLoadError]


class Hang(BaseException):
    """Raised in a case that does not end."""


class Fuzzer:
    """Makes cases in a folder of its own.

    Args:
        place: empty folder, in memory where there is such a one.
        seed: of all cases.
    """

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.seed = place, seed
        self.file = place / "model.safetensors"
        place.mkdir(exist_ok=True)
        self.folders = {folder: weights_of(load_pipeline(folder)) for folder in build_folders(place / "good")}
        self.singles = {family: SingleFile(family) for family in single_file.MARKS}
        shapes = {family: single.shape for family, single in self.singles.items()}
        tokenizers = {pad: single_file.clip_tokenizer(pad) for pad in ("!", "<|endoftext|>")}
        # Configurations and vocabulary come with the package: the first are too large here, the second too slow.
        single_file.families = lambda: shapes  # type: ignore[assignment]
        single_file.clip_tokenizer = lambda pad: tokenizers[pad]

    def case(self, index: int) -> Case:
        """Return the case of a number, with its files in place."""
        rng = random.Random(f"{self.seed} {index}")
        share = rng.random()
        if share < FOLDERS:
            return self.folder_case(rng)
        if share < FOLDERS + SINGLE_FILES:
            return self.single_case(rng)
        if share < FOLDERS + SINGLE_FILES + SPECIAL:
            return self.special_case(rng)
        return self.header_case(rng)

    def header_case(self, rng: random.Random) -> Case:
        entries, data = good(rng)
        mutation = many if rng.random() < 0.0001 else rng.choice(MUTATIONS)
        content = mutation(rng, entries, data)
        self.file.write_bytes(content)
        dtype = rng.choice(DTYPES)

        def load() -> dict[str, Any]:
            tensors = read_header(self.file).tensors
            floats = {name: info for name, info in tensors.items() if info.dtype in FLOATS}
            return {**tensors, **read_weights(self.file, floats, dtype, "cpu")}

        verdict: Any = rules(content) or ModelLoadError
        if isinstance(verdict, dict):
            verdict = {n: tensor(*held).to(dtype) if held[0] in FLOATS else held[:2] for n, held in verdict.items()}
            if not all(finite(held) for held in verdict.values() if isinstance(held, torch.Tensor)):
                verdict = ModelLoadError
        return Case(f"header: {mutation.__name__}", load, verdict)

    def special_case(self, rng: random.Random) -> Case:
        """An archive in disguise, or a place that is no file."""
        kind = rng.choice(("archive", "archive", "archive", "link", "pipe", "folder", "large", "text"))
        if kind == "archive":
            name, content = rng.choice(list(archives().items()))
            self.file.write_bytes(content[: rng.choice((None, 300))] + rng.randbytes(rng.randrange(64)))
            return Case(f"special: {name}", self.load_file(self.file), UnsafeModelError)
        if kind == "link":
            self.file.unlink(missing_ok=True)
            self.file.symlink_to(rng.choice((self.file.name, "nowhere", "/dev/zero", "/proc/self/mem", "..")))
        elif kind == "pipe":
            self.file.unlink(missing_ok=True)
            os.mkfifo(self.file)
        elif kind == "folder":
            self.file.unlink(missing_ok=True)
            self.file.mkdir()
        elif kind == "large":  # headers and data that are claimed, in a file that is a hole
            length = rng.choice((2**24, 2**24 + 1, 2**31, 2**40))
            start = rng.choice((b'{"a":', b"{" + b"[" * 600, b'{"' + b"x" * 600))
            self.file.write_bytes(length.to_bytes(8, "little") + start)
            os.truncate(self.file, rng.choice((2**24 + 8, 2**24 + 9, 2**32)))
        else:
            self.file.write_text(rng.choice(("", "a red fox", "{}", "[]")) * rng.randrange(99))
        return Case(f"special: {kind}", self.load_file(self.file), ModelLoadError)

    def folder_case(self, rng: random.Random) -> Case:
        source = rng.choices(list(self.folders), weights=(12, 2, 1, 2, 3))[0]
        root = self.place / "copies" / source.name
        shutil.copytree(source, root)
        base = source.with_name(BASE)
        if source.name in VARIANTS:
            shutil.copytree(base, root.with_name(BASE))
        os.link(source.parent / "outside.safetensors", root.parent / "outside.safetensors")
        dtype = rng.choice(DTYPES)
        weights, theirs = ({name: held.to(dtype) for name, held in self.folders[one].items()} for one in (source, base))
        folder = Folder(root, weights, dtype, theirs)
        change = rng.choice(CHANGES)
        verdict = change(rng, folder)
        return Case(f"folder: {change.__name__}", lambda: weights_of(load_pipeline(root, dtype)), verdict)

    def single_case(self, rng: random.Random) -> Case:
        single = rng.choice(list(self.singles.values()))
        content = single.changed(rng)
        self.file.write_bytes(content)
        dtype = rng.choice(DTYPES)
        return Case("single file", self.load_file(self.file, dtype), single.verdict(content, dtype))

    @staticmethod
    def load_file(file: Path, dtype: torch.dtype = torch.float32) -> Callable[[], dict[str, Any]]:
        return lambda: weights_of(single_file.load_single_file(file, dtype))

    def clear(self) -> None:
        """Remove the files of a case."""
        if self.file.is_symlink() or not self.file.is_dir():
            self.file.unlink(missing_ok=True)
        else:
            self.file.rmdir()
        shutil.rmtree(self.place / "copies", ignore_errors=True)

    def run(self, index: int) -> tuple[str, str, str | None]:
        """Run one case and return its kind, what came of it, and what is wrong with that."""
        case = self.case(index)
        start = time.process_time()
        signal.setitimer(signal.ITIMER_REAL, ALARM)
        error: BaseException | None = None
        found: dict[str, Any] = {}
        try:
            found = case.load()
        except BaseException as raised:
            if isinstance(raised, KeyboardInterrupt):
                raise
            error = raised
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        seconds = time.process_time() - start
        self.clear()
        outcome = "accepted" if error is None else type(error).__name__
        if seconds > SLOW or isinstance(error, Hang):
            return case.kind, outcome, f"hang: {seconds:.1f} s"
        return case.kind, outcome, _judge(case.verdict, found, error)


def _judge(verdict: Any, found: dict[str, Any], error: BaseException | None) -> str | None:
    if error is None:
        if not isinstance(verdict, dict):
            return "wrongly accepted"
        return None if _same(found, verdict) else "wrong weights"
    if not isinstance(error, ModelLoadError):
        return f"crash: {error!r:.300}"
    if isinstance(verdict, dict):
        return f"wrongly refused: {error}"
    if not isinstance(error, verdict):
        return f"wrong error: {error!r}"
    text = str(error)
    return None if text.isprintable() and len(text) <= LONGEST_MESSAGE else f"bad message: {len(text)} {text!r:.300}"


def _same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    if found.keys() != expected.keys():
        return False
    return all(
        bitwise_equal(found[name], held)
        if isinstance(held, torch.Tensor)
        else (found[name].dtype, found[name].shape) == held
        for name, held in expected.items()
    )


def end_hang(number: int, frame: FrameType | None) -> None:
    """End a case when its time is up."""
    raise Hang


def fuzz(place: Path, seed: int, numbers: range, show: Callable[[str], None]) -> dict[str, Any]:
    """Run cases and return the counts; every failure is shown with how to run it again."""
    signal.signal(signal.SIGALRM, end_hang)
    fuzzer = Fuzzer(place, seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kinds: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    start, computed = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a single file of 2.x says what it is taken for
        for index in numbers:
            kind, outcome, wrong = fuzzer.run(index)
            kinds[kind] += 1
            outcomes[outcome] += 1
            if wrong is not None:
                failures[wrong.partition(":")[0]] += 1
                show(f"{kind}: {wrong}\n    again: python tests/benchmarks/fuzz_loader.py --seed {seed} --only {index}")
    seconds, computed = time.perf_counter() - start, time.process_time() - computed
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    names = ("crash", "hang", "wrongly accepted", "wrongly refused", "wrong weights", "wrong error", "bad message")
    return {
        "files": len(numbers),
        "seed": seed,
        "failures": {name: failures[name] for name in names},
        "seconds": round(seconds, 1),
        "files_per_second": round(len(numbers) / seconds),
        "files_per_cpu_second": round(len(numbers) / computed),
        "peak_rss_mb": round(after / 1024),
        "peak_rss_before_mb": round(before / 1024),
        "outcomes": dict(outcomes.most_common()),
        "kinds": dict(kinds.most_common()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one case")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    numbers = range(arguments.files) if arguments.only is None else range(arguments.only, arguments.only + 1)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        os.chdir(folder)  # where a pickle that runs leaves its mark
        figures = fuzz(Path(folder), arguments.seed, numbers, print)
        executed = (Path(folder) / "executed").exists()
        os.chdir("/")
    for name in ("kinds", "outcomes", "failures"):
        print(f"{name}:", ", ".join(f"{key} {count}" for key, count in figures[name].items()))
    print(json.dumps({**figures, "executed": executed}))
    return int(executed or any(figures["failures"].values()))


if __name__ == "__main__":
    sys.exit(main())

"""Measure what runs a model fastest on this machine, and what that costs: every engine in every precision, in turns."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from latentdiff.devices import device_name, fast_dtypes, resolve_device
from latentdiff.engine.execution import Execution, settle
from latentdiff.engine.openvino_engine import installed
from latentdiff.errors import InputError
from latentdiff.pipeline import Pipeline

__all__ = ["Bench", "Row", "candidates", "load_average", "measure"]

PROMPTS = ("a red fox", "a blue car", "a birthday cake", "a house")  # of the pictures that are compared
ENGINES = ("eager", "openvino", "graphs", "compile")
# `latentdiff` in a process of its own, which tells last how much memory it held.
GENERATE = """
import sys
from latentdiff.__main__ import main
code = main()
from latentdiff.memory import peak_of_process  # which loads no torch
print(peak_of_process())
sys.exit(code)
"""
SIDE = 32  # of the picture that a model which enlarges is given


@dataclass
class Row:
    """What was measured of one engine in one precision.

    Attributes:
        step: seconds of a step of one guided picture, medians as all times are.
        picture: seconds of a picture.
        shell: seconds from the shell to the file; None where it was not asked for.
        memory: most bytes that the process which wrote it held.
        psnr: of pictures against those of eager in float32, in decibels, the median; None where they are the same.
        worst: the lowest.
        largest: difference of a channel, of 1.
    """

    engine: str
    dtype: str
    step: float = 0.0
    picture: float = 0.0
    shell: float | None = None
    memory: int | None = None
    psnr: float | None = None
    worst: float | None = None
    largest: float = 0.0


@dataclass
class Bench:
    """All rows, and what they were measured on; `refused` says why some are missing."""

    model: str
    device: str
    processor: str
    threads: int
    load: float | None
    rounds: int
    rows: list[Row] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the same, JSON-ready."""
        return asdict(self)


def candidates(
    device: str | None, engines: Sequence[str], dtypes: Sequence[str], refused: list[str]
) -> Iterator[Execution]:
    """Yield how the networks could be run, eager in float32 first, by which the others are judged.

    Args:
        device: see `Pipeline.from_pretrained`.
        engines, dtypes: that were asked for; none for all that begin at once, and all that the device computes in.
        refused: gets a line for each that does not run here.
    """
    place = resolve_device(device)
    if not engines:
        more = {"cpu": ["openvino"] if installed() else [], "cuda": ["graphs"]}
        engines = ["eager", *more.get(place.type, [])]
    dtypes = dtypes or fast_dtypes(place)
    yield settle(place, "float32", "eager")
    for engine in engines:
        for dtype in dtypes:
            if (engine, dtype) == ("eager", "float32"):
                continue
            try:
                yield settle(place, dtype, engine)
            except (InputError, ImportError) as error:
                refused.append(f"{engine} in {dtype}: {error}")


def measure(
    model: str | None,
    device: str | None = None,
    *,
    engines: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    rounds: int = 5,
    steps: int | None = None,
    shell: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Bench:
    """Measure every engine in every precision, in turns, so that whatever else runs slows all of them.

    Args:
        model: see `Pipeline.from_pretrained`.
        device, engines, dtypes: see `candidates`.
        rounds: of all rows.
        steps: of a picture; None for the model's own.
        shell: measure `latentdiff generate` as well, in processes of its own.
        say: is told what is done.

    Raises:
        InputError: the model or the device cannot be used, or eager is the only one that can.
    """
    refused: list[str] = []
    ways = list(candidates(device, engines, dtypes, refused))
    place = ways[0].device
    bench = Bench(
        str(model or "embedded"), str(place), device_name(place), torch.get_num_threads(), load_average(), rounds
    )
    bench.refused = refused
    loaded = list[tuple[Row, _Drawn]]()
    for way in ways:
        row = Row(way.engine.name, str(way.dtype).removeprefix("torch."))
        loaded.append((row, _Drawn(model, way, steps)))
        say(f"{row.engine} in {row.dtype} is ready")
    for row, drawn in loaded:
        _compare(row, drawn.pictures(), loaded[0][1].pictures())
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for _, drawn in loaded:
            drawn.time()
    for row, drawn in loaded:
        row.step, row.picture = median(drawn.steps), median(drawn.whole)
        if shell and not drawn.pipe.components.upscales:
            say(f"latentdiff generate by {row.engine} in {row.dtype}")
            row.shell, row.memory = _from_shell(model, place, row, steps)
        bench.rows.append(row)
    return bench


class _Drawn:
    """A model that is run in one way, and the seconds it took."""

    def __init__(self, model: str | None, way: Execution, steps: int | None) -> None:
        name = str(way.dtype).removeprefix("torch.")
        self.pipe = Pipeline.from_pretrained(model, device=way.device, dtype=name, engine=way.engine.name)
        self.options: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
        if self.pipe.components.upscales:
            self.options["image"] = Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")
        self.steps, self.whole = list[float](), list[float]()
        self._seen: np.ndarray | None = None
        self._draw("np")  # what is set up once is not timed
        self._draw("latent")

    def _draw(self, kind: str, seed: int = 0) -> Any:
        prompt = PROMPTS[seed % len(PROMPTS)] if self.pipe.components.reads_text else ""
        return self.pipe(prompt, seed=seed, output_type=kind, **self.options)

    def pictures(self) -> np.ndarray:
        """Return pictures (N, H, W, 3) in [0, 1]."""
        if self._seen is None:
            self._seen = np.concatenate([self._draw("np", seed).images for seed in range(len(PROMPTS))])
        return self._seen

    def time(self) -> None:
        """Take the time of all steps of a picture, and of a picture."""
        started = time.perf_counter()
        result = self._draw("latent")
        result.images.cpu()
        self.steps.append((time.perf_counter() - started) / result.settings["num_inference_steps"])
        started = time.perf_counter()
        self._draw("np")
        self.whole.append(time.perf_counter() - started)


def _compare(row: Row, pictures: np.ndarray, exact: np.ndarray) -> None:
    difference = pictures.astype(np.float64) - exact
    row.largest = float(np.abs(difference).max())
    errors = (difference**2).mean(axis=(1, 2, 3))
    if errors.any():
        found = -10 * np.log10(np.maximum(errors, 1e-20))
        row.psnr, row.worst = float(np.median(found)), float(found.min())


def _from_shell(
    model: str | None, device: torch.device, row: Row, steps: int | None
) -> tuple[float | None, int | None]:
    """Return the seconds of `latentdiff generate`, and the most memory it held where the system tells."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--device", str(device), "--engine", row.engine, "--dtype", row.dtype]
        options += [] if model is None else ["--model", model]
        options += [] if steps is None else ["--steps", str(steps)]
        target = ["-o", str(Path(folder, "a.png"))]
        started = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-c", GENERATE, "generate", PROMPTS[0], *options, *target],
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - started
    return (seconds, int(run.stdout.splitlines()[-1]) or None) if run.returncode == 0 else (None, None)


def load_average() -> float | None:
    """Return how many processes wanted a core in the last minute, where the system tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None

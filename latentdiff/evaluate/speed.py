"""What a picture costs: time, memory, arithmetic, and energy where the machine tells."""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.devices import device_name, number_of_gpu, peak_memory
from latentdiff.evaluate.evaluation import Evaluation
from latentdiff.evaluate.figure import Figure
from latentdiff.evaluate.intervals import Estimate
from latentdiff.evaluate.tasks import own_task, spoilt
from latentdiff.pipeline import Pipeline

__all__ = ["speed"]

REPEATS = 6  # the fewest whose smallest and largest value hold the median between them 95 times of 100
PROMPT = "a red fox"
COUNTERS = Path("/sys/class/powercap")  # of energy: Intel's, and those of AMD in the same form
POWER_EVERY = 0.1  # seconds between readings of a GPU's power
MEBIBYTE = 2**20


def speed(evaluation: Evaluation) -> list[Figure]:
    """Measure seconds to a picture, pictures per second in batches, memory, FLOPs and joules.

    Times are medians of `REPEATS` calls, each with texts encoded and pictures decoded. Memory is the most that the
    process, or torch on the GPU, ever held meanwhile, weights included. FLOPs are those of one guided call of the
    U-Net for one picture.
    """
    pipe, settings, size = evaluation.model, evaluation.request.settings, evaluation.batch_size
    prompt = PROMPT if pipe.components.reads_text else ""

    task = own_task(pipe.components)
    inputs: Mapping[str, Any] = {} if task is None else _inputs(pipe, task)

    def draw(count: int, **more: Any) -> None:
        pipe([prompt] * count, **inputs, seed=evaluation.request.seed, batch_size=count, **{**settings, **more})

    for count in {1, size}:  # what is set up once is not measured
        draw(count)
    with peak_memory(pipe.device) as peak:
        alone = [_seconds(lambda: draw(1)) for _ in range(REPEATS)]
        with _metered(pipe.device) as joules:
            together = [_seconds(lambda: draw(size)) for _ in range(REPEATS)]
    flops = _flops(lambda steps: draw(1, sampler="euler", num_inference_steps=steps))
    found = [
        ("seconds_to_picture", _middle(alone), "lower", "s"),
        ("pictures_per_second", _middle([size / seconds for seconds in together]), "higher", "/s"),
        ("peak_memory", _single(peak[0] / MEBIBYTE), "lower", "MiB"),
        ("flops_per_call", _single(flops / 1e9), "lower", "GFLOP"),
    ]
    if joules:
        found.append(("joules_per_picture", _single(joules[0] / (REPEATS * size)), "lower", "J"))
    protocol = {**_machine(pipe), "batch_size": size, **evaluation.drawn_with}
    return [
        Figure(f"speed/{name}", estimate, better, {**protocol, "n": estimate.n}, unit=unit)  # type: ignore[arg-type]
        for name, estimate, better, unit in found
    ]


def _inputs(pipe: Pipeline, task: str) -> Mapping[str, Image.Image]:
    """Return what a model draws from that needs a picture, made of a grey one of its size."""
    return spoilt(task, torch.zeros(3, *pipe.native_size), pipe.autoencoder.config.downsample_factor, (0, 0))


def _machine(pipe: Pipeline) -> dict[str, str | int]:
    """Return what times depend on besides the model."""
    height, width = pipe.native_size
    return {
        "device": device_name(pipe.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "size": f"{width}x{height}",
    }


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _middle(values: Sequence[float]) -> Estimate:
    """Return the median, between the smallest and the largest value: an interval whatever the distribution."""
    return Estimate(median(values), min(values), max(values), len(values))


def _single(value: float) -> Estimate:
    return Estimate(value, math.nan, math.nan, 1)


def _flops(draw: Callable[[int], object]) -> int:
    """Return what a second step costs more than one alone: a call of the network, guidance included."""
    counts = []
    for steps in (1, 2):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels are not counted
            draw(steps)
        counts.append(counter.get_total_flops())
    return counts[1] - counts[0]


@contextmanager
def _metered(device: torch.device) -> Iterator[list[float]]:
    """Yield a list that holds the joules spent once this is left; it stays empty where the machine does not tell."""
    found: list[float] = []
    gpu = number_of_gpu(device)
    meter = _CpuMeter.start() if gpu is None else _GpuMeter.start(gpu)
    began = time.perf_counter()
    yield found
    joules = None if meter is None else meter.joules(time.perf_counter() - began)
    if joules is not None:
        found.append(joules)


@dataclass(frozen=True)
class _CpuMeter:
    """Counters of the energy of all processors, which only root may read on many machines; before -> microjoules."""

    before: dict[Path, int]

    @classmethod
    def start(cls) -> _CpuMeter | None:
        before = cls._read()
        return cls(before) if before else None

    def joules(self, seconds: float) -> float | None:
        after, total = self._read(), 0
        for counter, start in self.before.items():
            if counter not in after:
                return None
            spent = after[counter] - start
            if spent < 0:  # it began anew
                spent += int((counter.parent / "max_energy_range_uj").read_text())
            total += spent
        return total / 1e6

    @staticmethod
    def _read() -> dict[Path, int]:
        found: dict[Path, int] = {}
        for counter in sorted(COUNTERS.glob("intel-rapl:?/energy_uj")):  # of whole packages
            with suppress(OSError, ValueError):
                found[counter] = int(counter.read_text())
        return found


@dataclass(frozen=True)
class _GpuMeter:
    """Readings of a GPU's power by nvidia-smi."""

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, place: int) -> _GpuMeter | None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        name = visible[place] if place < len(visible) and visible[place] else str(place)
        command = ["nvidia-smi", f"--id={name}", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
        with suppress(OSError):
            command.append(f"--loop-ms={int(1000 * POWER_EVERY)}")
            return cls(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
        return None

    def joules(self, seconds: float) -> float | None:
        self.process.terminate()
        text, _ = self.process.communicate()
        watts = []
        for line in text.splitlines():
            with suppress(ValueError):
                watts.append(float(line))
        return sum(watts) / len(watts) * seconds if watts else None

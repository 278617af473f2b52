"""Run graphs of OpenVINO on arrays, without torch: laid out for each shape that is called, and kept on disk so.

Laying a graph out takes about half a second for the embedded model; reading a layout takes a third of that.
"""

from __future__ import annotations

import hashlib
import mmap
import platform
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import numpy as np

from latentdiff.engine import conversions
from latentdiff.errors import MissingDependencyError

__all__ = ["LaidOut", "core", "installed", "load_openvino", "processor"]

INSTALL = 'pip install "latentdiff[openvino]"'
SHAPES = 8  # that a network is laid out for at a time, each with its weights
LARGEST = 2**28  # bytes of weights, up to which layouts are kept on disk: a copy of the weights for each shape
LAYOUT = "layout.blob"
CPUINFO = Path("/proc/cpuinfo")
KINDS = ("vendor_id", "model name", "flags", "Features", "CPU part")  # lines there that say which kind a processor is


def installed() -> bool:
    """Say whether OpenVINO is there, without loading it."""
    return find_spec("openvino") is not None


def load_openvino() -> Any:
    """Return the module openvino, kept from reporting to its makers that it was imported, which it does unasked.

    Raises:
        MissingDependencyError: it is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as if it were not installed
    try:
        import openvino
    except ImportError as error:
        raise MissingDependencyError(
            f"engine 'openvino' needs the package openvino, got none; install it with `{INSTALL}`"
        ) from error
    return openvino


@cache
def core() -> Any:
    """Return what loads and compiles graphs, one for the process and as long as it lives.

    Each `openvino.Core` gives the thread that uses it first a stack of its own for signals. Of two, the one that goes
    first takes its stack along and the other leaves the thread with that, so that the next signal ends the process.

    Raises:
        MissingDependencyError: see `load_openvino`.
    """
    return load_openvino().Core()


@cache
def processor() -> str:
    """Return what tells kinds of processors apart: another kind may need another layout, or round otherwise."""
    try:
        with CPUINFO.open() as file:
            first = file.read(8192).partition("\n\n")[0]  # of all cores, which are alike
    except (OSError, ValueError):
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(line for line in first.splitlines() if line.startswith(KINDS))


class _Layout(NamedTuple):
    """A graph laid out for one shape.

    Attributes:
        data: memory that the weights are in and that must outlive the request; None where OpenVINO has its own.
        request: runs it.
        place: where it is to be written; None where it is there, or too large.
    """

    data: np.ndarray | None
    request: Any
    place: Path | None


class LaidOut:
    """A graph of OpenVINO, laid out for each shape that it is called with; threads may share one.

    Args:
        read: returns the graph; called when there is no layout for a shape yet.
        precision: "f32" or "bf16".
        file: of the graph; None where it could not be written, and its layouts are not kept either.
    """

    def __init__(self, read: Callable[[], Any], precision: str, file: Path | None) -> None:
        self._read, self._precision, self.file = read, precision, file
        self._graph: Any = None
        self._layouts = OrderedDict[Any, _Layout]()  # by shapes and threads
        self._lock = RLock()

    @classmethod
    def of(cls, file: Path, precision: str) -> LaidOut:
        """Return a conversion on disk, which is checked when it is read.

        Raises, once a shape is met that no layout is kept for:
            Damaged: it is not what was written.
        """

        def read() -> Any:
            if conversions.load(file.parent) is None:
                raise conversions.Damaged(f"{file.parent} is gone")
            return core().read_model(file)

        return cls(read, precision, file)

    def __call__(self, arrays: Sequence[np.ndarray], threads: int) -> list[np.ndarray]:
        """Return the outputs (B, ...) float32 for inputs (B, ...), float32 or int64.

        A batch is split into such of 1, 2, 4, ... rows, as each size that is called is laid out for first.
        """
        parts, done, rows = [], 0, len(arrays[0])
        if any(len(array) != rows for array in arrays):
            raise ValueError(f"a graph's inputs have one batch, got {[len(array) for array in arrays]} rows")
        while done < rows:
            count = 1 << ((rows - done).bit_length() - 1)
            parts.append(self._run([array[done : done + count] for array in arrays], threads))
            done += count
        return parts[0] if len(parts) == 1 else [np.concatenate(outputs) for outputs in zip(*parts)]

    def _run(self, arrays: Sequence[np.ndarray], threads: int) -> list[np.ndarray]:
        with self._lock:
            request = self.request(tuple(array.shape for array in arrays), threads)
            results = request.infer(
                [np.ascontiguousarray(one) for one in arrays], share_inputs=True, share_outputs=True
            )
            return [results[number].copy() for number in range(len(results))]

    def request(self, shapes: tuple[tuple[int, ...], ...], threads: int) -> Any:
        """Return what runs the graph for inputs of these shapes: laid out for them alone it is faster by a third.

        Args:
            shapes: of the inputs.
            threads: that it computes with.
        """
        with self._lock:
            key = shapes, threads
            if key not in self._layouts:
                self._layouts[key] = self._laid_out(shapes, threads)
                if len(self._layouts) > SHAPES:
                    self._layouts.popitem(last=False)
            self._layouts.move_to_end(key)
            return self._layouts[key].request

    def keep(self) -> None:
        """Write the layouts that are not on disk yet, unless each would take much space.

        Raises:
            StorageError: one cannot be written.
        """
        with self._lock:
            for key, layout in [*self._layouts.items()]:
                if layout.place is not None:
                    conversions.store(layout.place, partial(_write, layout.request.get_compiled_model()))
                    self._layouts[key] = layout._replace(place=None)

    def _laid_out(self, shapes: tuple[tuple[int, ...], ...], threads: int) -> _Layout:
        options = {
            "INFERENCE_PRECISION_HINT": self._precision,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,  # other processes may be busy on the cores it would choose
        }
        place = self._place(shapes, threads)
        if place is not None and (found := _read(place, options)) is not None:
            return found
        if self._graph is None:
            self._graph = self._read()
        graph = self._graph.clone()
        graph.reshape({port: list(shape) for port, shape in zip(graph.inputs, shapes)})
        compiled = core().compile_model(graph, "CPU", options)
        large = self.file is None or self.file.with_suffix(".bin").stat().st_size > LARGEST
        return _Layout(None, compiled.create_infer_request(), None if large else place)

    def _place(self, shapes: tuple[tuple[int, ...], ...], threads: int) -> Path | None:
        if self.file is None:
            return None
        depends = self.file.parent.name, self.file.name, shapes, threads, self._precision, processor()
        digest = hashlib.sha256(repr(depends).encode()).hexdigest()[:32]
        return conversions.cache_folder() / "layouts" / digest


def _read(place: Path, options: dict[str, Any]) -> _Layout | None:
    """Return the layout in a folder; None where there is none that is what was written and can be used."""
    try:
        found = conversions.load(place)
        if found is None:
            return None
        with (found / LAYOUT).open("rb") as file:
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
        compiled = core().import_model(load_openvino().Tensor(data, shared_memory=True), "CPU", options)
    except (conversions.Damaged, OSError, RuntimeError, ValueError):
        return None
    return _Layout(data, compiled.create_infer_request(), None)


def _write(compiled: Any, folder: Path) -> None:
    (folder / LAYOUT).write_bytes(compiled.export_model().getvalue())

"""`latentdiff bench`: which engine and precision is the fastest on this machine, and how far from the exact one."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from latentdiff.commands.shared import load_torch, say, warnings_as_lines
from latentdiff.generation.options import check_integer

if TYPE_CHECKING:
    from latentdiff.evaluate.bench import Bench, Row

HELP = "Measure what runs a model fastest on this machine."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--model", help="folder, safetensors file, or owner/name on a hub; the embedded one by default")
    parser.add_argument("--device", help="cpu, cuda, mps; the fastest there is by default")
    parser.add_argument(
        "--engines",
        metavar="E,E",
        default="",
        help="eager, and openvino on a CPU or graphs on a GPU, by default; compile takes minutes",
    )
    parser.add_argument("--dtypes", metavar="D,D", default="", help="all that the device computes in by default")
    parser.add_argument("--steps", type=int, help="of a picture; the model's own by default")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of all, in turns (default 5)")
    parser.add_argument(
        "--no-shell", dest="shell", action="store_false", help="leave out `latentdiff generate`, which tells the memory"
    )


def run(options: argparse.Namespace) -> None:
    """Print a table of engines, and one JSON object as the last line."""
    check_integer("--rounds", options.rounds, 1, 1000, "try 5")
    if options.steps is not None:
        check_integer("--steps", options.steps, 1, 1000, "try 25")
    load_torch()
    from latentdiff.evaluate.bench import measure

    with warnings_as_lines():
        bench = measure(
            options.model,
            options.device,
            engines=[name for name in options.engines.split(",") if name],
            dtypes=[name for name in options.dtypes.split(",") if name],
            rounds=options.rounds,
            steps=options.steps,
            shell=options.shell,
            say=say,
        )
    for line in _lines(bench):
        print(line)
    print(json.dumps(bench.to_json()))


def _lines(bench: Bench) -> list[str]:
    """Return the table as text."""
    load = "" if bench.load is None else f", load {bench.load:.1f} at the start"
    lines = [f"{bench.model} on {bench.processor} ({bench.device}), {bench.threads} threads{load}"]
    lines.append(f"medians of {bench.rounds} rounds in turns; PSNR is that of pictures against eager in float32")
    lines.append("engine    dtype        step  faster  picture  faster    shell   memory     PSNR  (worst)  largest")
    first = bench.rows[0]
    return [*lines, *(_line(row, first) for row in bench.rows), *(f"left out: {reason}" for reason in bench.refused)]


def _line(row: Row, first: Row) -> str:
    steps, pictures = first.step / row.step, first.picture / row.picture
    times = f"{row.step * 1e3:5.1f} ms  {steps:5.2f}x {row.picture:6.2f} s  {pictures:5.2f}x"
    shell = "      -" if row.shell is None else f"{row.shell:5.1f} s"
    memory = "     -" if row.memory is None else f"{row.memory / 2**20:4.0f} MB"
    apart = "  equal" if row.psnr is None else f"{row.psnr:4.0f} dB  ({row.worst:4.0f})   {row.largest:.0e}"
    return f"{row.engine:<9} {row.dtype:<9} {times}  {shell}  {memory}  {apart}"

"""`latentdiff batch`: a table of any length drawn, each row exactly once, over as many runs as it takes."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from latentdiff.commands.shared import (
    add_machine,
    add_marking,
    add_model,
    add_settings,
    add_size,
    file_and_rest,
    given_settings,
    load_torch,
    on_terminal,
    parse_loras,
    read_size,
    say,
    warnings_as_lines,
)
from latentdiff.errors import InputError
from latentdiff.generation.options import BOTH, check_integer, check_number

if TYPE_CHECKING:
    from latentdiff.scale.job import Job

HELP = "Draw a table of prompts, each row exactly once, however often it is interrupted."
FORMATS = ("webdataset", "parquet", "files")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "prompts",
        metavar="PROMPTS",
        help="text (a prompt a line), .jsonl, .csv, .tsv or .parquet, a path or URL; columns set any option row by row",
    )
    parser.add_argument("out", metavar="OUT", help="folder, or URL such as s3://bucket/folder")
    add_model(parser)
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="processes of this machine (default), or a Ray cluster (needs the extra ray)",
    )
    parser.add_argument("--address", help="of the Ray cluster, such as auto or ray://head:10001; one here by default")
    parser.add_argument(
        "--gpus-per-worker", type=float, metavar="X", help="share of a GPU of each worker of --engine ray (default 1)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes; one for each GPU or core by default")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of the CPU in each worker (1 by default), as bits depend on it"
    )
    parser.add_argument("--batch", type=int, metavar="N", help="images that are sampled at once (default 4)")
    parser.add_argument("--format", choices=FORMATS, help="webdataset (tar, default), parquet or files")
    parser.add_argument("--shard-size", type=int, metavar="N", help="rows of a shard (default 256)")
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="COLUMN",
        help="column that means nothing and is written beside the picture, as id always is; may be given several times",
    )
    parser.add_argument(
        "--max-failures", type=int, metavar="N", help="rows that may fail before the run stops (default 1 %%)"
    )
    parser.add_argument("--retry-failed", action="store_true", help="draw the rows again that failed")
    parser.add_argument("--verify", action="store_true", help="read all that is there, and write again what is damaged")
    parser.add_argument("--new", action="store_true", help="begin another job in OUT; what is there is put aside")
    parser.add_argument("--progress", metavar="FILE", help="append how far it is, as JSON lines")
    add_size(parser)
    add_settings(parser, *BOTH)
    parser.add_argument(
        "--model-engine",
        choices=("eager", "compile", "graphs", "openvino"),
        default="eager",
        help="what runs the networks in a worker, as --engine of `latentdiff generate` (default eager)",
    )
    parser.add_argument("--attention", default="sdpa", help="sdpa (torch's own, default) or xformers (CUDA only)")
    add_marking(parser)
    add_machine(parser)


def run(options: argparse.Namespace) -> None:
    """Draw what a table asks for and an output lacks."""
    job_settings = given_settings(options) | read_size(options.size)
    loras = parse_loras(options.lora)
    if options.workers is not None:
        check_integer("--workers", options.workers, 0, 1024, "try 2")
    if options.max_failures is not None:
        check_integer("--max-failures", options.max_failures, 0, 10**9, "try 100")
    if options.engine != "ray" and (options.address is not None or options.gpus_per_worker is not None):
        raise InputError("--address and --gpus-per-worker are for a Ray cluster, got --engine local; add --engine ray")
    if options.gpus_per_worker is not None:
        check_number("--gpus-per-worker", options.gpus_per_worker, 0, 64, "try 0.5")
    for name in ("batch", "threads", "shard_size"):
        if getattr(options, name) is not None:
            check_integer(f"--{name.replace('_', '-')}", getattr(options, name), 1, 100_000, "leave it out")
    load_torch()
    from latentdiff.engine.execution import settle
    from latentdiff.scale.batch import How, run_batch
    from latentdiff.scale.cluster import Cluster, require_ray

    started, cluster = time.perf_counter(), None
    if options.engine == "local":
        settle(options.device, options.dtype, options.model_engine)  # refuses before anything is written
    else:
        require_ray()
        cluster = Cluster(options.address, options.workers or None, options.gpus_per_worker)
    how = How(
        engine=cluster,
        workers=options.workers,
        max_failures=options.max_failures,
        retry_failed=options.retry_failed,
        verify=options.verify,
        new=options.new,
        progress=options.progress,
        terminal=on_terminal(),
        tell=cluster.tell if cluster is not None else lambda state: None,
        say=say,
    )
    with warnings_as_lines():
        summary = run_batch(options.prompts, options.out, _job(options, job_settings, loras), how)
    if options.json:
        print(json.dumps({**asdict(summary), "out": options.out, "seconds": round(time.perf_counter() - started, 3)}))
        return
    failed = f", {summary.failed:,} could not be drawn (see {options.out}/failures)" if summary.failed else ""
    if not summary.drawn + summary.taken + summary.retired:
        print(f"nothing to do: all {summary.rows:,} rows are in {options.out}{failed}")
        return
    taken = f", {summary.taken:,} taken over" if summary.taken else ""
    aside = f"; put aside {summary.retired:,} of before" if summary.retired else ""
    print(f"{summary.rows:,} rows in {summary.shards:,} shards: {summary.drawn:,} drawn{taken}{failed}{aside}")


def _job(options: argparse.Namespace, settings: dict[str, Any], loras: dict[str, Any]) -> Job:
    from latentdiff.scale.job import Job
    from latentdiff.scale.model import Model

    embeddings = [file_and_rest(text) for text in options.embedding]
    model = Model(
        options.model,
        options.device,
        options.dtype,
        options.prediction_type,
        options.vae,
        options.attention,
        options.model_engine,
        tuple(embeddings),
    )
    weights = {file: weight if isinstance(weight, tuple) else (weight,) for file, weight in loras.items()}
    if any(column == "" for column in options.keep):
        raise InputError("--keep must name a column, got none; name it")
    return Job(
        model,
        settings,
        tuple(weights.items()),
        options.format,
        options.shard_size,
        tuple(options.keep),
        options.batch,
        options.threads,
        options.metadata,
        options.mark,
    )

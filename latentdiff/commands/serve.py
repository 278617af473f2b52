"""`latentdiff serve`: an HTTP server with OpenAI's images API."""

from __future__ import annotations

import argparse
import os

from latentdiff.commands.shared import load, say
from latentdiff.errors import InputError, MissingDependencyError
from latentdiff.generation.options import check_integer

HELP = "Serve models over HTTP, by OpenAI's images API."
EXTRA = 'pip install "latentdiff[serve]"'
TOKEN = "LATENTDIFF_TOKEN"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--model",
        nargs="+",
        metavar="MODEL",
        help="folders, safetensors files, or owner/name on a hub, each served by its last name; a request that names "
        "none gets the first one; the embedded one by default",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; this machine alone by default")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0 for any that is free (default 8000)")
    parser.add_argument(
        "--token", help=f"what requests must bring; needed for every --host but this machine's; {TOKEN} says it too"
    )
    parser.add_argument("--queue", type=int, metavar="N", help="jobs that may wait (default 64)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images that are drawn at once (default 8)")
    parser.add_argument("--device", help="cpu, cuda, mps; the fastest there is by default")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16")


def run(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    check_integer("--port", options.port, 0, 65535, "try 8000")
    check_integer("--batch", options.batch, 1, 1024, "try 8")
    token = options.token if options.token is not None else os.environ.get(TOKEN) or None
    try:
        import uvicorn  # noqa: F401

        from latentdiff.serve.http.guard import check_token
        from latentdiff.serve.http.limits import Limits
        from latentdiff.serve.http.models import served_name
        from latentdiff.serve.http.server import Server, listen
    except ImportError as error:
        if isinstance(error, MissingDependencyError) or not error.name or error.name.startswith("latentdiff"):
            raise
        raise MissingDependencyError(f"a server needs {error.name}, got none; install it with `{EXTRA}`") from error
    check_token(token, options.host)
    limits = Limits() if options.queue is None else Limits(queue=options.queue)
    given = options.model or [None]
    names = [served_name(model) for model in given]
    if len(set(names)) < len(names):
        raise InputError(f"models must have names of their own, got {', '.join(names)}; rename a folder")
    with listen(options.host, options.port) as opened:
        pipes = {name: load(model, options.device, options.dtype) for name, model in zip(names, given)}
        server = Server(pipes, host=options.host, token=token, batch=options.batch, limits=limits)
        opened.listen()
        host, port = opened.getsockname()[:2]
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
        say(f"serving {', '.join(names)}; Ctrl-C ends it when all jobs are done")
        server.run(sockets=[opened])
    if server.hurried:
        raise KeyboardInterrupt("interrupted; what was being drawn is lost")

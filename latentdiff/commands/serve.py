"""`latentdiff serve`: an HTTP server with OpenAI's images API, and a page to draw on."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from latentdiff.commands.shared import add_engine, add_lora_dir, load, say, warnings_as_lines
from latentdiff.errors import InputError, MissingDependencyError
from latentdiff.files import read_file, require_path
from latentdiff.generation.options import check_integer
from latentdiff.lora_tags import lora_files

if TYPE_CHECKING:
    from latentdiff.pipeline import Pipeline
    from latentdiff.serve.filter import Filter
    from latentdiff.serve.http.server import MountPage

HELP = "Serve models over HTTP, by OpenAI's images API, and on a page."
EXTRA, PAGE_EXTRA = 'pip install "latentdiff[serve]"', 'pip install "latentdiff[ui]"'
RAY_EXTRA = 'pip install "latentdiff[ray]"'
REDIS, REDIS_EXTRA = "LATENTDIFF_REDIS", 'pip install "latentdiff[redis]"'
FILTER_EXTRA = 'pip install "latentdiff[filter]"'
TOKEN = "LATENTDIFF_TOKEN"
LONGEST_TOKEN_FILE = 2**10  # bytes


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_serving(parser, "the embedded one by default")
    parser.add_argument(
        "--ui",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="add a page to draw on, at /ui (needs the extra ui)",
    )
    parser.add_argument(
        "--name",
        help="letters and digits that names of jobs and links begin with, where a proxy stands before several servers",
    )
    parser.add_argument(
        "--redis",
        metavar="URL",
        help="what servers with names share answers to repeats and ended jobs through, such as "
        f"redis://:password@host:6379/0; {REDIS} says it too (needs the extra redis)",
    )
    replicas = parser.add_argument_group("several replicas on a Ray cluster (needs the extra ray)")
    replicas.add_argument("--replicas", type=int, metavar="N", help="servers that share the requests out, by Ray Serve")
    replicas.add_argument("--max-replicas", type=int, metavar="N", help="the most, where jobs that wait bring more")
    replicas.add_argument("--gpus-per-replica", type=float, metavar="X", help="share of a GPU of each (default 0)")
    replicas.add_argument("--address", help="of the Ray cluster, such as auto; one here by default")


def add_serving(parser: argparse.ArgumentParser, usual: str) -> None:
    """Add the options of every command that serves.

    Args:
        parser: of the command.
        usual: which models are served where none is named.
    """
    parser.add_argument(
        "--model",
        nargs="+",
        metavar="MODEL",
        help="folders, safetensors files, or owner/name on a hub, each served by its last name; a request that names "
        f"none gets the first one; {usual}",
    )
    add_lora_dir(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; this machine alone by default")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0 for any that is free (default 8000)")
    token = parser.add_mutually_exclusive_group()
    token.add_argument(
        "--token", help=f"what requests must bring; needed for every --host but this machine's; {TOKEN} says it too"
    )
    token.add_argument("--token-file", metavar="FILE", help="the same, in a file, where no list of processes shows it")
    parser.add_argument(
        "--proxy",
        nargs="+",
        default=[],
        metavar="ADDRESS",
        help="addresses or networks of proxies, which are believed what they say of their clients (X-Forwarded-For and "
        "-Proto); all others are not",
    )
    parser.add_argument("--queue", type=int, metavar="N", help="jobs that may wait (default 64)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images that are drawn at once (default 8)")
    parser.add_argument(
        "--filter",
        nargs="?",
        type=float,
        const=0.8,
        metavar="SCORE",
        help="refuse pictures that a classifier of nudity scores higher, 0 to 1 (0.8); no previews then (needs the "
        "extra filter)",
    )
    parser.add_argument("--device", help="cpu, cuda, mps; the fastest there is by default")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16")
    add_engine(parser)


def run(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    if options.replicas is not None:
        serve_on_cluster(options)
        return
    for name in ("max_replicas", "gpus_per_replica", "address"):
        if getattr(options, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} is for several replicas, got one server; add --replicas 2")
    redis = _redis(options)
    serve(options, options.model or [None], with_page=options.ui, ready=_say_address, name=options.name, redis=redis)


def serve_on_cluster(options: argparse.Namespace) -> None:
    """Serve replicas until SIGTERM or Ctrl-C."""
    if options.ui:
        raise InputError("--ui is for one server, as the page keeps what was said; leave it or --replicas out")
    if options.name is not None:
        raise InputError("--name is for one server, as replicas have names of their own; leave it out")
    if options.redis is not None:
        raise InputError("--redis is for servers without Ray, as replicas find each other; leave it or --replicas out")
    check_integer("--port", options.port, 1, 65535, "try 8000")
    with _extra("a server", EXTRA):
        import uvicorn  # noqa: F401
    with _extra("--replicas", RAY_EXTRA):
        from latentdiff.serve.cluster.program import serve_replicas
    given = {
        "models": options.model,
        "replicas": options.replicas,
        "max_replicas": options.max_replicas,
        "gpus": options.gpus_per_replica,
        "token": _token(options),
        "host": options.host,
        "proxies": options.proxy,
        "lora_dir": options.lora_dir,
        **{name: getattr(options, name) for name in ("batch", "queue", "filter", "device", "dtype", "engine")},
    }
    given = {name: value for name, value in given.items() if value is not None}
    serve_replicas(given, options.port, options.address, lambda address: _say_address(address, False))


def serve(
    options: argparse.Namespace,
    given: list[str | None],
    *,
    with_page: bool,
    ready: Callable[[str, bool], None],
    name: str | None = None,
    redis: str | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        options: of `add_serving`.
        given: models; None for the embedded one.
        with_page: whether there is a page.
        ready: called with the address and whether there is a page, when requests are taken.
        name, redis: see `Server`.
    """
    check_integer("--port", options.port, 0, 65535, "try 8000")
    check_integer("--batch", options.batch, 1, 1024, "try 8")
    token = _token(options)
    with _extra("a server", EXTRA):
        import uvicorn  # noqa: F401

        from latentdiff.serve.http.guard import check_proxies, check_token
        from latentdiff.serve.http.limits import Limits
        from latentdiff.serve.http.server import Server, listen
    check_proxies(options.proxy)
    check_token(token, options.host, options.proxy)
    limits = Limits() if options.queue is None else Limits(queue=options.queue)
    names = _names(given)
    lora_dir = None if options.lora_dir is None else require_path(options.lora_dir, "a folder of LoRAs")
    if lora_dir is not None:
        lora_files(lora_dir)  # before models load
    page = _mount_page() if with_page else None
    content_filter = None if options.filter is None else _filter(options.filter)
    with listen(options.host, options.port) as opened:
        server = Server(
            _loaded(options, dict(zip(names, given))),
            host=options.host,
            token=token,
            proxies=options.proxy,
            batch=options.batch,
            limits=limits,
            lora_dir=lora_dir,
            content_filter=content_filter,
            name=name,
            redis=redis,
            page=page,
        )
        opened.listen()
        host, port = opened.getsockname()[:2]
        ready(f"http://{f'[{host}]' if ':' in host else host}:{port}", with_page)
        say(f"serving {', '.join(names)}; Ctrl-C ends it when all jobs are done")
        server.run(sockets=[opened])
    if server.hurried:
        raise KeyboardInterrupt("interrupted; what was being drawn is lost")


def _loaded(options: argparse.Namespace, given: dict[str, str | None]) -> dict[str, Pipeline]:
    """Return the models by their names, ready to draw."""
    engine = options.engine or "eager"
    pipes = {name: load(model, options.device, options.dtype, engine=engine) for name, model in given.items()}
    with warnings_as_lines():
        for pipe in pipes.values():
            pipe.make_ready()
    return pipes


def _names(models: list[str | None]) -> list[str]:
    """Return the names that models are served by."""
    from latentdiff.serve.http.models import served_name

    names = [served_name(model) for model in models]
    if len(set(names)) < len(names):
        raise InputError(f"models must have names of their own, got {', '.join(names)}; rename a folder")
    return names


def _token(options: argparse.Namespace) -> str | None:
    """Return the token of the options, or else of the environment."""
    if options.token_file is not None:
        data = read_file(require_path(options.token_file, "the token"), LONGEST_TOKEN_FILE, "the token")
        return data.decode("utf-8", "replace").strip()
    return options.token if options.token is not None else os.environ.get(TOKEN) or None


def _redis(options: argparse.Namespace) -> str | None:
    """Return the URL of the options, or else of the environment, at which Redis answers."""
    url: str | None = options.redis or os.environ.get(REDIS) or None
    if url is None:
        return None
    if options.name is None:
        raise InputError("servers that share answers need names, got --redis without --name; add --name a")
    with _extra("--redis", REDIS_EXTRA):
        from latentdiff.serve.http.shared import check_redis
    check_redis(url)
    return url


def _mount_page() -> MountPage:
    with _extra("the page", PAGE_EXTRA):
        from latentdiff.serve.page.mount import mount_page

        return mount_page


def _filter(score: float) -> Filter:
    with _extra("a filter", FILTER_EXTRA):
        from latentdiff.serve.filter import NudityFilter

        return NudityFilter(score)


@contextmanager
def _extra(what: str, remedy: str) -> Iterator[None]:
    """Name the extra where one of its packages is not installed."""
    try:
        yield
    except ImportError as error:
        if isinstance(error, MissingDependencyError) or not error.name or error.name.startswith("latentdiff"):
            raise
        raise MissingDependencyError(f"{what} needs {error.name}, got none; install it with `{remedy}`") from error


def _say_address(address: str, with_page: bool) -> None:
    print(f"{address}/v1", flush=True)
    if with_page:
        say(f"the page is at {address}/ui/")

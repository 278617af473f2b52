"""A server process: one model or several behind one scheduler, from its start to its end."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from latentdiff.errors import InputError, StorageError, shown
from latentdiff.pipeline import Pipeline
from latentdiff.serve.filter import Filter
from latentdiff.serve.http.desk import Desk
from latentdiff.serve.http.guard import Guard, check_proxies, check_token, is_loopback
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.links import Links
from latentdiff.serve.http.models import Models
from latentdiff.serve.http.service import Service

__all__ = ["Server", "listen"]

NAME = re.compile(r"[A-Za-z0-9]{1,32}")
LAST_ANSWERS = 5  # seconds that answers may take to leave, after the last job

MountPage = Callable[[FastAPI, Models, Desk, Links, str | None], ASGIApp]


class Server(uvicorn.Server):
    """Serves models until it is told to end.

    The first SIGTERM or Ctrl-C drains it: no more jobs are taken, those there are go on for `limits.drain_seconds`, and
    what is left then is answered with 503. The second one ends it at once.

    Args:
        pipes: by the names that clients use.
        host: where it listens.
        token: see `guard.Guard`.
        proxies: addresses and networks of proxies, which are believed what they say of their clients.
        batch: see `Scheduler`.
        limits: of requests and jobs.
        lora_dir: folder of the LoRAs that prompts may name; see `lora_tags`.
        content_filter: see `Scheduler`.
        name: tells it from others behind one address, as its jobs and links begin with it.
        redis: URL of what these share answers through; see `shared.Shared`.
        page: adds a page to the application and returns both, as `page.mount.mount_page` does; None for none.

    Raises:
        InputError: a name, a token, or a number that cannot be used.
    """

    def __init__(
        self,
        pipes: Mapping[str, Pipeline],
        *,
        host: str = "127.0.0.1",
        token: str | None = None,
        proxies: Sequence[str] = (),
        batch: int = 8,
        limits: Limits | None = None,
        lora_dir: Path | None = None,
        content_filter: Filter | None = None,
        name: str | None = None,
        redis: str | None = None,
        page: MountPage | None = None,
    ) -> None:
        check_proxies(proxies)
        check_token(token, host, proxies)
        self.limits = limits or Limits()
        self.service = Service.open(
            pipes,
            batch=batch,
            limits=self.limits,
            lora_dir=lora_dir,
            content_filter=content_filter,
            place="" if name is None else f"{_checked_name(name)}.",
        )
        self.api, self.desk, self.shelf = self.service.api, self.service.desk, self.service.shelf
        self.scheduler = self.desk.scheduler
        app: ASGIApp = self.api
        if page is not None:
            app = page(self.api, self.service.models, self.desk, self.service.links, token)
        self.hurried = False
        self._signals, self._drained_by = 0, 0.0
        local = is_loopback(host) and not proxies  # by which it has other names
        self._shared = None
        if redis is not None:
            from latentdiff.serve.http.shared import Shared  # which needs the extra redis

            app = self._shared = Shared(app, self.shelf, self.limits, redis)
        guard = Guard(app, token=token, local=local, limits=self.limits)
        super().__init__(
            uvicorn.Config(
                guard,
                log_config=None,
                access_log=False,
                http="h11",  # whatever else is installed, as another parser refuses other requests by itself
                server_header=False,
                proxy_headers=bool(proxies),  # a client's address is not what it says itself
                forwarded_allow_ips=list(proxies),
                lifespan="off" if page is None else "on",
                ws="none",
                timeout_graceful_shutdown=LAST_ANSWERS,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        self._signals += 1
        self.hurried = self._signals > 1

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop answering; called ten times a second."""
        if self._signals and not self._drained_by:
            self.desk.draining = True
            self._drained_by = time.monotonic() + self.limits.drain_seconds
        if self._drained_by and (self.hurried or not self.service.busy or time.monotonic() > self._drained_by):
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what is still being drawn, and let the last answers leave."""
        await self.desk.stop()
        await asyncio.sleep(0)
        await super().shutdown(sockets)
        if self._shared is not None:
            await self._shared.close()


def _checked_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise InputError(f"the name of a server must be 1 to 32 letters and digits, got {shown(name)}; try a")
    return name


def listen(host: str, port: int) -> socket.socket:
    """Return a socket at an address, which nothing is answered at yet.

    Raises:
        StorageError: the address is in use, or not of this machine.
    """
    opened: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except (OSError, ValueError) as error:  # ValueError of what no name of a machine can be
        if opened is not None:
            opened.close()
        why = getattr(error, "strerror", None) or error
        raise StorageError(f"cannot listen at {shown(host)}, port {port}: {why}; try another") from error
    return opened

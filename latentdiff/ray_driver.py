"""This process as the driver of a Ray cluster, for batch jobs and for servers."""

from __future__ import annotations

import importlib
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from latentdiff.errors import InputError, MissingDependencyError, printable, shown

__all__ = ["joined", "require_ray"]

PATIENCE = 10.0  # seconds in which a cluster answers


def require_ray(option: str, library: str, oldest: tuple[int, int]) -> None:
    """Raise MissingDependencyError unless Ray is installed, with what an option needs of it.

    Args:
        option: that needs it, as errors name it.
        library: of Ray, such as ray.data.
        oldest: version that will do.
    """
    try:
        importlib.import_module(library)
    except ImportError as error:
        missing = (error.name or "ray").partition(".")[0]
        raise MissingDependencyError(
            f"{option} needs {missing}, got none; install it with `pip install 'latentdiff[ray]'`"
        ) from error
    import ray

    if tuple(int(part) for part in ray.__version__.split(".")[:2]) < oldest:
        raise MissingDependencyError(
            f"{option} needs ray {'.'.join(map(str, oldest))} or newer, got {ray.__version__}; install it with "
            "`pip install -U 'latentdiff[ray]'`"
        )


@contextmanager
def joined(address: str | None) -> Iterator[bool]:
    """Be a driver of a cluster, unless this process is one already; one that is started here ends with it.

    Args:
        address: of the cluster; None for the one that RAY_ADDRESS names, or else one that is started here.

    Returns:
        Whether the cluster was started here.

    Raises:
        InputError: no cluster answers there.
    """
    import ray

    if ray.is_initialized():
        yield False
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what its C++ says of no concern to users
    address = address or os.environ.get("RAY_ADDRESS")
    here = address is None
    if address is not None:
        _require_answer(address)
    try:
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            **({"include_dashboard": False} if here else {}),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_answer(address, error) from error
    try:
        yield here
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise InputError where nobody listens at an address, which Ray tries for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdecimal():  # a name, such as auto
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise _no_answer(address, error) from error


def _no_answer(address: str | None, error: BaseException) -> InputError:
    where, reason = "this machine" if address is None else shown(address), printable(" ".join(str(error).split()))[:200]
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    # By its name, as older versions of Ray have no such error.
    if any(type(one).__name__ == "AuthenticationError" for one in causes):
        return InputError(
            f"the Ray cluster at {where} asks for a token, got none or another; set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN where ~/.ray/auth_token is not that of the cluster"
        )
    return InputError(
        f"no Ray cluster answers at {where} ({reason}); start one with `ray start --head`, or check --address"
    )

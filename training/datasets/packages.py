"""Packages of npm as archives in a folder: fetched once, anew where one is damaged, and the JSON files in them."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import Any

from latentdiff.errors import InputError, MissingDependencyError, StorageError
from latentdiff.files import parse_json

# What npm says where it cannot reach its registry.
OFFLINE = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ENETUNREACH", "ENOTCACHED", "ETIMEDOUT", "ECONNRESET")


def fetch(packages: Path, package: str) -> Path:
    """Return the package's archive, fetched by `npm pack` where it is not there or damaged.

    Raises:
        MissingDependencyError: npm is not installed.
        StorageError: it cannot be fetched.
    """
    packages.mkdir(parents=True, exist_ok=True)
    file = packages / (re.sub(r"^@", "", package).replace("/", "-").replace("@", "-") + ".tgz")
    if file.exists():
        if _is_whole(file):
            return file
        print(f"{file} is damaged and fetched again", file=sys.stderr)
    npm = shutil.which("npm")
    if npm is None:
        raise MissingDependencyError(
            f"{package} is fetched with npm, which is not installed; install Node.js or put the archive at {file}"
        )
    print(f"fetching {package}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=packages, prefix=".npm-") as place:  # so that half an archive is none
        command = [npm, "pack", package, "--loglevel=error", "--fetch-retries=0", "--pack-destination", place]
        done = subprocess.run(command, capture_output=True, text=True)
        fetched = Path(place) / file.name
        if done.returncode != 0 or not fetched.exists():
            remedy = f"check the network or put it at {file}"
            raise StorageError(f"npm could not fetch {package} ({_reason(done.stderr + done.stdout)}); {remedy}")
        os.replace(fetched, file)
    return file


def _reason(said: str) -> str:
    """Return what npm says of a failure, in a few words."""
    if code := next((code for code in OFFLINE if code in said), None):
        return f"no connection: {code}"
    lines = [line.removeprefix("npm error").strip() for line in said.splitlines()]
    return next((line[:200] for line in lines if line and not line.startswith("code ")), "no message")


def _is_whole(archive: Path) -> bool:
    """Say whether a .tgz file can be read to its end."""
    try:
        with gzip.open(archive) as stream:
            while stream.read(2**20):
                pass
        with tarfile.open(archive) as tar:
            return tar.next() is not None
    except (OSError, EOFError, zlib.error, tarfile.TarError):
        return False


def _member(archive: Path, name: str) -> str:
    try:
        with tarfile.open(archive) as tar:
            content = tar.extractfile(name)
            return content.read().decode() if content else ""
    except (KeyError, ValueError) as error:
        raise StorageError(f"{archive} has no {name} that can be read; delete it to fetch it again") from error


def read_object(archive: Path, name: str) -> Any:
    """Return what a JSON file in an archive says.

    Raises:
        StorageError: it is not there, or cannot be read.
    """
    try:
        return parse_json(_member(archive, name), f"{archive}: {name}")
    except InputError as error:
        raise StorageError(f"{error}, or delete {archive} to fetch it again") from error

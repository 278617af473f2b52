"""The files of examples/serving agree with the command line and the limits, and nginx does with them what it is for."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from hatchling.builders.wheel import WheelBuilder

from latentdiff import Pipeline
from latentdiff.cli import _parser
from latentdiff.serve.http.guard import OPEN
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.server import LAST_ANSWERS
from tests.needs import leave_out
from tests.serve.gate import Gate, eventually
from tests.serve.http.conftest import Running, Serve

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples" / "serving"
TOKEN = "a-token-of-sixteen-and-more"
STEPS: dict[str, Any] = {"prompt": "fox", "steps": 2, "guidance_scale": 1.0}
GENERATIONS = "/v1/images/generations"


def text(name: str) -> str:
    return (EXAMPLES / name).read_text(encoding="utf-8")


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text("compose.yaml"))
    return found


def unit() -> dict[str, str]:
    """Return the settings of the systemd unit, those of which there is one each."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text("latentdiff.service"))
    return {name: value for section in parser.values() for name, value in section.items()}


def asked(words: list[str]) -> Namespace:
    """Return the options of a command line of ours, which must have all of them."""
    return _parser().parse_args(words)


def setting(name: str) -> str:
    """Return the value of a directive of nginx.conf, which has it once."""
    (found,) = re.findall(rf"^\s*{name} (.+?);", text("nginx.conf"), re.MULTILINE)
    return str(found)


def test_numbers_of_nginx_are_those_of_the_limits() -> None:
    limits = Limits()
    assert setting("client_max_body_size") == f"{limits.upload_bytes // 2**20}m" and limits.upload_bytes % 2**20 == 0
    assert setting("client_body_timeout") == setting("proxy_send_timeout") == f"{limits.body_seconds}s"
    assert limits.seconds < int(setting("proxy_read_timeout").removesuffix("s")) <= limits.seconds + 60
    assert setting("proxy_buffering") == "off"


def test_jobs_may_end_before_the_process_is_killed() -> None:
    least = Limits().drain_seconds + LAST_ANSWERS
    assert int(compose()["services"]["latentdiff"]["stop_grace_period"].removesuffix("s")) > least
    assert int(unit()["TimeoutStopSec"]) > least


def test_commands_and_options_are_ours() -> None:
    service = compose()["services"]["latentdiff"]
    options = asked(service["command"])
    nginx_address = compose()["services"]["nginx"]["networks"]["inside"]["ipv4_address"]
    assert (options.host, options.token_file, options.proxy) == ("0.0.0.0", "/run/secrets/token", [nginx_address])
    program, *words = shlex.split(unit()["ExecStart"])
    assert program.endswith("/latentdiff") and asked(words).proxy == ["127.0.0.1"]
    assert asked(words).token_file == "%d/token" and unit()["LoadCredential"].startswith("token:/")
    docker = text("Dockerfile")
    (command,) = re.findall(r"^CMD (\[.*\])$", docker, re.MULTILINE)
    assert asked(yaml.safe_load(command)).port == 8000 == int(re.findall(r"^EXPOSE (\d+)$", docker, re.MULTILINE)[0])
    assert re.findall(r"http://127\.0\.0\.1:8000(/\w+)", docker) == ["/healthz"] and "/healthz" in OPEN
    (said,) = re.findall(r"`latentdiff (serve .*?)`", text("nginx.conf"))
    asked(said.split())


def test_what_the_files_name_is_there() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (extras,) = re.findall(r"^ARG EXTRAS=(.+)$", text("Dockerfile"), re.MULTILINE)
    assert all(f"\n{extra} = [" in pyproject for extra in extras.split(",")) and "dev" not in extras.split(",")
    services = compose()["services"]
    for service in services.values():
        for volume in service.get("volumes", []):
            assert not volume.startswith("./") or (EXAMPLES / volume.partition(":")[0]).is_file()
    assert (ROOT / services["latentdiff"]["build"]["dockerfile"]).is_file()
    (scraped,) = yaml.safe_load(text("prometheus.yml"))["scrape_configs"]
    assert scraped["static_configs"] == [{"targets": ["latentdiff:8000"]}] and scraped["metrics_path"] == "/metrics"
    override = yaml.safe_load(text("compose.cuda.yaml"))["services"]["latentdiff"]["build"]["args"]
    assert all(f"ARG {name}=" in text("Dockerfile") for name in override)


def test_no_file_holds_the_token() -> None:
    whole = compose()
    assert whole["secrets"] == {"token": {"file": "./token"}} and not (EXAMPLES / "token").exists()
    for service in whole["services"].values():
        assert "environment" not in service
    (scraped,) = yaml.safe_load(text("prometheus.yml"))["scrape_configs"]
    assert scraped["authorization"] == {"credentials_file": "/run/secrets/token"}
    if (ROOT / ".gitignore").exists():  # which is not in an archive of the source
        assert "\n/examples/serving/token\n" in (ROOT / ".gitignore").read_text(encoding="utf-8")


def test_an_image_is_built_of_what_the_wheel_needs_and_no_more(tmp_path: Path) -> None:
    lines = [line for line in text("Dockerfile.dockerignore").splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"  # all else is named
    for name in (line[1:] for line in lines if line.startswith("!")):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():  # a model that is not made yet has no folder
            shutil.copy(ROOT / name, tmp_path / name)
    assert {"tests", "runs", "data", ".git", "examples"}.isdisjoint(entry.name for entry in tmp_path.iterdir())

    def wheel_of(root: Path) -> set[str]:
        return {file.distribution_path for file in WheelBuilder(str(root)).recurse_included_files()}

    assert not wheel_of(tmp_path) ^ wheel_of(ROOT)


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        leave_out("needs systemd-analyze, which Debian's package systemd installs")
    file = tmp_path / "latentdiff.service"
    file.write_text(text("latentdiff.service").replace("/opt/latentdiff/bin/latentdiff", sys.executable))
    command = ["systemd-analyze", "verify", "--man=no", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if str(file) in line or "latentdiff" in line]
    assert not said and done.returncode == 0, done.stderr


class Front:
    """`nginx` with our configuration before a server, or more.

    Args:
        servers: by the addresses that the configuration has.
        place: a folder of its own.
        file: the configuration.

    Attributes:
        url: where it answers.
    """

    def __init__(self, servers: Mapping[str, Running], place: Path, file: str = "nginx.conf") -> None:
        program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if program is None:
            leave_out("needs nginx, which Debian's package nginx installs")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        config = text(file)
        changes = {
            "listen 8080;": f"listen 127.0.0.1:{port};",
            **{address: server.url.removeprefix("http://") for address, server in servers.items()},
            "/tmp/nginx": f"{place}/nginx",
            "/dev/stdout": f"{place}/access.log",
        }
        for old, new in changes.items():
            assert old in config
            config = config.replace(old, new)
        (place / "nginx.conf").write_text(config)
        root = " user root;" if os.getuid() == 0 else ""  # who alone may enter the folder of a test
        command = [
            program,
            "-e",
            "stderr",
            "-c",
            str(place / "nginx.conf"),
            "-g",
            f"daemon off; master_process off;{root}",
        ]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{port}"
        eventually(self._answers)

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._process.communicate()[1]
        try:
            return httpx.get(f"{self.url}/healthz").status_code == 200
        except httpx.ConnectError:
            return False

    def http(self, address: str = "127.0.0.1", **headers: str) -> httpx.Client:
        """Return a client that comes from an address of this machine."""
        headers = {"authorization": f"Bearer {TOKEN}", **headers}
        transport = httpx.HTTPTransport(local_address=address)
        return httpx.Client(base_url=self.url, transport=transport, headers=headers, timeout=60)

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.communicate(timeout=30)


@pytest.fixture
def front(gate: Gate, serve: Serve, tmp_path: Path) -> Iterator[tuple[Front, Running]]:
    """nginx, and the server behind it, whose model waits at a gate."""
    server = serve(gate.pipe, token=TOKEN, proxies=["127.0.0.1"], limits=Limits(client_jobs=1))
    opened = Front({"latentdiff:8000": server}, tmp_path)
    yield opened, server
    gate.open()
    opened.close()


def test_events_pass_nginx_as_they_come_and_clients_are_told_apart(gate: Gate, front: tuple[Front, Running]) -> None:
    nginx, _ = front
    body = STEPS | {"stream": True, "partial_images": 1}
    with (
        nginx.http() as client,
        nginx.http("127.0.0.2") as other,
        client.stream("POST", GENERATIONS, json=body) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines) == ": drawing"  # while the model waits
        gate.arrive()
        gate.let(1)
        while next(lines) != "event: image_generation.partial_image":
            pass
        assert client.post(GENERATIONS, json=STEPS).json()["error"]["code"] == "limit_client_jobs"
        spoofed = {"x-forwarded-for": "203.0.113.9"}
        assert client.post(GENERATIONS, json=STEPS, headers=spoofed).json()["error"]["code"] == "limit_client_jobs"
        gate.open()
        assert other.post(GENERATIONS, json=STEPS).status_code == 200
        assert "event: image_generation.completed" in list(lines)


def test_nginx_lets_through_what_the_server_takes(gate: Gate, front: tuple[Front, Running], tmp_path: Path) -> None:
    nginx, _ = front
    gate.open()
    with nginx.http(host="pictures.example") as client:
        link = client.post(GENERATIONS, json=STEPS | {"response_format": "url"}).json()["data"][0]["url"]
        assert link.startswith("http://pictures.example/v1/")
        assert client.get("/metrics").status_code == 404
        large = client.post(GENERATIONS, content=b" " * (Limits().upload_bytes + 1))
        assert large.status_code == 413 and "nginx" in large.text  # before it has come
        refused = client.post(GENERATIONS, json=STEPS, headers={"authorization": "Bearer none"})
        assert refused.json()["error"]["code"] == "invalid_api_key"
    assert "signature" not in (tmp_path / "access.log").read_text()


def test_a_client_that_leaves_nginx_leaves_the_server(gate: Gate, front: tuple[Front, Running]) -> None:
    nginx, server = front
    with nginx.http() as client, pytest.raises(httpx.ReadTimeout):
        client.post(GENERATIONS, json=STEPS, timeout=0.5)
    gate.arrive()
    eventually(lambda: server.server.scheduler.stats().cancelled == 1)


def test_two_configurations_of_nginx_differ_where_the_second_server_comes_in() -> None:
    one, two = (text(name).splitlines() for name in ("nginx.conf", "nginx-two.conf"))
    gone = [line.strip() for line in one if line not in two and not line.startswith("#")]
    assert gone == [
        "upstream latentdiff {",
        "server latentdiff:8000;",
        "proxy_pass http://latentdiff;",
        "proxy_next_upstream off; # no picture is drawn twice",
    ]
    for said in re.findall(r"`latentdiff (serve .*?)`", text("nginx-two.conf")):
        asked(said.split())


@contextmanager
def two_servers(
    pipe: Pipeline, serve: Serve, tmp_path: Path, **options: Any
) -> Iterator[tuple[Front, dict[str, Running]]]:
    """Open nginx, and two servers behind it."""
    servers = {name: serve(pipe, token=TOKEN, proxies=["127.0.0.1"], name=name, **options) for name in ("a", "b")}
    opened = Front({f"latentdiff-{name}:8000": one for name, one in servers.items()}, tmp_path, "nginx-two.conf")
    try:
        yield opened, servers
    finally:
        opened.close()


@pytest.fixture
def pair(pipe: Pipeline, serve: Serve, tmp_path: Path) -> Iterator[tuple[Front, dict[str, Running]]]:
    with two_servers(pipe, serve, tmp_path) as opened:
        yield opened


def test_two_servers_behind_nginx_share_requests_and_keep_what_is_theirs(
    pair: tuple[Front, dict[str, Running]],
) -> None:
    nginx, servers = pair
    with nginx.http() as client:
        jobs = [client.post("/v1/jobs", json=STEPS).json()["id"] for _ in range(4)]
        assert {name[4] for name in jobs} == {"a", "b"}
        for name in jobs:
            assert client.get(f"/v1/jobs/{name}").json()["id"] == name
        links = [client.post(GENERATIONS, json=STEPS | {"response_format": "url"}).json() for _ in range(3)]
        for link in links:
            assert client.get(link["data"][0]["url"]).status_code == 200
        keyed = [client.post("/v1/jobs", json=STEPS, headers={"idempotency-key": "k"}).json()["id"] for _ in range(3)]
        assert len(set(keyed)) == 1
        servers["a"].server.desk.draining = True  # which answers 503, and nginx asks the other
        assert [client.post(GENERATIONS, json=STEPS).status_code for _ in range(4)] == [200] * 4


def test_a_job_of_a_server_that_is_gone_is_told_of_by_the_other(
    pipe: Pipeline, serve: Serve, redis: str, tmp_path: Path
) -> None:
    options = {"redis": redis, "limits": Limits(drain_seconds=600)}
    with two_servers(pipe, serve, tmp_path, **options) as (nginx, servers), nginx.http() as client:
        while (place := client.post("/v1/jobs", json=STEPS).headers["location"])[len("/v1/jobs/job_")] != "a":
            pass
        eventually(lambda: client.get(place).json()["status"] == "done")
        servers["a"].server.handle_exit(signal.SIGTERM, None)
        eventually(lambda: servers["a"].server.should_exit)  # long before its time is over
        eventually(lambda: client.get("/readyz").status_code == 200)
        assert client.get(place).json()["status"] == "done"
        assert client.get(f"{place}/images/0").content.startswith(b"\x89PNG")


def test_a_server_that_is_gone_loses_no_request(pair: tuple[Front, dict[str, Running]]) -> None:
    nginx, servers = pair
    servers["b"].server.should_exit = True
    with nginx.http() as client:
        assert [client.post(GENERATIONS, json=STEPS).status_code for _ in range(6)] == [200] * 6

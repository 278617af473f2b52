"""Cancel, disconnect and end a server at random moments, and see that nothing is lost and nothing stays behind.

    python tests/benchmarks/serve_chaos.py
    python tests/benchmarks/serve_chaos.py --cancels 20 --jobs 200 --disconnects 40 --ends 10

A tiny model on the CPU. Promised are: a cancelled job's place is with the next job after at most one step; memory is as
it was after two thousand jobs; the job of a client that has gone ends; and after SIGTERM under load every job that was
taken is answered, with its picture or with why there is none, and `latentdiff serve` ends with 0. Each process that is
ended so is a fork of this one, which is a hundred times faster than a new Python. Prints a line for each figure and a
JSON line; the exit code is 1 if one of them is not as promised.
"""

from __future__ import annotations

import argparse
import functools
import http.client
import io
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import latentdiff.serve.http.limits
import latentdiff.serve.http.server
from latentdiff import Pipeline
from latentdiff.cli import main as command
from latentdiff.serve.http.desk import Claim, Desk, Taken
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.orders import Order
from latentdiff.serve.jobs import ENDS
from latentdiff.serve.scheduler import Scheduler
from tests.conftest import build_model
from tests.models.tiny import noise_picture
from tests.serve.running import started

SECONDS = 300  # after which something that should have happened counts as never
WARM = 0.2  # share of the jobs after which memory is measured first
MEGABYTES = 5.0  # by which it may differ
DRAIN = 1  # seconds, in every second process that is ended
CLIENTS = 4  # that draw when a process is ended
PLAIN: dict[str, Any] = {"guidance_scale": 1.0}
GENERATIONS, EDITS, JOBS, TXT2IMG = "/v1/images/generations", "/v1/images/edits", "/v1/jobs", "/sdapi/v1/txt2img"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cancels", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2000, help="in a row, for memory")
    parser.add_argument("--disconnects", type=int, default=200, help="after a random number of bytes")
    parser.add_argument("--ends", type=int, default=100, help="by SIGTERM")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng, begun, figures = random.Random(arguments.seed), time.monotonic(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(Path(folder))
        figures |= ends(model, arguments.ends, rng)  # first, as a fork takes no threads along
        pipe = Pipeline.from_pretrained(model, device="cpu")
        figures |= cancels(pipe, arguments.cancels, rng)
        with started({"tiny": pipe}, batch=4, limits=Limits(kept_jobs=50)) as (server, url):
            figures |= memory(url, arguments.jobs)
            figures |= disconnects(url, server.desk, arguments.disconnects, rng)
    for name, value in (figures | {"seconds": round(time.monotonic() - begun)}).items():
        print(f"{name.replace('_', ' '):28} {value}", flush=True)
    print(json.dumps(figures))
    sys.exit(failed(figures))


def failed(figures: dict[str, Any]) -> bool:
    """Say whether a promise was broken."""
    nothing = ("jobs_untold", "other_exit_codes", "jobs_left_running", "places_left_taken")
    grown = abs(figures["megabytes_grown"]) > MEGABYTES
    return grown or figures["most_steps_to_a_free_place"] > 1 or any(figures[name] for name in nothing)


def cancels(pipe: Pipeline, count: int, rng: random.Random) -> dict[str, Any]:
    """Cancel jobs at random moments beside one that goes on; count steps until the next job is in the place."""
    steps, moments = list[int](), Counter[str]()
    with Scheduler(pipe, batch=2) as scheduler:
        beside = scheduler.submit("cat", num_inference_steps=900, **PLAIN)
        for number in range(count):
            if beside.ended:
                beside = scheduler.submit("cat", num_inference_steps=900, **PLAIN)
            job = scheduler.submit("fox", seed=number, num_inference_steps=50, **PLAIN)
            waiting = scheduler.submit("fox", seed=number, num_inference_steps=2, **PLAIN)
            admitted = list[int]()
            until(lambda: waiting.drawing is not None and job.status != "waiting")  # noqa: B023
            time.sleep(rng.uniform(0, 0.05))
            waiting.listen(lambda event: event.kind == "admitted" and admitted.append(scheduler.stats().steps))  # noqa: B023
            moments["admitted before" if admitted else job.status] += 1
            job.cancel()
            at = scheduler.stats().steps
            waiting.result(SECONDS)
            steps.append(admitted[0] - at)
        beside.cancel()
        until(lambda: scheduler.stats().running == 0)
    return {"cancels": count, "cancelled_when": dict(moments), "most_steps_to_a_free_place": max(steps, default=0)}


def memory(url: str, count: int) -> dict[str, Any]:
    """Draw pictures one after the other through all doors; return how resident memory grew, and its curve."""
    curve = list[float]()
    for number in range(count + 1):
        if number % max(1, count // 10) == 0:
            curve.append(round(resident(), 1))
        kind = (GENERATIONS, JOBS, TXT2IMG, "stream")[number % 4]
        assert told(urlsplit(url).netloc, kind, f"fox {number}", 2, 0), kind
    warm = curve[int(WARM * (len(curve) - 1))]
    return {"jobs": count, "megabytes": curve, "megabytes_grown": round(curve[-1] - warm, 1)}


def resident() -> float:
    """Return the megabytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def disconnects(url: str, desk: Desk, count: int, rng: random.Random) -> dict[str, Any]:
    """Leave at a random byte of a request or of its answer; count jobs that go on, and places that stay taken."""
    place, counts = urlsplit(url), Counter[str]()
    for _ in range(count):
        body, head = rng.choice((_generation, _stream, _edit))()
        request = head.encode() + body
        with closing(http.client.HTTPConnection(place.netloc, timeout=SECONDS)) as connection:
            connection.connect()
            if rng.random() < 0.5:
                connection.sock.sendall(request[: rng.randrange(len(request))])
                counts["in the request"] += 1
            else:
                connection.sock.sendall(request)
                left = rng.randrange(1, 4000)
                connection.sock.settimeout(rng.uniform(0.001, 0.3))
                with suppress(TimeoutError):
                    while left > 0 and (got := connection.sock.recv(left)):
                        left -= len(got)
                counts["before its answer" if left > 3900 else "in its answer"] += 1
    left_running = not until(lambda: not desk.busy, 30)
    left_taken = not until(lambda: desk.scheduler.stats().running == 0, 30)
    stats = desk.scheduler.stats()
    return {
        "disconnects": dict(counts),
        "cancelled_by_them": stats.cancelled,
        "jobs_left_running": int(left_running),
        "places_left_taken": int(left_taken),
    }


def _generation(**more: Any) -> tuple[bytes, str]:
    body = json.dumps({"prompt": "fox", "steps": 30, **PLAIN, **more}).encode()
    return body, _head(GENERATIONS, "application/json", body)


def _stream() -> tuple[bytes, str]:
    return _generation(stream=True, partial_images=3)


def _edit() -> tuple[bytes, str]:
    buffer = io.BytesIO()
    noise_picture(32, 32).save(buffer, "PNG")
    fields = b"".join(
        b'--edge\r\ncontent-disposition: form-data; name="%s"\r\n\r\n%s\r\n' % part
        for part in ((b"prompt", b"fox"), (b"steps", b"30"))
    )
    file = b'--edge\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n%s\r\n--edge--\r\n'
    body = fields + file % buffer.getvalue()
    return body, _head(EDITS, "multipart/form-data; boundary=edge", body)


def _head(path: str, kind: str, body: bytes) -> str:
    lines = (f"POST {path} HTTP/1.1", "host: localhost", f"content-type: {kind}", f"content-length: {len(body)}")
    return "\r\n".join((*lines, "", ""))


def ends(model: Path, count: int, rng: random.Random) -> dict[str, Any]:
    """End servers by SIGTERM while clients draw; count jobs that were taken and of whose end no client was told."""
    codes, answers, untold, slowest = Counter[int](), Counter[str](), 0, 0.0
    for number in range(count):
        with tempfile.TemporaryDirectory() as folder:
            record = Path(folder) / "taken"
            record.touch()
            pid, place = _serve(model, record, short=number % 2 == 1)
            heard, stop = dict[str, str](), threading.Event()
            clients = [
                threading.Thread(target=_draw_on, args=(place, client, rng.randrange(5, 60), heard, stop))
                for client in range(CLIENTS)
            ]
            for client in clients:
                client.start()
            time.sleep(rng.uniform(0.05, 1.5))
            begun = time.monotonic()
            os.kill(pid, signal.SIGTERM)
            status = os.waitpid(pid, 0)[1]
            slowest = max(slowest, time.monotonic() - begun)
            stop.set()
            for client in clients:
                client.join()
            taken = record.read_text().splitlines()
        codes[os.waitstatus_to_exitcode(status)] += 1
        lost = [prompt for prompt in taken if heard.get(prompt, "") == ""]
        untold += len(lost)
        answers.update(heard[prompt] for prompt in taken if prompt not in lost)
        if lost:
            print("untold:", lost, flush=True)
    return {
        "ends": count,
        "jobs_taken": answers.total() + untold,
        "answers": dict(answers),
        "jobs_untold": untold,
        "exit_codes": dict(codes),
        "other_exit_codes": count - codes[0],
        "slowest_end": round(slowest, 1),
    }


def _serve(model: Path, record: Path, short: bool) -> tuple[int, str]:
    """Fork a process that is `latentdiff serve`, and notes the prompts of the jobs that it takes; return its address.

    Args:
        short: let jobs go on for a second only.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reading)
            sys.stdout = os.fdopen(writing, "w")
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            _note(record)
            if short:
                latentdiff.serve.http.limits.Limits = functools.partial(Limits, drain_seconds=DRAIN)  # type: ignore[misc,assignment]
            code = command(["serve", "--model", str(model), "--port", "0", "--device", "cpu", "--batch", "2"])
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as said:
        return pid, urlsplit(said.readline().strip()).netloc


def _note(record: Path) -> None:
    """Let the desk write down the prompt of each job that it takes."""
    plain = Desk.hand_in

    def hand_in(desk: Desk, order: Order, claim: Claim, door: str) -> Taken:
        taken = plain(desk, order, claim, door)
        with record.open("a") as file:
            file.write(f"{order.options['prompt']}\n")
        return taken

    Desk.hand_in = hand_in  # type: ignore[method-assign]


def _draw_on(place: str, client: int, steps: int, heard: dict[str, str], stop: threading.Event) -> None:
    """Draw until the server is gone; note under each prompt what was heard of it."""
    number = 0
    while not stop.is_set():
        prompt = f"{client} {number}"
        kind = (GENERATIONS, "stream", JOBS, TXT2IMG)[(client + number) % 4]
        try:
            heard[prompt] = told(place, kind, prompt, steps, client)
        except (OSError, http.client.HTTPException):
            time.sleep(0.01)
        number += 1


def told(place: str, kind: str, prompt: str, steps: int, client: int) -> str:
    """Ask for a picture; return what was heard of its end: "picture", a code of an error, or nothing.

    Args:
        place: host and port.
        kind: the path, or "stream".
        prompt, steps: of the picture.
        client: number of the client, which has an address of its own.
    """
    fields = {"prompt": prompt, "steps": steps, "cfg_scale": 1.0} if kind == TXT2IMG else None
    fields = fields or {"prompt": prompt, "steps": steps, "stream": kind == "stream", **PLAIN}
    if kind == JOBS:
        del fields["stream"]
    status, said = _asked(place, client, "POST", GENERATIONS if kind == "stream" else kind, json.dumps(fields))
    if kind == JOBS and status == 202:
        try:
            _, events = _asked(place, client, "GET", f"{JOBS}/{json.loads(said)['id']}/events", None)
        except ConnectionRefusedError:
            return "server gone"
        return _last(events, {"done": "picture"})
    if kind == "stream" and status == 200:
        return _last(said, {"image_generation.completed": "picture"})
    if status == 200:
        return "picture" if json.loads(said).get("data" if kind == GENERATIONS else "images") else ""
    return str(json.loads(said)["error"]["code"])


def _last(events: str, good: dict[str, str]) -> str:
    """Return what the last of some server-sent events means; nothing if that is no end."""
    name, _, data = events.rstrip().rpartition("event: ")[2].partition("\n")
    if name in good or name not in (*ENDS, "error"):
        return good.get(name, "")
    return str(json.loads(data.removeprefix("data: "))["error"]["code"])


def _asked(place: str, client: int, method: str, path: str, body: str | None) -> tuple[int, str]:
    source = (f"127.0.0.{client + 2}", 0)
    with closing(http.client.HTTPConnection(place, timeout=SECONDS, source_address=source)) as connection:
        connection.request(method, path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def until(true: Callable[[], bool], seconds: float = SECONDS) -> bool:
    """Wait until something is true; say whether it was in that time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


if __name__ == "__main__":
    main()

"""Send a server what nobody should send, and see that it refuses that and does not fail.

    pip install schemathesis
    python tests/benchmarks/serve_fuzz.py
    python tests/benchmarks/serve_fuzz.py --requests 600 --bodies 300 --seed 7

Requests follow the OpenAPI file, or break it, as schemathesis makes them, in turn for each route; names of jobs and
links are often real ones. Bodies are forms and JSON with pictures, whose values or bytes were changed, cut and
doubled. The model is a tiny one. Faults are: an answer of 5xx but 503, an error that the server logs as not foreseen,
and a whole request without an answer. Prints the first of each kind, counts of every route, and a JSON line; ends with
1 if there was any.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import itertools
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import SkipTest
from urllib.parse import urlsplit

import requests
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from latentdiff import Pipeline
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.openai.fields import GenerationRequest
from tests.conftest import build_model
from tests.hostile_inputs import changed, damaged, odd_text, odd_value
from tests.models.tiny import noise_picture
from tests.serve.running import started

STEPS = 2  # of a picture, where the request does not say it
LIMITS = Limits(steps=8, n=2, pixels=64 * 64, queue=200, client_jobs=200, kept_jobs=50, body_seconds=5)
SECONDS = 120  # for an answer
EACH = 60  # requests of a kind to a route, before those to the next
FORMS = ("/v1/images/edits", "/v1/images/variations")
SETTINGS = ("guidance_scale", "sampler", "feather", "outpaint", "timesteps", "hires", "size", "stream", "background")


@dataclass(eq=False)
class Figures(logging.Handler):
    """What came of all requests, and what the server logged."""

    routes: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    asked: Callable[[], str] = str

    def __post_init__(self) -> None:
        super().__init__(logging.ERROR)

    def answered(self, route: str, status: int, said: str) -> None:
        """Count an answer."""
        self.routes[route] += 1
        self.statuses[status] += 1
        if status >= 500 and status != 503:
            self.fault(f"{route} {status}", said)

    def fault(self, kind: str, said: str) -> None:
        """Count a fault, and print the first of its kind."""
        if not self.faults[kind]:
            print(f"FAULT {kind}: {ascii(said)[:300]}\n  asked: {self.asked()[:1000]}", flush=True)
        self.faults[kind] += 1

    def emit(self, record: logging.LogRecord) -> None:
        """Count an error that was not foreseen."""
        error = record.exc_info[1] if record.exc_info else None
        place = "" if error is None or error.__traceback__ is None else _innermost(error)
        self.fault(f"logged {type(error).__name__}{place}", f"{record.getMessage()}: {error}")


def _innermost(error: BaseException) -> str:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return "" if frame is None else f" in {Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000, help="made of the OpenAPI file")
    parser.add_argument("--bodies", type=int, default=5_000, help="with pictures")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures, begin = Figures(), time.monotonic()
    logging.getLogger().addHandler(figures)
    with tempfile.TemporaryDirectory() as place:
        loaded = Pipeline.from_pretrained(build_model(Path(place)), device="cpu")
        pipe = Pipeline(replace(loaded.components, defaults={"num_inference_steps": STEPS, "guidance_scale": 1.0}))
        with started({"tiny": pipe}, batch=4, limits=LIMITS) as (_, url):
            by_schema(url, arguments.requests, arguments.seed, figures)
            by_bodies(url, arguments.bodies, arguments.seed, figures)
            alive = requests.get(f"{url}/readyz", timeout=SECONDS).status_code == 200
    for route, count in sorted(figures.routes.items()):
        print(f"{count:7} {route}")
    print("answers", dict(sorted(figures.statuses.items())))
    counts = {"requests": figures.routes.total(), "faults": figures.faults.total(), "alive": alive}
    print(json.dumps({"seed": arguments.seed, "seconds": round(time.monotonic() - begin), **counts}))
    return int(bool(figures.faults) or not alive)


def by_schema(url: str, count: int, chance: int, figures: Figures) -> None:
    """Send requests that schemathesis makes of the OpenAPI file."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    session, rng = requests.Session(), random.Random(chance)

    def sending(route: str) -> Callable[[Any], None]:
        def send(case: Any) -> None:
            figures.asked = case.as_curl_command
            try:
                _aim(case, url, session, rng)
                answer = case.call(session=session, timeout=SECONDS)
            except requests.RequestException as error:
                figures.fault(f"{route} no answer", str(error))
                return
            figures.answered(route, answer.status_code, answer.content.decode(errors="replace"))

        return send

    for number in itertools.count():
        for operation, mode in itertools.product(operations, GenerationMode):
            send = sending(f"{operation.method.upper()} {operation.path}")
            _often(send, operation.as_strategy(generation_mode=mode), EACH, chance + number)
            if figures.routes.total() >= count:
                return
        print(f"{figures.routes.total():7} requests, {figures.faults.total()} faults", flush=True)


def _often(send: Callable[[Any], None], strategy: Any, count: int, chance: int) -> None:
    """Call a function with so many examples of a strategy, or as many as it has."""
    limits = settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    with suppress(Unsatisfiable, SkipTest):  # where nothing can be sent that breaks the file
        seed(chance)(limits(given(strategy)(send)))()


def _aim(case: Any, url: str, session: requests.Session, rng: random.Random) -> None:
    """Let a request be for a job or a link that there is, most often."""
    if "name" not in case.path_parameters or rng.random() < 0.2:
        return
    prompt = {"prompt": "fox", "previews": 1} if "jobs" in case.path else {"prompt": "fox", "response_format": "url"}
    if "jobs" in case.path:
        case.path_parameters["name"] = session.post(f"{url}/v1/jobs", json=prompt, timeout=SECONDS).json()["id"]
        if "index" in case.path_parameters and rng.random() < 0.8:
            case.path_parameters["index"] = 0
    elif "files" in case.path:
        made = session.post(f"{url}/v1/images/generations", json=prompt, timeout=SECONDS).json()["data"][0]["url"]
        case.path_parameters["name"] = urlsplit(made).path.rpartition("/")[2]


def by_bodies(url: str, count: int, chance: int, figures: Figures) -> None:
    """Send forms and JSON with pictures that are not as they should be."""
    place = urlsplit(url).netloc
    for number in range(count):
        rng = random.Random(f"{chance}/{number}")
        path, kind, body = rng.choice((_form, _form, _json))(rng)
        if rng.random() < 0.3:
            body = damaged(body, rng)
        if rng.random() < 0.05:
            kind = rng.choice((kind.partition(";")[0], kind + "x", "", "multipart/form-data; boundary=", kind * 300))
        said = f"body {number} of seed {chance}: POST {path} {kind} {body[:300]!r}"
        figures.asked = said.__str__
        connection = http.client.HTTPConnection(place, timeout=SECONDS)
        try:
            connection.request("POST", path, body, {"content-type": kind})
            answer = connection.getresponse()
            figures.answered(f"POST {path} (bodies)", answer.status, answer.read().decode("utf-8", "replace"))
        except (OSError, http.client.HTTPException) as error:
            figures.fault(f"{path} no answer", repr(error))
        finally:
            connection.close()


def _picture(rng: random.Random) -> bytes:
    """Return a picture file, most often one that is damaged."""
    file, kind = io.BytesIO(), rng.choice(("PNG", "PNG", "JPEG", "WEBP"))
    modes = ("RGB", "L") if kind == "JPEG" else ("RGB", "RGBA", "L", "P", "1")
    noise_picture(rng.choice((32, 32, 1, 7, 40)), 32).convert(rng.choice(modes)).save(file, kind)
    return damaged(file.getvalue(), rng) if rng.random() < 0.5 else file.getvalue()


def _form(rng: random.Random) -> tuple[str, str, bytes]:
    """Return the path, the type and the bytes of a form."""
    parts: list[tuple[str, str | bytes]] = [("prompt", "fox"), ("steps", "2"), ("seed", "1"), ("image", _picture(rng))]
    if rng.random() < 0.5:
        parts.append(("mask", _picture(rng)))
    for _ in range(rng.randrange(3)):
        name = rng.choice((*SETTINGS, *GenerationRequest.model_fields, odd_text(rng)[:200]))
        parts.append((name, rng.choice((odd_text(rng), str(odd_value(rng)), rng.randbytes(9), "2"))))
    rng.shuffle(parts)
    edge, lines = b"edge%d" % rng.randrange(10), list[bytes]()
    for name, value in parts:
        file = b'; filename="a.png"' if isinstance(value, bytes) else b""
        data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
        head = b'content-disposition: form-data; name="%s"' % name.encode("utf-8", "surrogatepass")
        lines += [b"--" + edge, head + file, b"", data]
    body = b"\r\n".join([*lines, b"--" + edge + b"--", b""])
    return rng.choice(FORMS), f"multipart/form-data; boundary={edge.decode()}", body


def _json(rng: random.Random) -> tuple[str, str, bytes]:
    """Return the path, the type and the bytes of an object with pictures in base64."""

    def coded() -> str:
        text = base64.b64encode(_picture(rng)).decode()
        head = rng.choice(("", "", "data:image/png;base64,", "data:;base64,", "data:,"))
        return head + (damaged(text.encode(), rng).decode("latin-1") if rng.random() < 0.2 else text)

    usual = {"prompt": "fox", "steps": 2, "seed": 1}
    path, values = rng.choice(
        (
            ("/v1/jobs", {**usual, "image": coded(), "mask": rng.choice((coded(), "alpha", [0, 0, 9, 9]))}),
            ("/sdapi/v1/img2img", {**usual, "init_images": [coded()], "mask": coded(), "mask_blur": 4}),
            ("/sdapi/v1/img2img", {**usual, "init_images": [coded()], "width": 32, "height": 32, "cfg_scale": 1}),
            ("/sdapi/v1/extra-single-image", {"image": coded(), "upscaling_resize": 2, "upscaler_1": "Lanczos"}),
            ("/sdapi/v1/png-info", {"image": coded()}),
        )
    )
    for _ in range(rng.randrange(3)):
        values = changed(values, rng)
    return path, "application/json", json.dumps(values).encode()


if __name__ == "__main__":
    sys.exit(main())

"""A server with its page on a real socket, and a real browser."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from latentdiff import Pipeline
from latentdiff.diffusion import NoiseSchedule
from latentdiff.models.unet import UNet2DConditionModel
from tests.models.tiny import randomize
from tests.needs import leave_out, needing
from tests.serve.gate import Gate
from tests.serve.running import started

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

    from latentdiff.serve.http.server import Server

NEEDED = ("axe_playwright_python", "fastapi", "gradio", "httpx", "playwright", "prometheus_client", "uvicorn")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Alone on this machine, also as root; without the others it asks its maker's servers at every start.
SWITCHES = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--disable-gpu-rasterization"),
)

pytest_pycollect_makemodule = needing(NEEDED)


@dataclass
class Opened:
    """A server with a page.

    Attributes:
        server: itself.
        url: of it, without a path.
    """

    server: Server
    url: str


Open = Callable[..., Opened]


REACHED = list[object]()  # addresses that were asked for or connected to


def _listen_in(event: str, arguments: tuple[object, ...]) -> None:
    if event == "socket.getaddrinfo":
        REACHED.append(arguments[0])
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        REACHED.append(arguments[1][0])


@pytest.fixture(scope="session")
def _listening() -> None:
    sys.addaudithook(_listen_in)  # which cannot be taken back


@pytest.fixture(autouse=True)
def nobody_else_is_asked(_listening: None) -> Iterator[None]:
    """Let no test pass whose server asks another machine for something."""
    REACHED.clear()
    yield
    assert set(REACHED) <= {"127.0.0.1", "localhost"}


@contextmanager
def opened(pipes: dict[str, Pipeline], **options: Any) -> Iterator[Opened]:
    """Serve models, with a page."""
    from latentdiff.serve.page.mount import mount_page

    with started(pipes, page=mount_page, **options) as (server, url):
        yield Opened(server, url)


@pytest.fixture
def open_page() -> Iterator[Open]:
    """Start servers that end with the test: `open_page({"tiny": pipe}, limits=...)`."""
    with ExitStack() as stack:
        yield lambda pipes, **options: stack.enter_context(opened(pipes, **options))


@pytest.fixture(scope="session")
def upscaler(pipe: Pipeline) -> Pipeline:
    """A model that draws 4 times as large."""
    unet = UNet2DConditionModel(replace(pipe.unet.config, in_channels=7, num_class_embeds=1000)).requires_grad_(False)
    randomize(unet)
    low = NoiseSchedule(beta_schedule="linear", class_name="DDPMScheduler")
    return Pipeline(replace(pipe.components, unet=unet, low_res_schedule=low))


@pytest.fixture(scope="module")
def server(pipe: Pipeline, upscaler: Pipeline) -> Iterator[Opened]:
    """A server for all tests of a module, which leave it as it was."""
    with opened({"tiny": pipe, "large": upscaler}, batch=4) as answering:
        yield answering


@pytest.fixture
def gate(pipe: Pipeline) -> Iterator[Gate]:
    """A model whose steps wait until they are let through."""
    gate = Gate(pipe)
    yield gate
    gate.open()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, for one module: while Playwright goes on, asyncio takes this thread to be inside an event loop."""
    from playwright.sync_api import sync_playwright

    found = next((path for path in map(shutil.which, BROWSERS) if path is not None), None)
    if found is None:
        leave_out("needs Chromium, which Debian's package chromium installs")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=list(SWITCHES))
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A window whose pages share what they loaded, and that asks nobody but this machine."""
    context, asked = browser.new_context(viewport={"width": 1280, "height": 860}, reduced_motion="reduce"), list[str]()
    context.set_default_timeout(180_000)  # machines are shared
    context.on("request", lambda request: asked.append(request.url))
    yield context
    context.close()
    assert asked and not [url for url in asked if not re.match(r"http://127\.0\.0\.1:\d+/|data:|blob:", url)]


@pytest.fixture
def tab(context: BrowserContext) -> Iterator[Page]:
    """An empty page."""
    tab = context.new_page()
    yield tab
    tab.close()


@dataclass
class Hands:
    """What someone does on the page.

    Attributes:
        tab: with the page.
        place: for pictures of it.
    """

    tab: Page
    place: Path

    def write(self, label: str, text: str) -> None:
        """Write into a field."""
        field = self.tab.get_by_label(label, exact=True)
        field.fill(text)
        field.blur()

    def press(self, name: str, inside: str = "body") -> None:
        """Press a button."""
        self.tab.locator(inside).get_by_role("button", name=name, exact=True).click()

    def unfold(self, name: str) -> None:
        """Open what is folded away."""
        self.tab.get_by_role("button", name=name).click()

    def choose(self, mode: str) -> None:
        """Choose how to draw."""
        self.tab.get_by_role("radio", name=mode).check(force=True)

    def says(self, text: str) -> str:
        """Wait until the page says something, and return all of it."""
        status = self.tab.locator("#status")
        status.filter(has_text=re.compile(text)).wait_for()
        return status.inner_text().strip()

    def draw(self) -> None:
        """Draw, and wait for the pictures."""
        self.press("Draw")
        self.says(r"Done in")

    @property
    def link(self) -> str:
        """Address of the chosen picture."""
        address = self.tab.get_by_role("link", name="Save PNG").get_attribute("href")
        assert address is not None
        return address

    def saved(self, name: str = "picture.png") -> Path:
        """Save the chosen picture and return its path."""
        with self.tab.expect_download() as coming:
            self.tab.get_by_role("link", name="Save PNG").click()
        coming.value.save_as(self.place / name)
        return self.place / name

    def look(self, name: str) -> None:
        """Take a picture of the page."""
        self.tab.screenshot(path=self.place / f"{name}.png", full_page=True)


@pytest.fixture
def hands(tab: Page, tmp_path: Path) -> Callable[[Opened], Hands]:
    """Open the page of a server: `hands(server)`."""

    def open_at(server: Opened) -> Hands:
        tab.goto(f"{server.url}/")
        tab.get_by_label("Prompt", exact=True).wait_for()
        return Hands(tab, tmp_path)

    return open_at

"""`latentdiff ui`: a page to draw on, on this machine, opened in the browser."""

from __future__ import annotations

import argparse
import threading
import webbrowser

from latentdiff.commands.serve import add_serving, serve

HELP = "Open a page to draw on."
USUAL = [None, "embedded-inpaint", "embedded-upscale"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_serving(parser, "the embedded ones by default")


def run(options: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    serve(options, options.model or USUAL, with_page=True, ready=_open)


def _open(address: str, with_page: bool) -> None:
    page = f"{address.replace('0.0.0.0', 'localhost').replace('[::]', 'localhost')}/ui/"
    print(page, flush=True)
    threading.Thread(
        target=webbrowser.open, args=(page,), daemon=True
    ).start()  # a browser of a terminal would not return

"""The page of a speedrun: what was done and how long it took, curves, pictures over time, figures, how to go on."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from latentdiff.evaluate.figure import Figure
from latentdiff.evaluate.page import STYLE, details, figure_table
from latentdiff.files import write_file

from ..config import DiffusionTraining
from .curves import curve, read_scalars
from .measure import FOLDER
from .record import Record, Stage

PAGE = "report.html"
OWN_STYLE = "img.grid { max-width: 100%; image-rendering: pixelated; } svg { margin-right: 1rem; }"
WHAT = {
    "look": "looking at the machine and the pictures",
    "data": "drawing the emoji",
    "autoencoder": "training the autoencoder",
    "unet": "training the U-Net",
    "evaluation": "measuring",
}
# What is drawn of the log of each run.
CURVES = {
    "autoencoder": {"loss": "loss", "held_out_psnr": "PSNR in dB of pictures not trained on"},
    "": {"loss": "loss", "held_out/loss": "loss of pictures not trained on"},
}


def write_report(record: Record, figures: Sequence[Figure], config: DiffusionTraining | None = None) -> Path:
    """Write the page of what is done until now and return its path.

    Args:
        config: of the U-Net, once it is trained.

    Raises:
        StorageError: it cannot be written.
    """
    path = record.folder / PAGE
    write_file(path, page(record, figures, config).encode("utf-8", "backslashreplace"))
    return path


def page(record: Record, figures: Sequence[Figure], config: DiffusionTraining | None) -> str:
    """Return the page as HTML that needs no other file."""
    name = escape(Path(record.subject["pictures"]).name)
    head = (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Speedrun of {name}</title>\n'
        f"<style>{STYLE}{OWN_STYLE}</style>\n<h1>Speedrun of {name}</h1>"
    )
    parts = [
        head,
        *_summary(record),
        *_pictures(record.folder, config),
        *_over_time(record.folder),
        *_reconstructions(record.folder),
        *_curves(record.folder),
        *_figures(record, figures),
        *_going_on(record.folder, config),
    ]
    return "\n".join(parts) + "\n</html>\n"


def _summary(record: Record) -> Iterator[str]:
    facts, machine = record.facts, record.facts.get("machine", {})
    yield (
        f"<p>{record.spent / 60:.1f} of {facts['minutes']:g} minutes, on {escape(str(machine.get('name')))} "
        f"({machine.get('threads')} threads). Trained: {escape(facts.get('size', 'nothing yet'))}: "
        f"{escape(facts.get('why', ''))}. The text encoder is the pretrained one of the package, as always.</p>"
    )
    for note in record.notes:
        yield f"<p><b>Note.</b> {escape(note)}</p>"
    yield "<table><tr><th>stage<th>planned<th>took<th>steps planned<th>steps<th>changed on the way"
    for name, stage in record.stages.items():
        yield _row(name, stage)
    yield "</table>"
    for title in ("machine", "pictures", "plan"):
        if title in facts:
            yield details(title, facts[title])


def _row(name: str, stage: Stage) -> str:
    planned = "" if stage.planned is None else f"{stage.planned / 60:.1f} min"
    cells = [planned, f"{stage.seconds / 60:.1f} min", stage.planned_steps or "", stage.steps or ""]
    numbers = "".join(f'<td class="number">{cell}' for cell in cells)
    changes = "<br>".join(map(escape, stage.changes))
    return f"<tr><td>{WHAT[name]}{'' if stage.done else ' (not done)'}{numbers}<td>{changes}"


def _pictures(folder: Path, config: DiffusionTraining | None) -> Iterator[str]:
    grids = _grids(folder)
    if config is None or not grids:
        return
    prompts = config.samples.prompts
    told = "" if len({*prompts}) == 1 else f"<p>{escape(' · '.join(prompts))}</p>"
    yield f"<h2>What it draws</h2>{told}{_image(grids[-1])}"
    scale = f"guidance {config.samples.guidance_scale:g}"
    yield f"<p>Seeds 0 to {len(prompts) - 1}, not chosen, from left to right, {scale}.</p>"


def _over_time(folder: Path) -> Iterator[str]:
    grids = _grids(folder)
    if len(grids) > 1:
        yield "<h2>The same over time</h2>"
        for grid in grids:
            yield f"<p>after step {int(grid.stem)}<br>{_image(grid)}</p>"


def _reconstructions(folder: Path) -> Iterator[str]:
    if grids := _grids(folder / "autoencoder"):
        yield "<h2>What the autoencoder gives back</h2>"
        yield f"<p>Rows of pictures, each above what became of them.</p>{_image(grids[-1])}"


def _curves(folder: Path) -> Iterator[str]:
    found = []
    for run, names in CURVES.items():
        scalars = read_scalars(folder / run, *names)
        found += [curve(f"{run or 'U-Net'}: {names[name]}", points) for name, points in scalars.items()]
    if any(found):
        yield f"<h2>Curves</h2>{''.join(found)}"


def _figures(record: Record, figures: Sequence[Figure]) -> Iterator[str]:
    if not figures:
        return
    trained = any(figure.protocol.get("split") == "train" for figure in figures)
    yield f"<h2>Figures</h2>{figure_table(figures)}"
    if trained:
        yield (
            "<p>Too few pictures to hold any out: these are measured by those that were trained on, so that they say "
            "whether the model draws their like, not whether it draws anything new.</p>"
        )
    yield f'<p>All pictures that were measured: <a href="{FOLDER}/report.html">{FOLDER}/report.html</a>.</p>'


def _going_on(folder: Path, config: DiffusionTraining | None) -> Iterator[str]:
    if config is None:
        yield "<h2>Go on</h2><p>The same command goes on where it stopped.</p>"
        return
    yield f"<h2>Go on</h2><pre>{escape(chr(10).join(commands(folder, config)))}</pre>"


def commands(folder: Path, config: DiffusionTraining) -> list[str]:
    """Return the commands that use the model, and train it further."""
    place, prompts = shlex.quote(str(folder)), {*config.samples.prompts}
    prompt = f"{shlex.quote(config.samples.prompts[0])} " if len(prompts) > 1 else ""
    steps = 2 * config.run.steps
    measured = "--metrics kid --features latents" if config.autoencoder or config.start_from else "--metrics nll"
    return [
        f"latentdiff generate {prompt}--model {place}/model",
        f"latentdiff evaluate {place}/model --data {shlex.quote(config.data.folder)} --split train --n 100 {measured}",
        f"latentdiff train {place}/config.yaml --resume --set run.steps={steps}",
    ]


def _grids(run: Path) -> list[Path]:
    return sorted((run / "samples").glob("[0-9]*.png"))


def _image(file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img class="grid" src="data:image/png;base64,{data}" alt="">'

"""`latentdiff speedrun`: from pictures to a model and a page about it, in the time given."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from accelerate import Accelerator

from latentdiff.errors import InputError, LatentDiffError, MissingDependencyError, StorageError
from latentdiff.evaluate.figure import Figure
from latentdiff.evaluate.report import read_report
from latentdiff.files import is_file
from latentdiff.prompts import check_prompt

from ..config import DataConfig, DiffusionTraining, RunConfig, data_config
from ..data.dataset import captions_of
from ..data.source import Source
from ..data.sources import open_source
from ..datasets.emoji import build
from ..loop.distributed import start_accelerator
from ..loop.run import locked
from ..train_autoencoder import train_autoencoder
from ..train_diffusion import train_diffusion
from . import measure, table
from .begin import Choice, choose_model, costs_of, fitting_device, measure_machine, start_model, work_of
from .machine import Machine
from .plan import Plan, choose, pictures_of_metric, plan
from .recipes import Material, autoencoder_batch, autoencoder_config, unet_config
from .record import DATA, LOCK, Clock, Record
from .report import write_report
from .stages import run_stage
from .survey import STRANGE, Survey, survey
from .table import Size, Work

EMOJI = "emoji"
LONGEST = 7 * 24 * 60.0  # minutes
FEW = 20  # pictures, below which they are learnt by heart
TEXTS = 1000  # captions, some of which are drawn on the way


@dataclass(frozen=True)
class Wish:
    """What was asked for.

    Attributes:
        source: "emoji", or pictures as `data.folder` of a config names them.
        minutes: for everything.
        caption: one for all pictures; None for their own.
        from_nothing: train a new model, whatever there is.

    Raises:
        InputError: the minutes are no time, or the caption cannot be used.
    """

    source: str
    minutes: float = 30.0
    caption: str | None = None
    from_nothing: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= LONGEST:
            raise InputError(f"--minutes must be above 0 and at most {LONGEST:.0f}, got {self.minutes:g}; try 30")
        if self.emoji and self.caption is not None:
            raise InputError("emoji have captions of their own, got --caption; leave it out")
        if self.caption is not None:
            check_prompt(self.caption, what="--caption")

    @property
    def emoji(self) -> bool:
        """Whether the pictures are drawn by `latentdiff data emoji`."""
        return self.source == EMOJI

    @property
    def folder(self) -> str:
        """The pictures, from wherever the command is given again."""
        here = not self.emoji and os.path.exists(self.source)
        return os.path.abspath(self.source) if here else self.source

    @property
    def name(self) -> str:
        """What folders are called by it."""
        return EMOJI if self.emoji else Path(self.folder).name.partition(".")[0] or "pictures"

    def data(self, side: int = 64) -> DataConfig:
        """Return which pictures are meant."""
        config = data_config(self.folder, side)
        return config if self.caption is None else config.model_copy(update={"captions": [self.caption]})


def speedrun(wish: Wish, out: str | None = None, clock: Clock = time.monotonic) -> Path:
    """Train a model of pictures in the time given, and return the page about it.

    A speedrun that was broken off goes on where it stopped, by the same call.

    Args:
        out: folder; one in runs/, called as the pictures are, when None.
        clock: tells the time in seconds.

    Raises:
        InputError: the pictures cannot be used, there is too little time, or `out` holds something else.
        MissingDependencyError, StorageError: as of the stages.
        KeyboardInterrupt: somebody stopped it; the message says how to go on.
    """
    source = None if wish.emoji else open_source(wish.data())  # what cannot be read is refused before anything is made
    folder = Path(out or f"runs/speedrun-{wish.name}")
    subject = {"pictures": wish.folder, "caption": wish.caption, "from nothing": wish.emoji or wish.from_nothing}
    with locked(folder, LOCK):
        record = Record(folder, subject, clock)
        record.facts["minutes"] = wish.minutes
        try:
            return Speedrun(wish, source, record).run()
        except StorageError as error:  # of a stage, which knows the command of a stage alone
            record.release()
            raise StorageError(str(error).replace("go on with --resume", "give the same command again")) from error
        except (InputError, MissingDependencyError):
            record.release()
            raise
        except KeyboardInterrupt:
            done = ", ".join(name for name, stage in record.stages.items() if stage.done) or "nothing yet"
            raise KeyboardInterrupt(f"interrupted; done: {done}; the same command goes on in {folder}") from None


class Speedrun:
    """The parts of a speedrun, one after the other; each that is done already is passed over.

    Args:
        source: the pictures; None for emoji, which are drawn first.
    """

    def __init__(self, wish: Wish, source: Source | None, record: Record) -> None:
        self.wish, self.source, self.record, self.folder = wish, source, record, record.folder
        self.total = 60 * wish.minutes
        example = RunConfig(out=str(self.folder), steps=1, batch_size=1)
        self.accelerator: Accelerator = start_accelerator(example)

    def run(self) -> Path:
        """Do what is left to be done, and return the page."""
        machine = self.look()
        size, material = self.decide(machine)
        costs = costs_of(size, machine)
        if "plan" not in self.record.facts:
            work, spent = self.work(size), self.record.spent
            choose([size], {size.name: costs}, {size.name: work}, self.total - spent, spent)
            found = plan(size, costs, work, spent, self.total, autoencoder_batch(size))
            self.record.facts["plan"] = asdict(found)
            if found.unet_steps == found.most:
                passes = table.PASSES[not size.recipe]
                self.record.note(f"Less time is used than there is: after {passes} passes it would copy the pictures.")
            self.record.save()
        todo = Plan(**self.record.facts["plan"])
        ends = {name: end * self.total / todo.ends["evaluation"] for name, end in todo.ends.items()}  # of other minutes
        self.say(f"{size.name}: {todo.autoencoder_steps} + {todo.unet_steps} steps planned; {self.record.facts['why']}")
        if size.autoencoder and not self.done("autoencoder"):
            out = self.folder / "autoencoder"
            config = autoencoder_config(size, material, todo, out, costs.autoencoder)
            run_stage(self.record, "autoencoder", config, train_autoencoder, ends["autoencoder"])
            write_report(self.record, ())
        start, components = start_model(material.start, self.folder)
        material = replace(material, start=start)
        diffusion = unet_config(size, material, todo, self.folder, costs.unet, components)
        del components  # whose memory the training needs
        if not self.done("unet"):
            run_stage(self.record, "unet", diffusion, train_diffusion, ends["unet"], todo.most)
            write_report(self.record, (), diffusion)
        figures = self.evaluate(diffusion, material.reads_text, costs.unet)
        return write_report(self.record, figures, diffusion)

    def done(self, name: str) -> bool:
        """Say whether a stage is done."""
        return name in self.record.stages and self.record.stages[name].done

    def say(self, line: str) -> None:
        """Tell people something."""
        print(f"{line} ({self.record.spent / 60:.1f} of {self.total / 60:.3g} minutes)", file=sys.stderr, flush=True)

    def look(self) -> Machine:
        """Return how fast the machine is, and look at the pictures that are there."""
        facts = self.record.facts
        if not self.done("look"):
            with self.record.stage("look"):
                captions = self.source is None or not self.source.uncaptioned
                facts["machine"] = asdict(measure_machine(self.accelerator, captions))
                if self.source is not None:
                    facts["pictures"] = asdict(survey(self.wish.data(), self.source, self.folder / "cache"))
                    self.remark(Survey(**facts["pictures"]))
        elif self.source is not None:
            now = survey(self.wish.data(), self.source, self.folder / "cache")
            if now.digest != self.pictures.digest:
                raise InputError(
                    f"the pictures of {self.wish.folder} have changed since the speedrun in {self.folder} began; "
                    "choose another --out"
                )
        return Machine(**facts["machine"])

    def work(self, size: Size) -> Work:
        """Return how much there is of the data."""
        return size.emoji if self.wish.emoji else work_of(self.pictures)

    @property
    def pictures(self) -> Survey:
        """What was found of the pictures."""
        return Survey(**self.record.facts["pictures"])

    def remark(self, found: Survey) -> None:
        """Note what people should know of their pictures."""
        if found.pictures == 0:
            raise InputError(f"{self.wish.folder} has no picture that can be used; add some")
        if found.pictures < FEW:
            self.record.note(f"{found.pictures} pictures are learnt by heart; some 50 would be a style.")
        if found.captions == 0:
            self.record.note("The pictures have no captions: the model draws without a prompt.")
        if found.captions == 1:
            self.record.note("All pictures have one caption: the model draws their like, whatever else is asked for.")
        if found.strange > STRANGE:
            self.record.note(
                f"The text encoder reads English: it knows {1 - found.strange:.0%} of the words of these captions, and "
                "reads the others in pieces. They can be asked for as they are written, but near words mean nothing."
            )

    def decide(self, machine: Machine) -> tuple[Size, Material]:
        """Return what is trained, on what; emoji are drawn in the size that it needs."""
        facts, left = self.record.facts, self.total - self.record.spent
        if "size" not in facts:
            if self.wish.emoji:
                found = Choice(fitting_device(machine.device), None, "from nothing, as the embedded model was")
            else:
                cache = self.folder / "cache"
                found = choose_model(self.pictures, self.wish.data(), self.wish.from_nothing, machine, left, cache)
            costs = {size.name: costs_of(size, machine) for size in found.sizes}
            works = {size.name: self.work(size) for size in found.sizes}
            size = choose(found.sizes, costs, works, left, self.record.spent)
            facts |= {"size": size.name, "side": size.side, "start": found.start, "why": found.why}
            self.record.save()
        size = _size(facts["size"], facts["side"])
        if not self.wish.emoji:
            assert self.source is not None
            return size, Material(
                folder=self.wish.folder,
                captions=[] if self.wish.caption is None else [self.wish.caption],
                texts=texts_of(self.source),
                held_out=self.pictures.held_out,
                start=facts["start"],
            )
        data = self.folder / DATA
        if not self.done("data"):
            with self.record.stage("data"):
                build(data, size.side)
        return size, Material(folder=str(data), emoji=True)

    def evaluate(self, config: DiffusionTraining, reads_text: bool, cost: float) -> Sequence[Figure]:
        """Return figures of the model; none where there is too little to measure by, or it cannot be measured.

        Args:
            reads_text: whether it draws what a prompt says.
            cost: seconds of a sample of its training, where none was timed.
        """
        report = self.folder / measure.FOLDER / "report.json"
        if self.done("evaluation"):
            return read_report(report)[1] if is_file(report) else ()
        with self.record.stage("evaluation", planned=max(0.0, self.total - self.record.spent)):
            reference = measure.open_reference(config, self.folder)
            metrics = measure.metrics_of(reference, self.wish.emoji, reads_text)
            if not metrics:
                self.record.note(f"{len(reference)} pictures are too few to measure by.")
                return ()
            pace = self.record.stages["unet"].pace / config.run.batch_size or cost
            left = self.total - self.record.spent
            n = pictures_of_metric(left, pace * table.DRAWING, min(table.SETS, len(metrics)), len(reference))
            n = self.record.facts.setdefault("n", n)
            self.record.save()
            try:
                return measure.measure_model(config, self.folder, reference, metrics, n, self.accelerator.device)
            except StorageError:
                raise
            except LatentDiffError as error:
                self.record.note(f"The model could not be measured: {error}")
                return ()


def _size(name: str, side: int) -> Size:
    """Return the row of the table that was decided for."""
    known = {size.name: size for size in (*table.LATENTS, table.of_pixels(side), table.of_embedded(side))}
    return known[name]


def texts_of(source: Source) -> list[str]:
    """Return captions from all over, each once; none of pictures without any."""
    every = max(1, len(source) // TEXTS)
    found = (captions_of(row, source.uncaptioned) for row in source.rows[::every])
    return list(dict.fromkeys(one[0] for one in found if not isinstance(one, str) and one[0].strip()))

"""What fits into the time: arithmetic alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from latentdiff.errors import InputError

from . import table
from .table import Size, Work


@dataclass(frozen=True)
class Costs:
    """Seconds that this machine takes, for one size.

    Attributes:
        autoencoder, unet: a sample of their training; 0 where there is none.
        encode: a picture's latents.
        caption: its text states.
    """

    autoencoder: float
    unet: float
    encode: float
    caption: float

    def preparing(self, work: Work) -> float:
        """Return the seconds until the latents and texts of the data are there."""
        return work.pictures * work.views * self.encode + work.captions * self.caption


@dataclass(frozen=True)
class Plan:
    """What is trained, how long, and until when.

    Attributes:
        size: name of the row of the table.
        autoencoder_steps: 0 where none is trained.
        ends: seconds of the whole after which each stage is to be over.
        most: steps of the U-Net at most, however fast it is.
    """

    size: str
    side: int
    autoencoder_steps: int
    unet_steps: int
    unet_batch: int
    ends: Mapping[str, float]
    most: int


def needed(size: Size, costs: Costs, work: Work) -> float:
    """Return the seconds, from the start of the first training, that a size needs to be worth it."""
    grids = table.GRIDS * table.PROMPTS * table.DRAWING
    training = (size.least + grids) * costs.unet
    if size.autoencoder:
        training = max(
            training / (1 - table.AUTOENCODER), size.least_autoencoder * costs.autoencoder / table.AUTOENCODER
        )
    return table.STARTING + costs.preparing(work) + _with_measuring(training, table.DRAWING * costs.unet)


def _for_training(left: float, drawing: float) -> float:
    """Return which of the seconds that are left after preparing are for training.

    Args:
        drawing: seconds a picture that is drawn takes.
    """
    rest = left - min(table.SPARE * left, table.MOST_SPARE)
    return rest - min(table.MEASURING * rest, table.MOST_DRAWN * drawing)


def _with_measuring(training: float, drawing: float) -> float:
    """Return the seconds of which `_for_training` leaves so many."""
    rest = min(training / (1 - table.MEASURING), training + table.MOST_DRAWN * drawing)
    return min(rest / (1 - table.SPARE), rest + table.MOST_SPARE)


def choose(
    sizes: Sequence[Size], costs: Mapping[str, Costs], works: Mapping[str, Work], left: float, spent: float = 0.0
) -> Size:
    """Return the last size that fits.

    Args:
        sizes: the smallest first.
        costs, works: of each by its name.
        left: seconds.
        spent: seconds that are gone of the whole, for the message.

    Raises:
        InputError: none does; the message says how many minutes one would.
    """
    least = {size.name: needed(size, costs[size.name], works[size.name]) for size in sizes}
    fitting = [size for size in sizes if least[size.name] <= left]
    if fitting:
        return fitting[-1]
    minutes = math.ceil((spent + least[sizes[0].name]) / 60)
    raise InputError(
        f"{(spent + left) / 60:.3g} minutes are too few here: the smallest model, {sizes[0].name}, needs {minutes} on "
        f"this machine; pass --minutes {minutes}"
    )


def plan(size: Size, costs: Costs, work: Work, spent: float, total: float, batch: int = 12) -> Plan:
    """Return the plan of a size that fits.

    Args:
        spent, total: seconds that are gone, and of the whole.
        batch: of the autoencoder.
    """
    ready = spent + table.STARTING + costs.preparing(work)
    over = ready + _for_training(total - ready, table.DRAWING * costs.unet)
    first = ready + (over - ready) * (table.AUTOENCODER if size.autoencoder else 0.0)
    samples = max(0.0, (over - first) / costs.unet - table.GRIDS * table.PROMPTS * table.DRAWING)
    further = not size.recipe
    batches = [one for one in table.BATCHES if not further or one <= table.FURTHER_BATCH]
    unet_batch = next((one for one in batches if samples / one >= table.STEPS), batches[-1])
    most = max(table.LEAST_STEPS, math.ceil(table.PASSES[further] * work.pictures / unet_batch))
    autoencoder_steps = max(1, int((first - ready) / costs.autoencoder / batch)) if size.autoencoder else 0
    return Plan(
        size=size.name,
        side=size.side,
        autoencoder_steps=autoencoder_steps,
        unet_steps=min(most, max(1, int(samples / unet_batch))),
        unet_batch=unet_batch,
        ends={"autoencoder": first, "unet": over, "evaluation": total},
        most=most,
    )


def steps_that_fit(done: int, planned: int, pace: float, left: float, decay_share: float, most: int) -> int:
    """Return how many steps a stage is to have in all, when so many are done and each takes `pace` seconds.

    While the learning rate is constant they may become more or fewer; once it falls, fewer only, so that it falls
    faster and never rises again.

    Args:
        planned: steps up to now.
        left: seconds.
        decay_share: of all steps, at the end, over which the learning rate falls.
    """
    fitting = min(most, done + max(1, int(left / pace)))
    return min(fitting, planned) if done >= planned * (1 - decay_share) else fitting


def worth_changing(done: int, planned: int, fitting: int, pace: float, decay_share: float) -> bool:
    """Say whether another number of steps is worth stopping for, which costs the time to open everything again.

    It is not while the rate is constant by either plan: until then nothing follows from how many steps there will be,
    and later more is known.
    """
    if done + 1 < min(planned, fitting) * (1 - decay_share):
        return False
    seconds = abs(fitting - planned) * pace
    return seconds > max(2 * table.STARTING, 0.1 * (planned - done) * pace)


def pictures_of_metric(left: float, drawing: float, sets: int, there: int) -> int:
    """Return how many pictures each metric takes.

    Args:
        left: seconds.
        drawing: seconds of a picture.
        sets: how many sets are drawn.
        there: real pictures to measure by.
    """
    fewest, most = table.DRAWN
    return min(there, max(fewest, min(most, int(left / (drawing * sets)))))

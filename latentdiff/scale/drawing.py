"""Draw rows with a model: each prepared alone, sampled in batches, and failing alone.

The images of a batch may differ in everything. Each goes its own way through its sampler, and the calls of the U-Net
that have the same shape are made as one; see `engine.joined_calls`. Batches are fixed runs of the rows that are asked
for, so that the same rows give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from latentdiff.devices import OutOfDeviceMemoryError, release_freed_memory
from latentdiff.diffusion import Step
from latentdiff.engine.joined_calls import JoinedUNet, text_shape
from latentdiff.errors import InputError, LatentDiffError, printable, shown
from latentdiff.generation.guided import UNetCall
from latentdiff.generation.options import options_of
from latentdiff.generation.request import Settings
from latentdiff.generation.run import Drawing, image_steps, prepare_drawing
from latentdiff.generation.text import TextCache
from latentdiff.images import decode_rgba
from latentdiff.pipeline import Pipeline
from latentdiff.scale.formats import Picture
from latentdiff.scale.rows import Row

__all__ = ["Artist", "Style"]

ALONE = (1, 0)  # size of the batch and place in it, in the record of a picture: as if it were drawn alone
MAX_INPUT = 256 * 2**20  # bytes of a remote picture


@dataclass(frozen=True)
class Style:
    """How pictures are drawn and written.

    Attributes:
        batch: images that are sampled at once.
        threads: of the CPU, in each worker.
        metadata, mark: see `GeneratedImage.save`.
    """

    batch: int = 4
    threads: int = 1
    metadata: bool = True
    mark: bool = True


class Artist:
    """A model that draws rows.

    Args:
        pipe: the model.
        style: how.
        begins: called with the rows of each batch before it is drawn.
    """

    def __init__(self, pipe: Pipeline, style: Style, begins: Callable[[Sequence[Row]], None] | None = None) -> None:
        self.pipe, self.style, self.batch = pipe, style, style.batch
        self.begins = begins or (lambda rows: None)
        self._styled: tuple[Hashable, Pipeline] = ((), pipe)  # with the LoRAs that were asked for last

    @torch.no_grad()
    def draw(self, rows: Sequence[Row]) -> Iterator[Picture | str]:
        """Yield for each row, in order, its picture, or why it could not be drawn."""
        texts = TextCache()
        for first in range(0, len(rows), self.style.batch):
            chunk = rows[first : first + self.style.batch]
            self.begins(chunk)
            prepared = [self._prepared(row, texts) for row in chunk]
            latents = iter(self._sampled([one for one in prepared if isinstance(one, Drawing)]))
            for one in prepared:
                yield one if isinstance(one, str) else self._finished(one, next(latents))

    def _prepared(self, row: Row, texts: TextCache) -> Drawing | str:
        try:
            job = self._with_loras(row).make_job(
                _prompt(row, self.pipe), image=_opened(row.image), mask=_opened(row.mask), **_settings(row)
            )
            return prepare_drawing(replace(job, texts=texts), 1)
        except Exception as error:
            return reason(error)

    def _with_loras(self, row: Row) -> Pipeline:
        if not row.loras:
            return self.pipe
        if self._styled[0] != row.loras:
            weights: dict[str, Any] = {file: given if len(given) > 1 else given[0] for file, given in row.loras}
            if len(weights) < len(row.loras):
                raise InputError("lora must name each file once, got one twice; leave one of them out")
            self._styled = row.loras, self.pipe.with_loras(weights)
        return self._styled[1]

    def _sampled(self, drawings: Sequence[Drawing]) -> list[Tensor | str]:
        """Return the latents (1, C, h, w) of each drawing, or why there are none.

        What fails together is tried again in halves, so that only those fail that must; where memory was short, the
        batches stay that small.
        """
        if len(drawings) > self.batch:
            parts = [drawings[first : first + self.batch] for first in range(0, len(drawings), self.batch)]
            return [latents for part in parts for latents in self._sampled(part)]
        if not drawings:
            return []
        try:
            return [*sample_together(drawings)]
        except Exception as error:
            if len(drawings) == 1:
                return [reason(error)]
            if _lacks_memory(error):
                self.batch = max(1, len(drawings) // 2)
        release_freed_memory()
        half = len(drawings) // 2
        return [*self._sampled(drawings[:half]), *self._sampled(drawings[half:])]

    def _finished(self, drawing: Drawing, latents: Tensor | str) -> Picture | str:
        if isinstance(latents, str):
            return latents
        try:
            image = drawing.finish(latents, 0, ALONE, "pil")
            data = image.encoded("PNG", metadata=self.style.metadata, mark=self.style.mark)
        except Exception as error:
            return reason(error)
        return Picture(data, image.record)


def sample_together(drawings: Sequence[Drawing]) -> list[Tensor]:
    """Return the latents (1, C, h, w) of each drawing's image, the calls of the U-Net joined."""
    steps = [image_steps(one.job, one.stages, [0]) for one in drawings]
    sampled, due = dict[int, Tensor](), dict[int, UNetCall]()

    def go_on(number: int, output: Tensor | None) -> None:
        try:
            item = next(steps[number]) if output is None else steps[number].send(output)
            while isinstance(item, Step):
                item = next(steps[number])
            due[number] = item
        except StopIteration as done:
            sampled[number] = done.value

    for number in range(len(steps)):
        go_on(number, None)
    joined = dict[Hashable, JoinedUNet]()  # of the step before
    while due:
        groups = dict[Hashable, list[int]]()
        for number, call in due.items():
            shape, dtype = tuple(call.inputs.shape[1:]), call.inputs.dtype
            kind = (id(call.network.unet), shape, dtype, text_shape(call.network))
            groups.setdefault(kind, []).append(number)
        calls, due = due, {}
        before, joined = joined, {}
        for group in groups.values():
            key = tuple(id(calls[number].network) for number in group)
            network = joined[key] = before.get(key) or JoinedUNet([calls[number].network for number in group])
            with drawings[group[0]].job.execution.onload(drawings[group[0]].job.components.unet):
                outputs = network([calls[n].inputs for n in group], [calls[n].rows for n in group])
            for number, output in zip(group, outputs):
                go_on(number, output)
    return [sampled[number] for number in range(len(drawings))]


def reason(error: Exception) -> str:
    """Return why a row could not be drawn, as its manifest tells it."""
    if isinstance(error, LatentDiffError):
        return str(error)
    if _lacks_memory(error):
        return "the picture needs more memory than the device has left; ask for a smaller one"
    return printable(f"{type(error).__name__}: {error}")


def _lacks_memory(error: Exception) -> bool:
    return isinstance(error, (OutOfDeviceMemoryError, MemoryError)) or "not enough memory" in str(error)  # of the CPU


def _prompt(row: Row, pipe: Pipeline) -> Any:
    if row.prompt == "" and row.image is None and pipe.components.reads_text:
        raise InputError('prompt must say what to draw, got none; try "a red fox"')
    if not isinstance(row.prompt, str):
        raise InputError(f"prompt must be text, got {type(row.prompt).__name__}; put it into quotation marks")
    return row.prompt


def _settings(row: Row) -> dict[str, Any]:
    settings = dict(row.settings)
    if "num_images" in settings:
        options_of(Settings)["num_images"].check("num_images", settings.pop("num_images"))
    return settings


def _opened(given: Any) -> Any:
    """Return a picture behind a URL; anything else is opened by the pipeline."""
    if not isinstance(given, str) or "://" not in given:
        return given
    import fsspec

    name = shown(given.partition("?")[0], 200)
    try:
        with fsspec.open(given, "rb") as file:
            data = file.read(MAX_INPUT)
    except Exception as error:  # each kind of file system fails in ways of its own
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{name} cannot be read ({text}); check the address") from error
    return decode_rgba(data, name)

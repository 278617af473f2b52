"""The places of a loop: the images that are being drawn, each at a step of its own, in common calls of the U-Net."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.devices import OutOfDeviceMemoryError, Pace, release_freed_memory
from latentdiff.diffusion import Step
from latentdiff.engine.joined_calls import JoinedUNet, text_shape
from latentdiff.errors import LatentDiffError, OutOfMemoryError
from latentdiff.generation.guided import UNetCall
from latentdiff.generation.run import Drawing, ImageSteps, image_steps
from latentdiff.models.unet import Predict, UNet2DConditionModel
from latentdiff.serve.jobs import Event, ServedJob
from latentdiff.serve.preview import Preview
from latentdiff.serve.waiting import Turn

__all__ = ["Place", "Places", "explained"]


class _Kind(NamedTuple):
    """What calls of the U-Net must share to be made as one."""

    predict: Predict
    unet: UNet2DConditionModel
    map_shape: tuple[int, ...]
    dtype: torch.dtype
    text_shape: tuple[int, ...]


@dataclass(eq=False)
class Place:
    """An image that is being drawn.

    Attributes:
        job, index: whose, and its number there.
        drawing: the prepared request.
        steps: its sampling; waits for the output of `due`.
        due: the call of the U-Net that comes next.
        done: steps that are done.
        need: bytes that are set aside for it.
    """

    job: ServedJob
    index: int
    drawing: Drawing
    steps: ImageSteps = field(repr=False)
    due: UNetCall | None = field(default=None, repr=False)
    done: int = 0
    need: int = 0


_Due = tuple[Place, UNetCall]


class Places:
    """The images that are being drawn; only the thread of the loop uses it.

    Args:
        preview: see `preview.Preview`.
        finished: called with the place and the latents (1, C, h, w) of each image that is sampled.
    """

    def __init__(self, preview: Preview, finished: Callable[[Place, Tensor], None]) -> None:
        self.running = list[Place]()
        self._preview, self._finished = preview, finished
        self._joined = dict[Hashable, JoinedUNet]()  # of the step before
        self._pace = Pace()
        self._most = dict[Hashable, int]()  # images in a call, where there was no memory for more

    def admit(self, turn: Turn, drawing: Drawing, need: int) -> None:
        """Give an image a place; it takes part in the next step."""
        place = Place(turn.job, turn.index, drawing, image_steps(drawing.job, drawing.stages, [turn.index]), need=need)
        self.running.append(place)
        turn.job.emit(Event("admitted", turn.index, steps=drawing.steps))
        self._go_on(place, None)

    def leave(self) -> None:
        """Let go of the images whose jobs have ended."""
        self.running = [place for place in self.running if not place.job.ended]
        self._forget()

    def step(self) -> None:
        """Make the calls of the U-Net that are due, as few as can be."""
        alike = dict[_Kind, list[_Due]]()
        for place in self.running:
            if place.due is not None:
                alike.setdefault(_kind(place.due), []).append((place, place.due))
        groups = dict[Hashable, tuple[_Kind, list[_Due]]]()
        for kind, calls in alike.items():
            most = self._most.get(kind[1:], len(calls))
            for first in range(0, len(calls), most):
                groups[kind, first] = kind, calls[first : first + most]
        self._joined = {key: joined for key, joined in self._joined.items() if key in groups}
        for key, (kind, group) in groups.items():
            self._call(key, kind, group)
        self._forget()
        for device in {call.inputs.device for calls in alike.values() for _, call in calls}:
            self._pace.keep(device)

    def _forget(self) -> None:
        if not self.running:
            self._joined.clear()

    def _call(self, key: Hashable, kind: _Kind, group: Sequence[_Due]) -> None:
        """Call the U-Net for a group; where that fails, for each half of it, so that only those fail that must."""
        try:
            outputs = self._network(key, [call for _, call in group])(
                [call.inputs for _, call in group], [call.rows for _, call in group]
            )
        except Exception as error:
            if len(group) == 1:
                self._fail(group[0][0], error)
                return
            outputs = None  # what the failed call held is let go of before the next one
            if _lacks_memory(error):
                self._most[kind[1:]] = len(group) // 2
        if outputs is None:
            self._joined.pop(key, None)
            release_freed_memory()
            half = len(group) // 2
            for name, part in (("first", group[:half]), ("second", group[half:])):
                self._call((key, name), kind, part)
            return
        for (place, _), output in zip(group, outputs):
            self._go_on(place, output)

    def _network(self, key: Hashable, calls: Sequence[UNetCall]) -> JoinedUNet:
        """Return the networks of some calls as one, that of the step before where they are the same."""
        networks = [call.network for call in calls]
        known = self._joined.get(key)
        if known is None or [id(one) for one in known.networks] != [id(one) for one in networks]:
            known = self._joined[key] = JoinedUNet(networks)
        return known

    def _go_on(self, place: Place, output: Tensor | None) -> None:
        """Let an image go on with the output of its call, up to the next one or to its end."""
        try:
            item = next(place.steps) if output is None else place.steps.send(output)
            while isinstance(item, Step):
                self._tell(place, item)
                item = next(place.steps)
            place.due = item
        except StopIteration as sampled:
            self.running.remove(place)
            self._finished(place, sampled.value)
        except Exception as error:
            self._fail(place, error)

    def _tell(self, place: Place, step: Step) -> None:
        place.done += 1
        job, every, steps = place.job, place.job.preview_every, place.drawing.steps
        job.emit(Event("step", place.index, place.done, steps))
        if every and place.done % every == 0 and place.done < steps and not job.ended:
            preview = self._preview(place.drawing.job.components, step.denoised)
            job.emit(Event("preview", place.index, place.done, steps, preview=preview))

    def _fail(self, place: Place, error: Exception) -> None:
        self.running = [other for other in self.running if other is not place]
        place.job.fail(explained(error))


def explained(error: Exception) -> Exception:
    """Return an error to fail a job with: one that says what to do, and holds nothing that was computed."""
    if not isinstance(error, LatentDiffError):
        if _lacks_memory(error):
            return OutOfMemoryError("the picture needs more memory than the device has left; ask for a smaller one")
        logging.getLogger(__name__).error("a job failed in a way that was not foreseen", exc_info=error)
    error.__traceback__ = None  # whose frames hold tensors
    return error


def _lacks_memory(error: Exception) -> bool:
    return isinstance(error, (OutOfDeviceMemoryError, MemoryError)) or "not enough memory" in str(error)  # of the CPU


def _kind(call: UNetCall) -> _Kind:
    network = call.network
    return _Kind(network.predict, network.unet, tuple(call.inputs.shape[1:]), call.inputs.dtype, text_shape(network))

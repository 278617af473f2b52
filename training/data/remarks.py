"""Remarks on a data set before training: pictures left out, enlarged or cut off."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from latentdiff.errors import shown

from .sample import Sample
from .source import Source, pictures_in

ENLARGED = 4.0  # times, above which a picture is blurred
LOST = 0.75  # share of a picture that its frame does not show


def remarks(source: Source, samples: Sequence[Sample], windows: bool) -> list[str]:
    """Return lines for people, none where all is as usual.

    Args:
        source: what was opened.
        samples: of it.
        windows: whether a frame shows any part of a picture, and not its middle alone.
    """
    lines = _unlisted(source)
    if source.uncaptioned:
        lines.append(f"{source.place} says of no picture what it shows: all are trained on with an empty caption")
    place, number, most = _beyond(samples, _enlarged, ENLARGED)
    if number:
        name = shown(source.names[place])
        lines.append(
            f"{number} of {len(samples)} pictures are enlarged more than {ENLARGED:g} times, {name} {most:.0f} times: "
            "larger ones, or a smaller data.size, train better"
        )
    place, number, most = _beyond(samples, _lost, LOST)
    if number and not windows:
        name = shown(source.names[place])
        lines.append(
            f"{number} of {len(samples)} pictures lose more than {LOST:.0%} to the crop, {name} {most:.0%}: "
            "data.buckets or data.crop random shows more of them"
        )
    return lines


def _unlisted(source: Source) -> list[str]:
    """Say how many pictures lie beside those that the table of a folder names."""
    if source.table is None:
        return []
    folders = {file.parent for file in source.files}
    beside = {picture for folder in folders for picture in pictures_in(folder)}
    left = sorted(beside - set(source.files))
    if not left:
        return []
    return [
        f"{len(left)} of {len(beside)} pictures are not in {source.table} and left out, first {shown(left[0].name)}"
    ]


def _beyond(samples: Sequence[Sample], measure: Callable[[Sample], float], limit: float) -> tuple[int, int, float]:
    """Return the place of the sample of the greatest measure, how many are beyond a limit, and that measure."""
    found = [(measure(sample), sample.place) for sample in samples]
    most, place = max(found, default=(0.0, 0))
    return place, sum(value > limit for value, _ in found), most


def _enlarged(sample: Sample) -> float:
    return max(side / own for side, own in zip(sample.frame, sample.size))


def _lost(sample: Sample) -> float:
    """Return the share of a picture that is cut off where it is scaled to cover its frame."""
    (width, height), (own_width, own_height) = sample.frame, sample.size
    shape, own = width / height, own_width / own_height
    return 1 - min(shape / own, own / shape)

"""One picture to train on: its place, size and frame."""

from __future__ import annotations

from dataclasses import dataclass

from .buckets import covering_size, crop_corner


@dataclass(frozen=True)
class Sample:
    """What is known of one picture besides its row.

    Attributes:
        place: its number among all rows, those that were skipped included.
        digest: SHA-256 of the encoded picture.
        size: width and height as it would be seen, upright.
        frame: width and height that it is cropped to.
        zoom: how many times larger than needed to cover that it is scaled before.
    """

    place: int
    digest: str
    size: tuple[int, int]
    frame: tuple[int, int]
    zoom: float = 1.0

    @property
    def condition(self) -> tuple[int, ...]:
        """Height and width before scaling, what the crop leaves out above and at the left, height and width after.

        Source: Podell et al. 2023, 2307.01952, section 2.2.
        """
        return self.condition_at(crop_corner(self.size, self.frame))

    def condition_at(self, corner: tuple[int, int]) -> tuple[int, ...]:
        """Return the condition where the crop leaves out so much above and at the left, in scaled pixels."""
        return (*self.size[::-1], *corner, *self.frame[::-1])

    @property
    def leeway(self) -> tuple[int, int]:
        """Height and width of what a crop leaves out of the scaled picture, wherever it is."""
        width, height = self.covering
        return height - self.frame[1], width - self.frame[0]

    @property
    def covering(self) -> tuple[int, int]:
        """Width and height of the picture when it is scaled to cover its frame."""
        zoomed = round(self.frame[0] * self.zoom), round(self.frame[1] * self.zoom)
        return covering_size(self.size, zoomed)

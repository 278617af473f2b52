"""Draw without torch, by a recipe: the pictures that `run` draws with OpenVINO, to the bit.

Loading torch takes longer than drawing a small picture. Here `tokenizers` reads the texts, OpenVINO runs the networks,
and numpy does what is between, with the roundings that torch has: products that it adds to something are not rounded
before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from latentdiff.engine import conversions
from latentdiff.engine.layouts import LaidOut, core
from latentdiff.engine.torch_noise import TorchNoise, fused
from latentdiff.errors import InputError, LatentDiffError
from latentdiff.generation.batches import BATCH_SIZE, make_batches, text_notes
from latentdiff.generation.recipe import FREE, Recipe, read_recipe, words_of
from latentdiff.generation.request import Settings
from latentdiff.generation.result import GeneratedImage, image_record
from latentdiff.images import from_array
from latentdiff.models.tokenizer import Tokenizer, TokenLists
from latentdiff.prompts import parse_weights

__all__ = ["Drawer", "find_drawer"]


class _Text(NamedTuple):
    """A text, encoded: its states (n, L, D), and how many tokens it has."""

    states: np.ndarray
    tokens: int


class Drawer:
    """Draws the images of one request.

    Args:
        recipe: of its settings.
        settings: of the request.

    Raises:
        Damaged, OSError, RuntimeError, LatentDiffError: a conversion, layout or tokenizer is not what it was.
    """

    def __init__(self, recipe: Recipe, settings: Settings) -> None:
        self.recipe, self.settings = recipe, settings
        self._threads: int = recipe.record["threads"]
        self._graphs = {name: LaidOut.of(Path(file), "f32") for name, file in recipe.graphs.items()}
        self._tokenizer = Tokenizer.from_folder(recipe.tokenizer, recipe.window)
        self._texts = dict[str, _Text]()
        self._make_ready()

    def keep(self) -> None:
        """Write the layouts that were made, so that the next process begins with them.

        Raises:
            StorageError: one cannot be written.
        """
        for graph in self._graphs.values():
            graph.keep()

    def images(self, progress: bool = False) -> Iterator[GeneratedImage]:
        """Yield the images in order, each as soon as it is decoded.

        Args:
            progress: show a bar on stderr.

        Raises:
            InputError: an output of a network is not finite.
        """
        notes, batches = tuple(text_notes(self.settings)), make_batches(self.settings.count, self._window_count)
        with _counted(len(self.recipe.scales) * len(batches), progress) as on_row:
            for batch in batches:
                latents = self._sample(batch, on_row)
                for row, index in enumerate(batch):
                    picture = self._decode(latents[row : row + 1])
                    record = image_record(self.settings, self.recipe.record, index, (len(batch), row))
                    text = self._texts[self.settings.prompt(index)]
                    yield GeneratedImage(picture, record, text.tokens, len(text.states), notes)
                    notes = ()

    def _make_ready(self) -> None:
        """Read or make the layouts of the first batch, the largest beside the others, and encode the texts."""
        texts = dict.fromkeys([self.settings.negative_prompt, "", *self.settings.prompts])
        lists = {text: self._tokenizer.lists([self._pieces(text)]) for text in texts}
        windows = max(lists[text].n_chunks for text in (self.settings.negative_prompt, self.settings.prompts[0]))
        rows = _power_of_two(2 * min(BATCH_SIZE, self.settings.count))
        tokens = windows * self._tokenizer.model_max_length
        pairs = [(rows, heads, tokens, width) for heads, width in self.recipe.heads for _ in ("keys", "values")]
        shapes = ((rows, *self.recipe.shape), (rows, self.recipe.shift_channels), *pairs)
        failed = list[BaseException]()

        def lay_out() -> None:
            try:
                self._graphs["unet"].request(shapes, self._threads)
            except BaseException as error:  # for the thread that waits
                failed.append(error)

        core()  # belongs to the thread that takes it first
        beside = Thread(target=lay_out)
        beside.start()
        try:
            self._graphs["decoder"].request(((1, *self.recipe.shape),), self._threads)
            self._texts = {text: self._encoded(lists[text]) for text in texts}
        finally:
            beside.join()
        if failed:
            raise failed[0]

    def _pieces(self, text: str) -> Any:
        return parse_weights(text) if self.settings.prompt_weights else text

    def _encoded(self, lists: TokenLists) -> _Text:
        """Return what a text is encoded as; see `models.encoding.TokenStates`."""
        ids = np.array(lists.input_ids, np.int64).reshape(lists.n_chunks, -1)  # (n, L)
        mask = np.array(lists.attention_mask, np.int64).reshape(ids.shape) if self.recipe.masked else np.ones_like(ids)
        words = words_of(self.recipe.words, ids)  # (n, L, D)
        (states,) = self._graphs["encoder"]([words, mask], self._threads)  # (n, L, D)
        weights = np.array(lists.weights, np.float32).reshape(ids.shape)[..., None]
        return _Text(states if (weights == 1).all() else states * weights, lists.counts[0])

    def _window_count(self, index: int) -> int:
        return max(
            len(self._texts[text].states) for text in (self.settings.prompt(index), self.settings.negative_prompt)
        )

    def _context(self, images: Sequence[int]) -> np.ndarray:
        """Return the text states (2b, n * L, D) of some images, the negative halves first."""
        wanted, settings = self._window_count(images[0]), self.settings

        def filled(text: str) -> np.ndarray:
            states = self._texts[text].states
            windows = [states, *[self._texts[""].states] * (wanted - len(states))]
            return np.concatenate(windows).reshape(-1, states.shape[-1])

        positive = [filled(settings.prompt(index)) for index in images]
        return np.stack([filled(settings.negative_prompt)] * len(images) + positive)

    def _sample(self, images: Sequence[int], on_row: Callable[[], object]) -> np.ndarray:
        """Return the scaled latents (b, C, h, w) of some images; see `diffusion.loop.sampling`."""
        recipe, tables = self.recipe, self.recipe.tables
        noises = [TorchNoise(self.settings.seeds(index)[0]) for index in images]
        context, count = self._context(images), len(images)
        texts, shifts = self._graphs["texts"]([context], self._threads), self._shifts(context)
        scales = recipe.scales
        if np.array_equal(context[:count], context[count:]):  # there is nothing to steer away from
            scales = [1.0] * len(scales)
        x = _drawn(noises, recipe.shape) * np.float32(recipe.init_noise_sigma)
        slots = np.zeros((tables["noise"].shape[1], *x.shape), np.float32)
        slots[0] = x * tables["c_in"][0]
        for row, (scale, matrix) in enumerate(zip(scales, tables["matrices"])):
            output = self._guided(slots[0], shifts[:, row], texts, scale)
            advanced = _column(matrix[:, -1]) * output
            for place, slot in enumerate(slots):
                advanced = fused(_column(matrix[:, place]), slot, advanced)
            if recipe.noisy[row]:
                advanced = fused(_column(tables["noise"][row]), _drawn(noises, recipe.shape), advanced)
            slots = advanced
            on_row()
        x = slots[0] / tables["c_next"][-1]
        if not np.isfinite(x).all():
            raise InputError("the network's output became NaN or infinite; use a lower guidance_scale")
        return x

    def _shifts(self, context: np.ndarray) -> np.ndarray:
        """Return what the U-Net adds in its residual blocks in each row, (2b or 1, R, sum C)."""
        tables = self.recipe.tables
        if "shifts" in tables:
            return tables["shifts"][None]
        time = np.broadcast_to(tables["time"], (len(context), *tables["time"].shape))
        (made,) = self._graphs["shifts"]([time, context], self._threads)
        return made

    def _guided(self, inputs: np.ndarray, shifts: np.ndarray, texts: Sequence[np.ndarray], scale: float) -> np.ndarray:
        """Return the guided output (b, C, h, w) for inputs (b, C, h, w); see `guided.guided_network`."""
        count = len(inputs)
        if scale == 1:
            return self._unet(inputs, shifts[-count:], [one[count:] for one in texts])
        both = self._unet(np.concatenate([inputs, inputs]), shifts, texts)
        unconditional, conditional = both[:count], both[count:]
        return unconditional + np.float32(scale) * (conditional - unconditional)

    def _unet(self, inputs: np.ndarray, shifts: np.ndarray, texts: Sequence[np.ndarray]) -> np.ndarray:
        rows = np.ascontiguousarray(np.broadcast_to(shifts, (len(inputs), shifts.shape[1])))
        return self._graphs["unet"]([inputs, rows, *texts], self._threads)[0]

    def _decode(self, latents: np.ndarray) -> Image.Image:
        """Return the picture of latents (1, C, h, w); see `decode.decode_latents`."""
        (images,) = self._graphs["decoder"]([latents / np.float32(self.recipe.scaling_factor)], self._threads)
        if not np.isfinite(images).all():
            raise InputError("the autoencoder overflowed even in float32; use a lower guidance_scale or another model")
        unit = np.clip(images[0] / np.float32(2) + np.float32(0.5), 0, 1)
        return from_array(unit.transpose(1, 2, 0))


def find_drawer(place: Path, prompts: Sequence[str], given: Mapping[str, Any]) -> Drawer | None:
    """Return what draws a request without torch; None where there is no recipe of it that can be used.

    Args:
        place: of the recipe; see `recipe.recipe_place`.
        prompts: of the request.
        given: the generation options that were asked for.

    Raises:
        InputError: a prompt or an option cannot be used.
    """
    recipe = read_recipe(place)
    if recipe is None:
        return None
    own = {name: given[name] for name in FREE if name in given}
    settings = Settings(prompts=tuple(prompts), **recipe.settings, **own, tried=True)
    try:
        return Drawer(recipe, settings)
    except (conversions.Damaged, LatentDiffError, OSError, RuntimeError, ValueError):
        return None


@contextmanager
def _counted(total: int, progress: bool) -> Iterator[Callable[[], object]]:
    """Yield what is called after each row; it moves the bar, if there is one."""
    if not progress:
        yield lambda: None
        return
    from tqdm import tqdm  # which takes long to load

    with tqdm(total=total, unit="step", leave=False) as bar:
        yield bar.update


def _drawn(noises: Sequence[TorchNoise], shape: Sequence[int]) -> np.ndarray:
    return np.stack([noise.draw(shape) for noise in noises])


def _column(numbers: np.ndarray) -> np.ndarray:
    """Return numbers (S,), one for each slot, as (S, 1, 1, 1, 1)."""
    return numbers.reshape(-1, 1, 1, 1, 1)


def _power_of_two(rows: int) -> int:
    """Return how many rows of a batch are run first; see `LaidOut`."""
    return 1 << (rows.bit_length() - 1)

"""One evaluation: what is measured, and what metrics may look at, each computed when it is first asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from latentdiff.checkpoints.lpips import load_lpips
from latentdiff.diffusion.tuned import TUNED
from latentdiff.errors import InputError
from latentdiff.evaluate.features import LATENTS, FeatureNetwork, features_of, find_features
from latentdiff.evaluate.figure import Figure, Protocol
from latentdiff.evaluate.given import common_folder, digest_of_pictures
from latentdiff.evaluate.intervals import Estimate, Floats
from latentdiff.evaluate.judge import Judge, load_judge
from latentdiff.evaluate.latents import latent_features, reconstruct
from latentdiff.evaluate.pictures import Drawing, Item, generate, load_pictures
from latentdiff.evaluate.processes import Processes
from latentdiff.evaluate.tasks import own_task, spoilt
from latentdiff.generation.request import Settings
from latentdiff.generation.result import recorded_name
from latentdiff.models.lpips import Lpips
from latentdiff.pipeline import Pipeline

__all__ = ["Evaluation", "Metric", "Reference", "Request"]

ALWAYS_TOLD = ("sampler", "num_inference_steps", "guidance_scale")  # settings in every protocol
SMALL = 128  # side in pixels of pictures of which so many are drawn together, and how many of larger ones
TOGETHER, TOGETHER_OF_LARGE = 16, 4
SET = 1000  # pictures of metrics of whole sets, unless a request says otherwise


@dataclass(frozen=True)
class Reference:
    """Real pictures with their captions.

    Attributes:
        name: of the data, for protocols: what its folder is called.
        split: which part of it.
        captions: one of each picture.
        rows: metadata of each.
        files: SHA-256 of each encoded picture.
        load: numbers -> images (b, 3, H, W) in [-1, 1].
    """

    name: str
    split: str
    captions: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    files: Sequence[str]
    load: Callable[[Sequence[int]], Tensor]

    def __len__(self) -> int:
        return len(self.captions)

    def sample(self, count: int) -> list[int]:
        """Return the numbers of so many pictures, or of all where there are fewer: at random, always the same."""
        return np.random.default_rng(0).permutation(len(self))[:count].tolist()

    @cached_property
    def digest(self) -> str:
        """Of pictures and captions, in their order: what tells two sets of one name apart."""
        return hashlib.sha256("\n".join([*self.files, *self.captions]).encode("utf-8", "surrogatepass")).hexdigest()[:8]


def drawn_size(pipe: Pipeline, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Return height and width, in pixels, of what a model draws with settings."""
    height, width = pipe.native_size
    return settings.get("height") or height, settings.get("width") or width


@dataclass(frozen=True)
class Request:
    """What is to be measured, and how.

    Attributes:
        n: pictures of each metric, fewer where there are fewer; None for what each metric takes by itself.
        seed: picture i is drawn with seed + i.
        settings: of the calls: num_inference_steps, guidance_scale, sampler, ...; the rest are the model's defaults.
        features: name of the feature network of distances, see `features.find_features`; or "latents", those of the
            model's own autoencoder.
        judge: folder of the image-text model; None for that of the package.
        lpips_weights: file that `python -m latentdiff.training.losses.lpips` made; None where lpips is not measured.
        batch_size: pictures drawn together; None for 16 of up to 128 x 128 pixels, 4 of larger ones.
        best_of: of so many pictures of each text the one is measured that fits it best by the image-text model.
        out: folder of the report and of the pictures.
        progress: show bars on stderr.
    """

    out: Path
    n: int | None = None
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    features: str = "image-text"
    judge: Path | None = None
    lpips_weights: Path | None = None
    batch_size: int | None = None
    best_of: int = 1
    progress: bool = False


class Evaluation:
    """What metrics look at.

    Args:
        request: what is to be measured.
        pipe: the model; None where a folder of pictures is measured.
        references: real pictures by split; "test" is what models are compared with, "train" what they were trained on.
        pictures: drawn by something else, each with its prompt; None to draw them with the model.
        processes: that share the drawing; None to draw alone.

    Raises:
        InputError: more pictures are asked for than are given.
    """

    def __init__(
        self,
        request: Request,
        pipe: Pipeline | None,
        references: Mapping[str, Reference],
        pictures: Sequence[tuple[Path, Item]] | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.request, self.pipe, self.references, self.given = request, pipe, references, pictures
        self.processes = processes
        if pictures is not None:
            self._require_n(len(pictures), "are given")
        self._features: dict[tuple[str, str], Floats] = {}

    @property
    def model(self) -> Pipeline:
        """The model.

        Raises:
            InputError: a folder of pictures is measured.
        """
        if self.pipe is None:
            raise InputError("this metric is of a model, got a folder of pictures; leave it out")
        return self.pipe

    def count(self, usual: int) -> int:
        """Return how many pictures a metric takes that takes so many by itself."""
        return usual if self.request.n is None else self.request.n

    def reference(self, split: str) -> Reference:
        """Return the real pictures of a split.

        Raises:
            InputError: there are none.
        """
        if split not in self.references:
            raise InputError(f"this metric needs real pictures of the split {split}; pass --data with such")
        return self.references[split]

    def sample(self, usual: int) -> list[int]:
        """Return the numbers of the test pictures that a metric takes that takes so many by itself.

        Raises:
            InputError: more are asked for than there are.
        """
        reference = self.reference("test")
        self._require_n(len(reference), f"{reference.name} has of the split {reference.split}")
        return reference.sample(self.count(usual))

    def _require_n(self, there: int, where: str) -> None:
        if self.request.n is not None and self.request.n > there:
            raise InputError(f"--n must be at most the {there} pictures that {where}, got {self.request.n}; lower it")

    @cached_property
    def network(self) -> FeatureNetwork:
        """The feature network of distances."""
        device, choice = "cpu" if self.pipe is None else self.pipe.device, self.request.features
        if choice == LATENTS:
            return latent_features(self.model.components)
        own_judge = choice == "image-text" and self.request.judge is not None
        return find_features(f"{choice}:{self.request.judge}" if own_judge else choice, device)

    @cached_property
    def judge(self) -> Judge:
        """The image-text model."""
        return load_judge(self.request.judge, "cpu" if self.pipe is None else self.pipe.device)

    @cached_property
    def perceptual(self) -> Lpips:
        """The network of LPIPS.

        Raises:
            InputError: no file of its weights is named.
            ModelLoadError: that file was refused.
        """
        file = self.request.lpips_weights
        if file is None:
            raise InputError(
                "lpips needs its weights; make them with `python -m latentdiff.training.losses.lpips "
                "lpips.safetensors` and pass --lpips-weights lpips.safetensors"
            )
        return load_lpips(file, self.model.device)

    @cached_property
    def home(self) -> Path:
        """The folder from which figures name their pictures."""
        return self.request.out if self.given is None else common_folder([path for path, _ in self.given])

    @cached_property
    def data(self) -> dict[str, str]:
        """Which real pictures are measured by, in every report and protocol; empty without any."""
        test = self.references.get("test")
        return {} if test is None else {"data": test.name, "data_hash": test.digest, "split": test.split}

    @cached_property
    def subject(self) -> dict[str, Any]:
        """What is measured and how: all that pictures and figures depend on, JSON-ready."""
        request = self.request
        if self.pipe is None:
            name = self.home.resolve().name
            subject: dict[str, Any] = {"pictures": name, "pictures_hash": digest_of_pictures(self.given or ())}
        else:
            dtype = str(self.pipe.dtype).removeprefix("torch.")
            machine = {"device": self.pipe.device.type, "dtype": dtype, "batch_size": self.batch_size}
            machine |= self.pipe.engine.record()
            subject = {"model": recorded_name(self.pipe.components.name), **self.maker, **machine}
        return {**subject, **self.chosen_by, **self.data, "n": request.n, "seed": request.seed}

    @cached_property
    def maker(self) -> dict[str, Any]:
        """What a drawn picture depends on besides prompt and seed: model and settings."""
        components = self.model.components
        loras = [{"hash": one.lora.hash, "weight": [one.unet, one.text]} for one in components.loras]
        tuned: dict[str, Any] = {}
        if self.drawn_with["sampler"] == TUNED:
            table = components.tuned_table(self.drawn_with["num_inference_steps"])
            tuned["tuned_sampler"] = table.digest
        return {"model_hash": components.model_hash, "loras": loras, **tuned, **self.drawn_with}

    @cached_property
    def drawn_with(self) -> dict[str, Any]:
        """The settings that pictures are drawn with, defaults of the model included."""
        whole = Settings(prompts=("",), **{**self.model.components.defaults, **self.request.settings})
        return {name: getattr(whole, name) for name in dict.fromkeys([*ALWAYS_TOLD, *sorted(self.request.settings)])}

    @cached_property
    def chosen_by(self) -> dict[str, Any]:
        """How pictures are chosen among those drawn; empty where each is measured."""
        return {"best_of": self.request.best_of, "chosen_by": self.judge.digest} if self.request.best_of > 1 else {}

    def draw_best(self, name: str, items: Sequence[Item]) -> list[tuple[Path, Item]]:
        """Return a picture of each item, as `draw` makes it: the best of `best_of` with seeds in a row."""
        among, first = self.request.best_of, self.request.seed
        if among == 1:
            return list(zip(self.draw(name, items), items))
        candidates = [
            replace(item, seed=first + place * among + offset)
            for place, item in enumerate(items)
            for offset in range(among)
        ]
        drawn = list(zip(self.draw(name, candidates), candidates))
        return [self._best(drawn[start : start + among]) for start in range(0, len(drawn), among)]

    def _best(self, drawn: Sequence[tuple[Path, Item]]) -> tuple[Path, Item]:
        fits = self.judge.fits(load_pictures([path for path, _ in drawn]), [item.prompt for _, item in drawn])
        return drawn[int(fits.argmax())]

    def draw(self, name: str, items: Sequence[Item]) -> list[Path]:
        """Return the pictures of items, those that are there already and the rest drawn now.

        Args:
            name: of the set, whose folder in `out` it is.

        Raises:
            InputError: the model draws from more than the items have, or values that are not finite.
        """
        needy = own_task(self.model.components)
        if needy is not None and not all(item.inputs for item in items):
            raise InputError(
                f"{name} asks for pictures drawn from texts alone, got a model made to {needy} pictures; leave it out"
            )
        settings = dict(self.request.settings)
        if needy == "upscale":  # what is drawn has the size of the picture that was made small
            settings = {key: value for key, value in settings.items() if key not in ("height", "width")}
        folder = self.request.out / "pictures" / name
        drawing = Drawing(items, folder, self.maker, settings, self.batch_size)
        if self.processes is None:
            return generate(self.model, drawing, progress=self.request.progress)
        return self.processes.draw(self.model, drawing, self.request.progress)

    @cached_property
    def batch_size(self) -> int:
        """How many pictures are drawn together."""
        height, width = drawn_size(self.model, self.request.settings)
        return self.request.batch_size or (TOGETHER if height * width <= SMALL**2 else TOGETHER_OF_LARGE)

    @cached_property
    def caption_items(self) -> list[Item]:
        """A picture for the caption of each real test picture, made of what is left of that if the model needs it."""
        task = own_task(self.model.components)
        if task is not None:
            return self.spoilt_items(task, self.chosen)
        return [Item(caption, self.request.seed + number) for number, caption in enumerate(self.captions)]

    def spoilt_items(self, task: str, numbers: Sequence[int]) -> list[Item]:
        """Return pictures to be made of what is left of some real test pictures, see `tasks.spoilt`."""
        reference, first = self.reference("test"), self.request.seed
        factor = self.model.components.autoencoder.config.downsample_factor
        return [
            Item(reference.captions[number], first + place, inputs=spoilt(task, image, factor, (first, place)))
            for place, (number, image) in enumerate(zip(numbers, reference.load(numbers)))
        ]

    @cached_property
    def captions(self) -> list[str]:
        """Those of the real test pictures, see `real`."""
        return [self.reference("test").captions[number] for number in self.chosen]

    @cached_property
    def chosen(self) -> list[int]:
        """The numbers of the real test pictures among all of their split."""
        return self.sample(SET)

    @cached_property
    def drawn(self) -> list[tuple[Path, Item]]:
        """The generated pictures with what they are of: the test set's captions, or what was given."""
        if self.given is not None:
            return list(self.given[: self.count(SET)])
        return self.draw_best("captions", self.caption_items)

    @cached_property
    def generated(self) -> Tensor:
        """The generated pictures (N, 3, H, W)."""
        return load_pictures([path for path, _ in self.drawn])

    def by_item(self, drawn: Sequence[tuple[Path, Item]], values: Sequence[float]) -> dict[str, Any]:
        """Return the fields of a figure that hold a value for each picture: `items` and `pictures`."""
        names = [item.name for _, item in drawn]
        places = [path.relative_to(self.home).as_posix() for path, _ in drawn]
        return {"items": dict(zip(names, map(float, values))), "pictures": dict(zip(names, places))}

    @cached_property
    def real(self) -> Tensor:
        """The real test pictures (N, 3, H, W), as many as are generated or as there are."""
        return self.reference("test").load(self.chosen)

    @cached_property
    def returned(self) -> Tensor:
        """What the model's autoencoder makes of the real test pictures, (N, 3, H, W), in 8 bits."""
        return reconstruct(self.model.components, self.real)

    def features(self, name: str, images: Tensor) -> Floats:
        """Return the features (N, D) of a set of images, computed once for each name."""
        key = (name, self.network.name)
        if key not in self._features:
            self._features[key] = features_of(images, self.network)
        return self._features[key]

    def protocol(self, **more: str | float | None) -> Protocol:
        """Return the data that values depend on, and `more`."""
        return {**self.data, **more}

    def figure(
        self,
        name: str,
        estimate: Estimate,
        better: Literal["lower", "higher"] | None,
        protocol: Mapping[str, Any],
        drawn: bool = True,
        **more: Any,
    ) -> Figure:
        """Return a figure of this evaluation; n is part of every protocol.

        Args:
            drawn: whether it is of pictures that the model drew, so that it depends on seed and settings.
        """
        asked = self.request
        settings = {"seed": asked.seed, **self.drawn_with, **self.chosen_by} if drawn and self.pipe is not None else {}
        return Figure(name, estimate, better, self.protocol(**settings, n=estimate.n, **protocol), **more)


Metric = Callable[[Evaluation], list[Figure]]
"""Measures what an evaluation is of."""

"""Evaluations of a run: metrics of `latentdiff.evaluate` of the averaged weights, the best step, and patience."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from latentdiff.checkpoints import Components
from latentdiff.checkpoints.hashes import network_digest
from latentdiff.checkpoints.lpips import load_lpips
from latentdiff.devices import restored_random_state
from latentdiff.errors import InputError, ModelValueError
from latentdiff.evaluate.evaluation import Evaluation, Reference, Request
from latentdiff.evaluate.features import LATENTS, FeatureNetwork, check_features, find_features
from latentdiff.evaluate.judge import Judge, load_judge
from latentdiff.evaluate.latents import returned_by
from latentdiff.evaluate.page import PAGE
from latentdiff.evaluate.reconstruction import skimage_metrics
from latentdiff.evaluate.report import REQUEST
from latentdiff.evaluate.run import JUDGE, METRICS, NETWORK, PERCEPTUAL, evaluate, measure
from latentdiff.files import is_file
from latentdiff.generation.request import Settings
from latentdiff.images import to_tensor
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.lpips import Lpips
from latentdiff.pipeline import Pipeline

from ..config import HELD_OUT, AutoencoderTraining, DataConfig, DiffusionTraining
from ..data.augment import rgb
from ..data.dataset import CaptionedImages, composite, open_held_out
from ..loop.best import BEST, PICTURES, Best, is_record, keep
from ..loop.state import RunState

REPORT = "report"  # folder in that of a run
# Metrics of distances, which are also taken between the halves of the real pictures, and the pictures that needs.
OF_SETS, LEAST = ("fid", "kid", "mmd", "precision_recall"), 8

Config = AutoencoderTraining | DiffusionTraining


@dataclass(frozen=True)
class Tools:
    """Networks that metrics ask; None where none of the run's metrics does."""

    network: FeatureNetwork | None
    judge: Judge | None
    perceptual: Lpips | None

    def given_to(self, evaluation: Evaluation) -> Evaluation:
        """Return an evaluation that uses these networks instead of loading its own."""
        for name, tool in vars(self).items():
            if tool is not None:
                setattr(evaluation, name, tool)
        return evaluation


def load_tools(config: Config, device: torch.device) -> Tools:
    """Load what the metrics of a run ask, before its data are opened.

    Raises:
        InputError: there are no such features, or this copy of the package has no image-text model.
        MissingDependencyError: a metric needs a package that is not installed.
        ModelLoadError: a network was refused.
    """
    asked, weights = config.evaluate, config.loss.lpips_weights if isinstance(config, AutoencoderTraining) else None
    check_features(asked.features)
    needs = {need for name in asked.metrics for need in METRICS[name].needs}
    own_judge = asked.features == "image-text" and asked.judge is not None
    if skimage_metrics in needs:
        skimage_metrics(Evaluation(Request(Path(config.run.out)), None, {}))
    return Tools(
        find_features(f"image-text:{asked.judge}" if own_judge else asked.features, device)
        if NETWORK in needs and asked.features != LATENTS
        else None,
        load_judge(asked.judge, device) if JUDGE in needs else None,
        load_lpips(Path(weights), device) if PERCEPTUAL in needs and weights is not None else None,
    )


def open_reference(config: Config, cache: Path) -> Reference | None:
    """Return held-out pictures for the metrics of a run; None where there are none, or nothing that needs them.

    Raises:
        InputError: something needs held-out pictures and there are none, or they cannot be used.
    """
    asked = config.evaluate
    if not asked.metrics and asked.keep_best is None:
        return None
    splits = ("validation", "test") if isinstance(config, AutoencoderTraining) else ("validation",)
    for split in splits:
        data = open_held_out(config.data, cache, asked.n, split)
        if data is not None:
            short = [name for name in asked.metrics if name in OF_SETS and min(len(data), asked.n) < LEAST]
            if short:
                raise InputError(
                    f"evaluate: {short[0]} needs {LEAST} held-out pictures or more, got {min(len(data), asked.n)}; "
                    "raise data.held_out or evaluate.n, or leave it out"
                )
            return reference_of(config.data, split, data)
    needing = [name for name in asked.metrics if name != "compose"]
    needing += [name for name in HELD_OUT if name == asked.keep_best]
    if needing:
        raise InputError(
            f"evaluate: {needing[0]} needs held-out pictures, and {config.data.folder} has none; "
            "set data.held_out to a share such as 0.05, or add a validation split"
        )
    return None


def reference_of(config: DataConfig, split: str, data: CaptionedImages) -> Reference:
    """Return real pictures, which are held in memory, as metrics take them."""
    images = to_tensor(composite(data.images, rgb(config.background)))  # (N, 3, H, W)
    captions, files = [row["captions"][0] for row in data.rows], [sample.digest for sample in data.samples]
    name = Path(config.folder).resolve().name
    return Reference(name, split, captions, data.rows, files, lambda numbers: images[list(numbers)])


class Evaluations:
    """Evaluations of a run, none of which may end it but by patience.

    Args:
        tools: see `load_tools`.
        reference: see `open_reference`.
        state: of the run, whose `best` they change.

    Attributes:
        failed: how many could not be made.
    """

    def __init__(self, config: Config, tools: Tools, reference: Reference | None, state: RunState) -> None:
        self.config, self.tools, self.reference, self.state = config, tools, reference, state
        self.folder, self.failed = Path(config.run.out), 0

    @property
    def over(self) -> bool:
        """Whether there was no better value for so long that the run ends."""
        patience = self.config.evaluate.patience
        return 0 < patience <= self.state.best.waited

    def due(self, step: int) -> bool:
        """Say whether there is an evaluation after so many steps."""
        every = self.config.evaluate.every
        return every > 0 and (step % every == 0 or step == self.config.run.steps)

    def take(
        self,
        step: int,
        held_out: Callable[[], Mapping[str, float]],
        evaluation: Callable[[Request], Evaluation],
        save: Callable[[Path], object],
    ) -> dict[str, float]:
        """Return what the log says of the model after so many steps, and keep it where it is the best.

        Args:
            held_out: measures what the stage measures by itself.
            evaluation: of the model, as a request asks.
            save: writes the model into a folder.

        Raises:
            StorageError: the best model cannot be written.
        """
        try:
            with restored_random_state():
                values, better = self._measured(held_out, evaluation)
        except Exception as error:  # whatever it is, it must not cost the weights that are being trained
            return self._failure(error)
        name = self.config.evaluate.keep_best
        if name is not None:
            value = values.get(name, values.get(f"evaluate/{name}"))
            if value is None:
                return {**values, **self._failure(InputError(f"{name} was not measured"))}
            try:
                self._judge(Best(name, step, value), better[name], save)
            except ModelValueError as error:  # not finite in the precision of the file
                return {**values, **self._failure(error)}
        return {**values, "failed_evaluations": self.failed}

    def conclude(self, last: Path, evaluation: Callable[[Request, Path], Evaluation]) -> None:
        """Say which step was the best, and write the report of its model, of the last one where none was kept.

        Args:
            last: folder of the model that the run ends with.
            evaluation: of the model in a folder, as a request asks.
        """
        best, chosen = self.state.best, last
        if best.step:
            place = self.folder / BEST
            kept = is_record(place, best)
            chosen = place if kept else last
            where = f"saved {place}" if kept else "its model is gone with a damaged checkpoint"
            print(f"best {best.name} {best.value:.6g} at step {best.step}; {where}")
        if not self.config.evaluate.metrics:
            return
        try:
            with restored_random_state():
                self._report(evaluation(self.request(self.folder / REPORT), chosen))
        except Exception as error:  # the model is there, and can be measured again
            self._failure(error)

    def request(self, out: Path) -> Request:
        """Return what is measured, with pictures in a folder."""
        asked, config = self.config.evaluate, self.config
        there = asked.n if self.reference is None else min(asked.n, len(self.reference))
        judge = None if asked.judge is None else Path(asked.judge)
        found = Request(out, n=there, features=asked.features, judge=judge)
        if isinstance(config, DiffusionTraining) and config.consistency is None:
            found = replace(found, settings={"guidance_scale": config.samples.guidance_scale})
        return found

    def of_model(self, components: Components, request: Request) -> Evaluation:
        """Return the evaluation of a model that draws."""
        settings, side = dict(request.settings), self.config.data.size
        steps = components.schedule.num_train_timesteps
        if steps < components.defaults.get("num_inference_steps", Settings.num_inference_steps):
            settings["num_inference_steps"] = steps
        if components.native_size != (side, side):
            settings |= {"height": side, "width": side}
        return self._evaluation(replace(request, settings=settings), Pipeline(components))

    def of_autoencoder(self, model: AutoencoderKL, request: Request) -> Evaluation:
        """Return the evaluation of an autoencoder alone."""
        found, reference = self._evaluation(request, None), self.reference
        found.returned = returned_by(model, found.real)
        data = {} if reference is None else {"data": reference.name, "data_hash": reference.digest}
        found.subject = {"model": "autoencoder", "model_hash": network_digest(model), **data, "n": request.n}
        return found

    def _evaluation(self, request: Request, pipe: Pipeline | None) -> Evaluation:
        references = {} if self.reference is None else {"test": self.reference}
        return self.tools.given_to(Evaluation(request, pipe, references))

    def _measured(
        self, held_out: Callable[[], Mapping[str, float]], evaluation: Callable[[Request], Evaluation]
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Return values by their name in the log, and which are better by their own."""
        values, better = dict(held_out()), dict[str, str](HELD_OUT)
        if metrics := self.config.evaluate.metrics:
            # Pictures are named by the file of the model, which a model that is being trained is not in.
            with TemporaryDirectory(prefix=PICTURES, dir=self.folder) as place:
                for figure in measure(evaluation(self.request(Path(place))), metrics):
                    values[f"evaluate/{figure.name}"] = figure.estimate.value
                    better[figure.name] = figure.better or "lower"
        return values, better

    def _judge(self, now: Best, better: str, save: Callable[[Path], object]) -> None:
        best = self.state.best
        if best.improved_by(now.value, better):
            keep(self.folder, now, save)
            self.state.best = now
        else:
            self.state.best = replace(best, waited=best.waited + 1)

    def _report(self, evaluation: Evaluation) -> None:
        folder = self.folder / REPORT
        if is_file(
            folder / REQUEST
        ):  # of this run, when it was shorter, is gone on with only where it is of this model
            held = json.loads((folder / REQUEST).read_text())
            if held != json.loads(json.dumps(evaluation.subject)):
                shutil.rmtree(folder)
        evaluate(evaluation, self.config.evaluate.metrics)
        print(f"report: {folder / PAGE}")

    def _failure(self, error: Exception) -> dict[str, float]:
        """Count an evaluation that could not be made, and say why of the first."""
        if not self.failed:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"an evaluation failed ({reason}); training goes on without", file=sys.stderr)
        self.failed += 1
        return {"failed_evaluations": self.failed}

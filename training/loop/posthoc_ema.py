"""Make the average of a run's weights of any width, once the run is over: post-hoc EMA.

A run with `run.ema_snapshots` keeps averages of two widths beside its ordinary one and puts them on disk every so many
steps. Any other average is about a sum of those, found here. A width, sigma_rel, is the standard deviation of how the
average weighs the steps, as a share of their number.

Try:
    latentdiff train configs/emoji-diffusion.yaml --set run.ema_snapshots=200
    python -m latentdiff.training.loop.posthoc_ema runs/emoji-diffusion --sigma-rel 0.08 --out runs/emoji-0.08

Source: Karras et al. 2024, arXiv 2312.02696, section 3 and appendix C.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from latentdiff.checkpoints import load_pipeline, read_header, save_pipeline
from latentdiff.checkpoints.saver import flush_to_disk
from latentdiff.checkpoints.weights import read_weights, stored_weights
from latentdiff.errors import InputError, LatentDiffError
from latentdiff.files import write_file

from ..config import RunConfig
from .ema import Ema
from .sharding import gathered_on_main

if TYPE_CHECKING:
    from accelerate import Accelerator

SIGMA_RELS = (0.05, 0.10)  # of the averages that are kept
WIDEST = 0.28  # gamma is above zero up to 0.288
FOLDER = "ema"  # of a run
KEY = "latentdiff.snapshot"  # of the metadata
# Costs averages of width 0.05 and above no more than a float16 model file does anyway; bfloat16 costs eight times that.
STORED = torch.float16
_NAME = re.compile(r"step-(\d{8})\.safetensors$")


class PowerEma(Ema):
    """Hold the average in which the weights of step tau count as tau ** gamma, which grows as long as the run does.

    Source: Karras et al. 2024, arXiv 2312.02696, section 3.1.
    """

    def __init__(self, model: nn.Module, sigma_rel: float) -> None:
        super().__init__(model, decay=1.0)
        self.gamma = gamma_of(sigma_rel)

    def next_decay(self) -> float:
        """Return the share of the average in the next one; none at first, so that the initial weights do not count."""
        return (1 - 1 / (self.updates + 1)) ** (self.gamma + 1)


def power_emas(model: nn.Module, run: RunConfig) -> dict[float, PowerEma]:
    """Return the averages that a run keeps snapshots of, by sigma_rel; none where it keeps no snapshots."""
    return {sigma_rel: PowerEma(model, sigma_rel) for sigma_rel in SIGMA_RELS} if run.ema_snapshots else {}


def save_snapshot(run: RunConfig, step: int, averages: Mapping[float, PowerEma], accelerator: Accelerator) -> None:
    """Write the averages after `step` steps, from the main process, if they are due or the run is at its end.

    All processes have to call it.

    Raises:
        ModelValueError: a weight is beyond the range of float16.
        StorageError: they cannot be written; the last checkpoint stays.
    """
    due = bool(averages) and (step % run.ema_snapshots == 0 or step == run.steps)
    updates = max((average.updates for average in averages.values()), default=0)
    if not due or not updates:
        return
    named = {f"{sigma}/{name}": w for sigma, average in averages.items() for name, w in average.weights.items()}
    whole = gathered_on_main(named)
    if not accelerator.is_main_process:
        return
    weights, folder = stored_weights(whole, STORED), Path(run.out) / FOLDER
    # One entry of metadata: safetensors writes several in any order, and a resumed run shall write the same files.
    metadata = {KEY: f"{updates} {_digest(step, updates, weights)}"}
    folder.mkdir(exist_ok=True)
    write_file(folder / f"step-{step:08d}.safetensors", save(weights, metadata))
    flush_to_disk(folder)


def snapshots(run: Path) -> dict[int, Path]:
    """Return the snapshots of a run by their step, in order."""
    files = {int(match[1]): file for file in (run / FOLDER).glob("*") if (match := _NAME.match(file.name))}
    return dict(sorted(files.items()))


def remove_snapshots(run: Path, after: int) -> None:
    """Delete what a killed run wrote after step `after`, from which it is taken up, whole files or not."""
    late = [file for step, file in snapshots(run).items() if step > after]
    for file in [*late, *(run / FOLDER).glob(".tmp-*")]:
        file.unlink()


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent of the profile of a width.

    Raises:
        InputError: there is none.
    """
    if not 0 < sigma_rel < WIDEST:
        raise InputError(f"sigma_rel must be above 0 and below {WIDEST}, got {sigma_rel}; try 0.1")
    # sigma_rel ** 2 = (gamma + 1) / ((gamma + 2) ** 2 (gamma + 3)) is a cubic in gamma; one of its roots is positive.
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def sigma_rel_of(gamma: float) -> float:
    """Return the width of the profile of an exponent: its standard deviation, as a share of its length."""
    return float(((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5)


def inner_products(
    gammas: np.ndarray, ends: np.ndarray, other_gammas: np.ndarray, other_ends: np.ndarray
) -> np.ndarray:
    """Return the integrals of the products of profiles, (N, M) float64.

    A profile is (gamma + 1) tau ** gamma / end ** (gamma + 1) for tau up to its end, and zero from there on; over the
    step before t it has the very weight that `PowerEma` gives to the weights after update t.

    Args:
        gammas, ends: (N,) each.
        other_gammas, other_ends: (M,) each.
    """
    a, b, first, second = gammas[:, None] + 1, other_gammas + 1, ends[:, None], other_ends
    both = np.minimum(first, second)
    return a * b / (a + b - 1) * (both / first) ** a * (both / second) ** b / both


def fit_profile(gammas: np.ndarray, ends: np.ndarray, gamma: float, end: float) -> tuple[np.ndarray, float]:
    """Find the sum of profiles that is closest to another, with factors that sum to one.

    The condition, which the paper does not make, has weights that stand still come out as they are.

    Args:
        gammas, ends: of the profiles, (N,) each.
        gamma, end: of the other one.

    Returns:
        The factors (N,), and how far the sum is from the profile, relative to it, in the L2 norm.

    Source: Karras et al. 2024, arXiv 2312.02696, section 3.2 and appendix C.
    """
    ends, one, count = ends / end, np.ones(1), len(gammas)
    products, wanted = inner_products(gammas, ends, gammas, ends), inner_products(gammas, ends, one * gamma, one)[:, 0]
    bordered = np.block([[products, np.ones((count, 1))], [np.ones((1, count)), np.zeros((1, 1))]])  # Lagrange
    factors = np.linalg.lstsq(bordered, np.append(wanted, 1.0), rcond=None)[0][:count]
    norm = inner_products(one * gamma, one, one * gamma, one)[0, 0]
    apart = factors @ products @ factors - 2 * factors @ wanted + norm
    return factors, float(max(0.0, apart / norm) ** 0.5)


class Average(NamedTuple):
    """An average made of snapshots.

    Attributes:
        weights: by name, float32.
        error: of its profile, relative; see `fit_profile`.
        rounding: how many times larger than in one snapshot its rounding errors are.
    """

    weights: dict[str, Tensor]
    error: float
    rounding: float


def average_of(run: Path, sigma_rel: float, step: int | None = None) -> Average:
    """Make the average weights of a run from its snapshots.

    Args:
        run: folder of a run with snapshots.
        sigma_rel: width, as a share of the steps.
        step: after which the average is; None for the last snapshot's.

    Raises:
        InputError: no such width, no snapshots, none at or after the step, or one of them is damaged.
        ModelLoadError: one of them cannot be read.
    """
    gamma, found = gamma_of(sigma_rel), snapshots(run)
    if not found:
        raise InputError(f"{run} has no snapshots in {FOLDER}/; train with --set run.ema_snapshots=200 or the like")
    last = max(found)
    end = last if step is None else step
    if not 1 <= end <= last:
        raise InputError(f"step must be from 1 to {last}, the last snapshot of {run}, got {end}")
    used = [*(number for number in found if number < end), min(number for number in found if number >= end)]
    updates = [_metadata(found[number])[0] for number in used]  # skipped steps are none
    reached = float(np.interp(end, [0, *used], [0, *updates]))
    profiles = [(sigma, number, count) for number, count in zip(used, updates) for sigma in SIGMA_RELS]
    gammas, ends = (np.array([gamma_of(sigma) for sigma, *_ in profiles]), np.array([float(n) for *_, n in profiles]))
    factors, error = fit_profile(gammas, ends, gamma, reached)
    total: dict[str, Tensor] = {}
    for number, pair in zip(used, factors.reshape(-1, len(SIGMA_RELS))):
        for name, weight in _read(found[number], number).items():
            sigma, own = name.split("/", 1)
            factor = float(pair[SIGMA_RELS.index(float(sigma))])
            total.setdefault(own, torch.zeros(weight.shape)).add_(weight.float(), alpha=factor)
    return Average(total, error, float(np.linalg.norm(factors)))


def export(run: Path, sigma_rel: float, step: int | None, out: Path) -> None:
    """Write the run's exported model with average weights instead of its own; see `average_of`.

    Raises:
        InputError: the run has not exported its model yet.
        ModelLoadError, StorageError: the model cannot be read, or the folder not be written.
    """
    if snapshots(run) and not (run / "model").is_dir():
        raise InputError(f"{run / 'model'} is not there yet; train to the end, with --resume, then try again")
    average = average_of(run, sigma_rel, step)
    components = load_pipeline(run / "model")
    components.unet.load_state_dict(average.weights)
    save_pipeline(components, out, torch.float16)
    print(
        f"saved {out}; its profile is that of sigma_rel {sigma_rel} but for {average.error:.2%}, "
        f"its rounding errors are {average.rounding:.1f} times those of a snapshot"
    )


def _read(file: Path, step: int) -> dict[str, Tensor]:
    """Read a snapshot, and see that nothing in it has changed since it was written."""
    weights, (updates, digest) = read_weights(file, read_header(file).tensors), _metadata(file)
    if _digest(step, updates, weights) != digest:
        raise _damaged(file)
    return weights


def _metadata(file: Path) -> tuple[int, str]:
    """Return how many updates are in the averages of a snapshot, and its digest."""
    try:
        updates, digest = read_header(file).metadata[KEY].split()
        return max(1, int(updates)), digest
    except (KeyError, ValueError) as error:
        raise _damaged(file) from error


def _damaged(file: Path) -> InputError:
    return InputError(f"{file} is damaged; delete it to do without")


def _digest(step: int, updates: int, weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{step} {updates}".encode())
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].numpy().tobytes())
    return digest.hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run of stage diffusion")
    parser.add_argument("--sigma-rel", type=float, required=True, help="above 0 and below 0.28; best from 0.05 on")
    parser.add_argument("--step", type=int, help="after which the average is; the last by default")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    given = parser.parse_args(arguments)
    try:
        export(given.run, given.sigma_rel, given.step, given.out)
    except LatentDiffError as error:
        print(f"posthoc_ema: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Read and write the metadata and marks by which a single file says its prediction type, schedule and family.

Empty tensors (`v_pred`, `ztsnr`), metadata of ModelSpec and of sd-scripts, and the tables of the noise schedule that
the original code saves. What none of them can say, and the family does not imply, is in an entry of our own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.checkpoints.family import ENLARGING
from latentdiff.checkpoints.folder import parse_object
from latentdiff.checkpoints.header import Header, TensorInfo
from latentdiff.checkpoints.weights import FLOATS, read_weights
from latentdiff.diffusion.betas import BETA_SCHEDULES
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import ModelConfigError, ModelMismatchError, ModelValueError

__all__ = ["OWN_ENTRY", "VELOCITY", "ZERO_SNR", "Claims", "lora_metadata_of", "marks_of", "metadata_of", "read_claims"]

VELOCITY, ZERO_SNR = "v_pred", "ztsnr"  # empty tensors
OWN_ENTRY = "latentdiff"  # of the metadata: configurations by component, as far as they differ from the family's
PREDICTION_ENTRIES = ("modelspec.prediction_type", "modelspec.predict_key")
PREDICTION_WORDS = {
    **dict.fromkeys(("epsilon", "eps", "noise"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "v-prediction", "velocity"), "v_prediction"),
}
# Parts of names of architectures, in ModelSpec's and in sd-scripts' words, that say what is predicted, and the size.
ARCHITECTURES = {
    "v2-768-v": ("v_prediction", 768),
    "v2-512": ("epsilon", 512),
    "v2_v": ("v_prediction", None),
}
MODELSPEC = {  # names of architectures there
    "Stable Diffusion 1.x": "stable-diffusion-v1",
    "Stable Diffusion XL": "stable-diffusion-xl-v1-base",
    "Stable Diffusion XL refiner": "stable-diffusion-xl-v1-refiner",
}
SD_SCRIPTS = {
    "Stable Diffusion 1.x": "sd_v1",
    "Stable Diffusion XL": "sdxl_base_v1-0",
    "Stable Diffusion XL refiner": "sdxl_refiner_v1-0",
}
# Marks of models that a family's network computes otherwise than we do.
EDM = re.compile(r"edm_(mean|std|vpred)(\.|$)")
SCALES = re.compile(r"(.*\.)?(scaled_fp8|scale_weight|weight_scale|scale_input|input_scale)")
# What stands beside the networks in files of the original code and changes nothing.
HARMLESS = re.compile(
    r"(model|first_stage_model|cond_stage_model|conditioner|model_ema|denoiser|low_scale_model)\..+|"
    r"(sqrt_|log_)?(recip|recipm1|one_minus)?_?alphas_cumprod(_prev)?|betas|posterior_\w+|logvar|lvlb_weights|"
    rf"scale_factor|{VELOCITY}|{ZERO_SNR}"
)
USUAL_ENDS = [(0.00085, 0.012), (1e-4, 0.02)]  # of betas, which cannot be told from a table in half precision
CLOSE = 2e-3  # of square roots of alphas_cumprod, which files in half precision round
NAMED = 5  # tensors in a note


@dataclass(frozen=True)
class Claims:
    """What a file says of itself.

    Attributes:
        prediction_type: what its U-Net predicts; None where the file does not say.
        zero_snr: whether its schedule is one of zero terminal SNR.
        side: of the pictures, in pixels; None where it does not say.
        alphas_cumprod: (T,) float64, its schedule; None where it has none.
        configs: what differs from the family, by component, as we wrote it.
        notes: what is in the file and is not used, in a sentence each.
    """

    prediction_type: str | None
    zero_snr: bool
    side: int | None
    alphas_cumprod: Tensor | None
    configs: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def say_prediction(self) -> bool:
        """Whether the file says what its U-Net predicts."""
        return self.prediction_type is not None or "scheduler" in self.configs

    def schedule(self, family: NoiseSchedule) -> NoiseSchedule:
        """Return the schedule of the file, given that of its family.

        Raises:
            ModelConfigError: the file asks for one that cannot be honoured.
        """
        if isinstance(self.configs.get("scheduler"), dict):
            return NoiseSchedule.from_dict({"_class_name": "", **self.configs["scheduler"]})
        found = family
        if self.prediction_type is not None:
            found = replace(family, prediction_type=self.prediction_type)
        if self.alphas_cumprod is not None:
            found = _of_table(self.alphas_cumprod, found) or found
        if self.zero_snr and found.prediction_type != "epsilon":
            found = replace(found, rescale_betas_zero_snr=True)
        return found

    def all_notes(self, schedule: NoiseSchedule) -> tuple[str, ...]:
        """Return the notes, and one more if the schedule of the file is not the one that was made of it."""
        if self.alphas_cumprod is None or _close(schedule.alphas_cumprod, self.alphas_cumprod):
            return self.notes
        return (*self.notes, "its noise schedule (alphas_cumprod) is none that is known here, and is not used")

    def config(self, component: str, family: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration of a component, given that of its family."""
        own = self.configs.get(component)
        return {**family, **(own if isinstance(own, dict) else {})}


def read_claims(path: Path, header: Header) -> Claims:
    """Return what a file says of itself.

    Raises:
        ModelConfigError: it says that it is a model of a kind that is not supported.
        ModelMismatchError: its weights are to be multiplied by scales beside them.
        ModelFormatError: what we wrote there was damaged.
    """
    tensors, metadata, notes = header.tensors, header.metadata, list[str]()
    edm = next((name for name in tensors if EDM.match(name)), None)
    if edm is not None:
        raise ModelConfigError(f"{path}: {edm} marks a model of the EDM formulation, which is not supported")
    scale = next((name for name in tensors if SCALES.fullmatch(name)), None)
    if scale is not None:
        raise ModelMismatchError(
            f"{path}: {scale[:100]} is not expected: float8 weights that are to be multiplied by scales are not "
            "supported; use the file in float16"
        )
    prediction, side = _said(metadata, notes)
    if VELOCITY in tensors:
        prediction = "v_prediction"
    zero_snr = ZERO_SNR in tensors or metadata.get("ss_zero_terminal_snr", "").lower() == "true"
    table = _table(path, tensors, notes)
    others = [name for name in tensors if not HARMLESS.fullmatch(name)]
    if others:
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        notes.append(f"{', '.join(name[:80] for name in others[:NAMED])}{more} in {path.name} is not used")
    configs = parse_object(metadata[OWN_ENTRY], f"{path}: its metadata") if OWN_ENTRY in metadata else {}
    return Claims(prediction, zero_snr, side, table, configs, tuple(notes))


def _said(metadata: Mapping[str, str], notes: list[str]) -> tuple[str | None, int | None]:
    """Return what the metadata say of prediction type and picture size; None for what they do not say."""
    found: list[str] = []
    for entry in PREDICTION_ENTRIES:
        word = metadata.get(entry, "").strip().lower()
        if word in PREDICTION_WORDS:
            found.append(PREDICTION_WORDS[word])
        elif word:
            notes.append(f"{entry} is {word[:40]!r}, which is not known; pass prediction_type if pictures are noise")
    velocity = metadata.get("ss_v_parameterization", "").lower()
    if velocity in ("true", "false"):
        found.append("v_prediction" if velocity == "true" else "epsilon")
    side = None
    size = re.fullmatch(r"(\d{2,4})x(\d{2,4})", metadata.get("modelspec.resolution", ""))
    if size and size[1] == size[2] and 64 <= int(size[1]) <= 2048 and int(size[1]) % 8 == 0:
        side = int(size[1])
    for entry in ("modelspec.architecture", "ss_base_model_version"):
        for part, (prediction, pixels) in ARCHITECTURES.items():
            if part in metadata.get(entry, "").lower():
                found.append(prediction)
                side = side or pixels
    return (found[0] if found else None), side


def _table(path: Path, tensors: Mapping[str, TensorInfo], notes: list[str]) -> Tensor | None:
    """Return alphas_cumprod (T,) of a file; None where it has no such table, or a broken one."""
    for name in ("alphas_cumprod", "betas"):
        info = tensors.get(name)
        if info is None or info.dtype not in FLOATS or len(info.shape) != 1 or not 2 <= info.shape[0] <= 10_000:
            continue
        try:
            values = read_weights(path, {name: info}, torch.float64)[name]
        except ModelValueError:
            continue
        table = values if name == "alphas_cumprod" else (1 - values).cumprod(0)
        if bool((table >= 0).all()) and bool((table <= 1).all()) and bool((table.diff() <= 0).all()):
            return table
        notes.append(f"{name} in {path.name} is no noise schedule, and is not used")
    return None


def _of_table(table: Tensor, family: NoiseSchedule) -> NoiseSchedule | None:
    """Return the schedule that a table alphas_cumprod (T,) is of, the family's wherever that is it; None for others."""
    counted = replace(family, num_train_timesteps=len(table), steps_offset=min(family.steps_offset, len(table) - 1))
    candidates = [family, counted]
    betas = 1 - table / torch.cat([table.new_ones(1), table[:-1]])
    found = (float(f"{betas[0]:.2g}"), float(f"{betas[-1]:.2g}"))
    ends = [found, *USUAL_ENDS] if 0 < found[0] <= found[1] < 1 else USUAL_ENDS
    for start, end in ends:
        other = replace(counted, beta_start=start, beta_end=end)
        candidates += [replace(other, beta_schedule=name) for name in BETA_SCHEDULES if name != "flow"]
    for schedule in candidates:
        changed = [schedule]
        if schedule.prediction_type != "epsilon":
            changed.append(replace(schedule, rescale_betas_zero_snr=True))
        for one in changed:
            if _close(one.alphas_cumprod, table):
                return one
    return None


def _close(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and float((first.sqrt() - second.sqrt()).abs().max()) < CLOSE


def marks_of(schedule: NoiseSchedule, family: NoiseSchedule, zeros: Tensor) -> dict[str, Tensor]:
    """Return the tensors that say what a file of that schedule is, where it is not as its family.

    Args:
        zeros: an empty tensor.
    """
    if schedule.prediction_type != "v_prediction":
        return {}
    marks = {} if family.prediction_type == "v_prediction" else {VELOCITY: zeros}
    return {VELOCITY: zeros, ZERO_SNR: zeros.clone()} if schedule.rescale_betas_zero_snr else marks


def metadata_of(
    family: str, schedule: NoiseSchedule, side: int | None, channels: int, configs: Mapping[str, Any]
) -> dict[str, str]:
    """Return the metadata that say what a file is: ModelSpec's, and our own where those cannot say it all.

    Args:
        family: see `family.families`.
        side: of the pictures, in pixels.
        channels: that the U-Net takes.
        configs: by component, as far as they differ from the family's.
    """
    spec = {"modelspec.sai_model_spec": "1.0.0", "modelspec.implementation": "sgm"}
    if schedule.prediction_type in ("epsilon", "v_prediction"):
        velocity = schedule.prediction_type == "v_prediction"
        spec |= dict.fromkeys(PREDICTION_ENTRIES, "v" if velocity else "epsilon")
    if family != ENLARGING:
        spec["modelspec.architecture"] = _architecture(family, schedule) + ("-inpainting" if channels == 9 else "")
    if side is not None:
        spec["modelspec.resolution"] = f"{side}x{side}"
    own = {OWN_ENTRY: json.dumps(configs, sort_keys=True)} if configs else {}
    return {"format": "pt", **spec, **own}


def lora_metadata_of(family: str, schedule: NoiseSchedule) -> dict[str, str]:
    """Return the metadata that say what models a LoRA in the dialect of sd-scripts is for, as those do."""
    velocity = schedule.prediction_type == "v_prediction"
    if family == ENLARGING:
        return {"format": "pt"}
    return {
        "format": "pt",
        "modelspec.architecture": f"{_architecture(family, schedule)}/lora",
        "ss_base_model_version": SD_SCRIPTS.get(family, "sd_v2_v" if velocity else "sd_v2"),
        "ss_v_parameterization": str(velocity),
    }


def _architecture(family: str, schedule: NoiseSchedule) -> str:
    velocity = schedule.prediction_type == "v_prediction"
    return MODELSPEC.get(family, "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512")

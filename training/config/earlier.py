"""Configs of earlier releases, whose diffusion stage had all keys side by side, as those of this one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentdiff.errors import InputError

OBJECTIVE = {
    *("loss", "vlb_weight", "weighting", "min_snr_gamma", "timesteps", "offset_noise", "input_perturbation"),
    *("self_conditioning", "caption_dropout"),
}
SAMPLES = {"prompts", "guidance_scale"}
# Keys of a task, with the values that they had where nothing was given.
TASKS: dict[str, dict[str, Any]] = {
    "text_to_image": {},
    "inpaint": {"full_mask": 0.1},
    "upscale": {"degradation": 1.0, "max_noise_level": 350, "low_res_schedule": {}},
}
OF_TASKS = {name: value for keys in TASKS.values() for name, value in keys.items()}
TRAINED = {"lora": "lora", "textual_inversion": "word", "train_text_encoder": "unet_and_text"}
MOVED = {*OBJECTIVE, *SAMPLES, *OF_TASKS, *TRAINED}
# Keys of a model's config that were passed over, since they follow from the rest.
FOLLOWING = ("in_channels", "out_channels", "sample_size", "self_conditioning")


def modern(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config tree with the keys of earlier releases where they are now; one that has none as it is.

    Raises:
        InputError: a key is given in both places, or several things are to be trained.
    """
    old = MOVED & tree.keys()
    if tree.get("stage") != "diffusion" or not (old or isinstance(tree.get("task"), str)):
        return dict(tree)
    rest = {name: value for name, value in tree.items() if name not in MOVED}
    for section, names in (("objective", OBJECTIVE), ("samples", SAMPLES)):
        _move(rest, section, {name: tree[name] for name in names & old})
    kind = rest.get("task", "text_to_image")
    kind = str(kind.get("kind")) if isinstance(kind, Mapping) else kind
    if not isinstance(rest.get("task"), Mapping):
        rest["task"] = {"kind": kind}
    own = TASKS.get(kind, {})
    _move(rest, "task", {name: tree[name] for name in OF_TASKS if _counts(tree, name, own)})
    given = [name for name in TRAINED if tree.get(name) not in (None, False)]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} do not go together; train one of them, see train.kind in configs/")
    for name in given:
        if "train" in tree:
            raise InputError(f"{name} is train (kind: {TRAINED[name]}) now, and both are given; leave {name} out")
        rest["train"] = {"kind": TRAINED[name], **(tree[name] if isinstance(tree[name], Mapping) else {})}
    if isinstance(rest.get("model"), Mapping):
        rest["model"] = {name: value for name, value in rest["model"].items() if name not in FOLLOWING}
    return rest


def _counts(tree: Mapping[str, Any], name: str, own: Mapping[str, Any]) -> bool:
    """Say whether a key of some task was given to say something."""
    return name in tree and (name in own or tree[name] != OF_TASKS[name])


def _move(tree: dict[str, Any], section: str, values: dict[str, Any]) -> None:
    there = tree.get(section, {})
    if not values or not isinstance(there, Mapping):
        return
    for name in values.keys() & there.keys():
        raise InputError(f"{name} is {section}.{name} now, and both are given; leave {name} out")
    tree[section] = {**there, **values}

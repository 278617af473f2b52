"""Samplers and schedulers by the names of the web UIs."""

from __future__ import annotations

from typing import Any

from latentdiff.diffusion import SAMPLERS
from latentdiff.diffusion.plan import parse_sampler
from latentdiff.errors import InputError
from latentdiff.generation.infotext import SAMPLERS as SHOWN
from latentdiff.generation.infotext import SCHEDULES
from latentdiff.serve.http.errors import ApiError

__all__ = ["SAME_SPACING", "list_samplers", "list_schedulers", "own_sampler"]

AUTOMATIC = "Automatic"
# What stands for the noise levels that a sampler has here anyway.
SAME_SPACING = ("automatic", "uniform", "")


def _aliases(own: str) -> list[str]:
    older = own.replace("dpm2", "dpm_2")  # as k-diffusion calls it
    return [own, f"k_{older}"]


KNOWN = {name.lower(): own for own in SAMPLERS for name in (SHOWN.get(own, own), *_aliases(own))}
SPACINGS = {name.lower(): own for own, label in SCHEDULES.items() for name in (own, label)}


def list_samplers() -> list[dict[str, Any]]:
    """Return the samplers as clients list them."""
    return [{"name": SHOWN.get(own, own), "aliases": _aliases(own), "options": {}} for own in SAMPLERS]


def list_schedulers() -> list[dict[str, Any]]:
    """Return the spacings of noise levels as clients list them."""
    labels = {"automatic": AUTOMATIC, **SCHEDULES}
    return [
        {"name": own, "label": label, "aliases": None, "default_rho": -1.0, "need_inner_model": False}
        for own, label in labels.items()
    ]


def own_sampler(name: str | None, scheduler: str | None) -> str | None:
    """Return what a sampler is called here, its spacing included.

    Args:
        name: as in "DPM++ 2M", "DPM++ 2M Karras", "k_dpmpp_2m" or "dpmpp_2m_karras"; None for the model's own.
        scheduler: as in "Karras"; a spacing in the name goes before it.

    Raises:
        ApiError: there is no such sampler or scheduler, with those there are.
    """
    spacing = _spacing(scheduler or "")
    if not name:
        if spacing is not None:
            message = f"scheduler {scheduler} is of a sampler, got none; send sampler_name too"
            raise ApiError(400, message, "invalid_value", "scheduler")
        return None
    words = " ".join(name.lower().split())
    base, _, last = words.rpartition(" ")
    if words not in KNOWN and base in KNOWN and last in (*SPACINGS, *SAME_SPACING):
        words, spacing = base, SPACINGS.get(last)
    try:
        own = KNOWN.get(words, words)
        ending = parse_sampler(own)[1]
    except InputError as error:
        raise ApiError(400, error, "invalid_value", "sampler_name") from None
    return own if spacing is None or ending is not None else f"{own}_{spacing}"


def _spacing(scheduler: str) -> str | None:
    if scheduler.lower() in SAME_SPACING:
        return None
    if scheduler.lower() not in SPACINGS:
        known = ", ".join((AUTOMATIC, *SCHEDULES.values()))
        message = f"scheduler {scheduler[:80]} is unknown; choose one of {known}"
        raise ApiError(400, message, "invalid_value", "scheduler")
    return SPACINGS[scheduler.lower()]

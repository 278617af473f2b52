"""What the commands do that draw with a model or look at one; `cli.py` says what their options are."""

from __future__ import annotations

from latentdiff.commands.drawing import generate
from latentdiff.commands.models import convert, evaluate, inspect, plan
from latentdiff.commands.replaying import replay
from latentdiff.commands.upscaling import upscale

__all__ = ["convert", "evaluate", "generate", "inspect", "plan", "replay", "upscale"]

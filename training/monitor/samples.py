"""Sample grids of a diffusion run: its prompts, or examples of its task, generated with the averaged weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from latentdiff.checkpoints import Components, Encoders
from latentdiff.generation.request import Settings
from latentdiff.marks import GENERATED
from latentdiff.pipeline import Pipeline

from ..config import DiffusionTraining
from ..data.conditions import examples
from ..loop.run import save_grid


class SampleGrids:
    """Draw grids, none of which may end a run.

    Attributes:
        failed: how many could not be drawn.
    """

    def __init__(self) -> None:
        self.failed = 0

    def made(self, draw: Callable[[], object]) -> bool:
        """Say whether a grid could be drawn; of the first that could not, say why on stderr."""
        try:
            draw()
        except Exception as error:  # whatever it is, it must not cost the weights that are being trained
            if not self.failed:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                print(f"samples could not be drawn ({reason}); training goes on without", file=sys.stderr)
            self.failed += 1
            return False
        return True


@torch.no_grad()
def try_prompts(config: DiffusionTraining, components: Encoders) -> None:
    """Encode whatever will be drawn later.

    Raises:
        InputError: a prompt is none of the classes that the model is to know.
    """
    prompts = [*config.samples.prompts, *([] if config.prior is None else [config.prior.prompt])]
    components.prompt_encoder(prompts)


def draw_samples(components: Components, config: DiffusionTraining, file: Path) -> None:
    """Draw the config's prompts, or examples of its task below what they are made of, in rows of eight, seeds fixed.

    Prompts are encoded as captions are, in which brackets are no weights.
    """
    steps = min(Settings.num_inference_steps, components.schedule.num_train_timesteps)
    options: dict[str, Any] = {"output_type": "pt", "prompt_weights": False}
    if config.consistency is None:  # whose result has defaults of its own
        options |= {"guidance_scale": config.samples.guidance_scale, "num_inference_steps": steps}
    pipe = Pipeline(components)
    if config.task.kind == "text_to_image":
        images = pipe(config.samples.prompts, seed=0, **options).images.cpu() * 2 - 1
        save_grid(images, file, columns=8, source_type=GENERATED)
        return
    shown, drawn = [], []
    for number, (prompt, given, picture) in enumerate(examples(config, components)):
        shown.append(picture)
        drawn.append(pipe(prompt, seed=number, **given, **options).images[0].cpu() * 2 - 1)
    save_grid([*shown, *drawn], file, columns=len(shown))

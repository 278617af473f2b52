"""Pictures that a model draws of a kind of thing before it learns one of them, so that it does not forget the others.

Source: Ruiz et al. 2022, arXiv 2208.12242 (DreamBooth), section 3.3.
"""

from __future__ import annotations

import json
from pathlib import Path

from tqdm import tqdm

from latentdiff.checkpoints import Components
from latentdiff.files import make_folder, write_file
from latentdiff.pipeline import Pipeline

from ..config import DataConfig, DiffusionTraining

METADATA = "metadata.jsonl"


def draw_prior(config: DiffusionTraining, components: Components, folder: Path) -> DataConfig:
    """Draw what is lacking of the pictures of a prior, into folder/prior, and return how to open them.

    Picture i is that of seed i, so that a run that was interrupted goes on where it was.

    Raises:
        StorageError: a picture cannot be written.
    """
    assert config.prior is not None
    place, prompt = folder / "prior", config.prior.prompt
    make_folder(place)
    names = [f"{number:05d}.png" for number in range(config.prior.pictures)]
    lacking = [number for number, name in enumerate(names) if not (place / name).exists()]
    pipe = Pipeline(components)
    for number in tqdm(lacking, f"{prompt!r:.40}", disable=not lacking):
        drawn = pipe(prompt, seed=number, guidance_scale=config.samples.guidance_scale, prompt_weights=False)
        drawn.write(0, place / names[number])
    rows = [json.dumps({"file_name": name, "text": prompt}) + "\n" for name in names]
    write_file(place / METADATA, "".join(rows).encode())
    return config.data.model_copy(update={"folder": str(place), "captions": [], "keep": {}, "drop": {}})

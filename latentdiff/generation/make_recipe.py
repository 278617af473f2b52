"""Make the recipe by which pictures like those of a request are drawn without torch."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from latentdiff.checkpoints.components import TextEncoder
from latentdiff.checkpoints.folder import read_layout, weight_files
from latentdiff.diffusion import Plan
from latentdiff.diffusion.folding import folded
from latentdiff.diffusion.guidance import guidance_scales
from latentdiff.engine.layouts import LaidOut
from latentdiff.engine.openvino_engine import GRAPH, SHIFTS, OpenVINO
from latentdiff.engine.tiled_decoding import needs_tiles
from latentdiff.engine.torch_noise import FEWEST, agrees_with_torch
from latentdiff.generation.recipe import FREE, Recipe, words_of, write_recipe
from latentdiff.generation.run import Drawing, prepare_drawing
from latentdiff.generation.stages import Job
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.bert import BertModel
from latentdiff.models.unet import UNetConfig

__all__ = ["keep_recipe"]


@torch.no_grad()
def keep_recipe(job: Job, place: Path) -> None:
    """Write the recipe of a request, and the layouts of its networks, unless it is drawn in a way that has none.

    Args:
        job: without pictures to start from.
        place: of the recipe.

    Raises:
        StorageError: something cannot be written.
    """
    if not _is_plain(job) or not agrees_with_torch():
        return
    drawing = prepare_drawing(job, 1)
    if not _is_plain_drawing(drawing):
        return
    graphs = _graphs(job)
    for graph in graphs.values():
        graph.keep()
    recipe = _recipe(job, drawing, graphs)
    if recipe is not None:
        write_recipe(recipe, place)


def _recipe(job: Job, drawing: Drawing, graphs: dict[str, LaidOut]) -> Recipe | None:
    """Return the recipe of a request; None where a conversion could not be written."""
    components, (stage,) = job.components, drawing.stages
    settings, plan, source = stage.settings, stage.plan, components.source
    files = {name: graph.file for name, graph in graphs.items()}
    words = None if source is None else _words(source.path, components.text_encoder)
    if source is None or words is None or not isinstance(plan, Plan) or None in files.values():
        return None
    unet, encoder = components.unet, components.text_encoder
    scales = guidance_scales(
        plan.sigmas, settings.guidance_scale, settings.guidance_interval, settings.guidance_schedule
    )
    context = stage.conditioning.of([0]).context
    timesteps = plan.timesteps.to(torch.float32)
    embedded = unet.embedded(timesteps, None, {})  # (R, D)
    time = {"time": embedded} if SHIFTS in graphs else {"shifts": unet.shifts(embedded, context)}
    pairs = [pair for transformer in unet.texts(context) for block in transformer for pair in block]
    options = [item.name for item in fields(settings) if item.name != "prompts" and item.name not in FREE]
    return Recipe(
        settings={name: getattr(settings, name) for name in options},
        record=drawing.record,
        graphs={name: str(file) for name, file in files.items()},
        tokenizer=str((source.path / "tokenizer").resolve()),
        words=str(words),
        window=encoder.config.max_position_embeddings,  # type: ignore[union-attr]  # of BERT
        masked=encoder.config.use_attention_mask,  # type: ignore[union-attr]
        heads=[(keys.shape[1], keys.shape[3]) for keys, _ in pairs],
        shape=stage.shape,
        scales=scales.tolist(),
        noisy=plan.noise.any(dim=1).tolist(),
        init_noise_sigma=plan.init_noise_sigma,
        scaling_factor=components.autoencoder.config.scaling_factor,
        shift_channels=sum(unet.shift_channels()),
        tables={
            **folded(components.denoiser(lambda x, call: x), plan),
            **{key: one.numpy() for key, one in time.items()},
        },
    )


def _words(folder: Path, encoder: TextEncoder) -> Path | None:
    """Return the file that has the table of a text encoder's tokens; None where numpy reads something else from it."""
    assert isinstance(encoder, BertModel)
    (first, *_), ids = weight_files(folder, "text_encoder"), np.arange(min(encoder.config.vocab_size, 8))
    try:
        same = np.array_equal(words_of(first, ids), encoder.embeddings.word_embeddings.weight[: len(ids)].numpy())
    except (SafetensorError, TypeError):  # in another shard, or of a kind that numpy lacks
        return None
    return first.resolve() if same else None


def _graphs(job: Job) -> dict[str, LaidOut]:
    components, engine = job.components, job.execution.engine
    assert isinstance(engine, OpenVINO) and isinstance(components.autoencoder, AutoencoderKL)
    assert isinstance(components.text_encoder, BertModel)
    unet, decoder = engine.graphs(components.unet), engine.graphs(components.autoencoder)
    encoder = engine.graphs(components.text_encoder)
    texts = {name: graph for name, graph in unet.items() if name != GRAPH}
    return {"encoder": encoder[GRAPH], **texts, "unet": unet[GRAPH], "decoder": decoder[GRAPH]}


def _is_plain(job: Job) -> bool:
    """Say whether a request takes nothing that `without_torch` lacks, on the side of model and machine."""
    components, execution = job.components, job.execution
    unet: UNetConfig = components.unet.config
    autoencoder = components.autoencoder
    return (
        isinstance(execution.engine, OpenVINO)
        and execution.dtype == torch.float32
        and execution.tile_size is None
        and components.task == "text_to_image"
        and isinstance(components.text_encoder, BertModel)
        and components.text_encoder_2 is None
        and isinstance(autoencoder, AutoencoderKL)
        and components.source is not None
        and read_layout(components.source.path).base is None
        and not (components.loras or components.embeddings or components.vae or components.force_zeros)
        and not (unet.self_conditioning or unet.time_cond_proj_dim or unet.expects_sizes)
        and not (unet.class_embed_type or unet.num_class_embeds)
        and not components.denoiser(lambda x, call: x).bounds_estimates
        and not needs_tiles(autoencoder.config, job.image.height, job.image.width, torch.float32)
    )


def _is_plain_drawing(drawing: Drawing) -> bool:
    """Say the same on the side of the settings."""
    job, settings = drawing.job, drawing.job.settings
    if len(drawing.stages) > 1 or drawing.notes or job.scheduler is not None or job.noise is not None:
        return False
    (stage,) = drawing.stages
    usual = settings.guidance_rescale == 0 and settings.guidance_parallel == 1 and settings.guidance_limit is None
    varied = settings.blend or settings.variation_strength or job.image.pixels is not None
    plan, (channels, height, width) = stage.plan, stage.shape
    return (
        usual
        and not varied
        and isinstance(plan, Plan)
        and not plan.noise_range.any()
        and channels * height * width >= FEWEST
    )

"""Models to pipelines of diffusers and back, without a copy of the weights: both see the same memory.

This needs diffusers and transformers, which are imported when a function here is called.
"""

from __future__ import annotations

import importlib
import inspect
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from latentdiff.checkpoints.build import KINDS, TEXT_MODEL, build
from latentdiff.checkpoints.components import AnyNetwork, Components, check_fit
from latentdiff.checkpoints.folder import CLASSES
from latentdiff.checkpoints.saver import pipeline_index
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import InputError, ModelMismatchError
from latentdiff.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["from_diffusers", "to_diffusers"]

THEIR_LATENTS = 4  # channels that diffusers' inpainting pipelines take latents to have


def to_diffusers(components: Components) -> DiffusionPipeline:
    """Return the pipeline of diffusers that draws what this model draws, sharing its weights.

    Args:
        components: a model that diffusers has a pipeline for.

    Raises:
        InputError: it has none: diffusion in pixels or of classes, inpainting in latents of other than 4 channels.
    """
    import diffusers
    import transformers

    index, networks, tokenizers, schedules = pipeline_index(components)
    kind = index.pop("_class_name")
    if kind == "LatentdiffPipeline":
        raise InputError("diffusers has no pipeline for models of pixels or classes, got one; use this package's")
    channels = components.autoencoder.config.latent_channels if components.inpaints else THEIR_LATENTS
    if channels != THEIR_LATENTS:
        raise InputError(
            f"diffusers' inpainting pipelines take latents of {THEIR_LATENTS} channels, got a model of {channels}; "
            "use this package's"
        )
    theirs: dict[str, Any] = {}
    for name, entry in index.items():
        if not isinstance(entry, list):
            continue
        library, class_name = entry
        if name in networks:
            theirs[name] = _their_network(getattr(importlib.import_module(library), class_name), networks[name])
        elif name in tokenizers:
            with tempfile.TemporaryDirectory() as place:
                tokenizers[name].save(place)
                theirs[name] = getattr(transformers, class_name).from_pretrained(place)
        elif name in schedules:
            theirs[name] = getattr(diffusers, class_name).from_config(schedules[name].to_dict())
        else:
            theirs[name] = None
    options = {name: value for name, value in index.items() if not isinstance(value, list) and name[0] != "_"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*(scaling_factor|steps_offset)", FutureWarning)
        pipe = getattr(diffusers, kind)(**theirs, **options)
    for name, schedule in schedules.items():  # which some pipelines have given another offset
        setattr(pipe, name, type(getattr(pipe, name)).from_config(schedule.to_dict()))
    if components.upscales:  # it is made to have the factor of Stable Diffusion's upscaler
        pipe.vae.register_to_config(scaling_factor=components.autoencoder.config.scaling_factor)
    return pipe


def from_diffusers(pipe: DiffusionPipeline) -> Components:
    """Return the components of a pipeline of diffusers, sharing its weights.

    Args:
        pipe: a pipeline whose folder could be loaded, see `folder.CLASSES`.

    Raises:
        InputError: another class of pipeline.
        ModelLoadError: a part has a configuration that is not supported.
    """
    kind = type(pipe).__name__
    if kind not in CLASSES["pipeline"]:
        raise InputError(f"expected a pipeline of diffusers, one of {', '.join(CLASSES['pipeline'])}; got {kind}")
    place = Path(kind)
    theirs = pipe.components
    encoders = [theirs.get(name) for name in ("text_encoder", "text_encoder_2")]
    words = [theirs.get(name) for name in ("tokenizer", "tokenizer_2")]
    found = [_our_network(place, encoder) for encoder in encoders if encoder is not None]
    tokenizers = [_our_tokenizer(tokenizer) for tokenizer in words if tokenizer is not None]
    components = Components(
        unet=_our_network(place, pipe.unet),
        autoencoder=_our_network(place, pipe.vae),
        text_encoder=found[0],
        tokenizer=tokenizers[0],
        schedule=_our_schedule(pipe.scheduler),
        text_encoder_2=found[1] if len(found) > 1 else None,
        tokenizer_2=tokenizers[1] if len(tokenizers) > 1 else None,
        low_res_schedule=_our_schedule(pipe.low_res_scheduler) if "low_res_scheduler" in theirs else None,
        force_zeros=bool(pipe.config.get("force_zeros_for_empty_prompt", False)),
        name=kind,
    )
    check_fit(place, components)
    return components


def _their_network(kind: type[ModelMixin | PreTrainedModel], network: AnyNetwork) -> nn.Module:
    """Return a network of diffusers or transformers with the weights of ours."""
    from accelerate import init_empty_weights

    config = network.config.to_dict()
    with init_empty_weights(include_buffers=False):
        if hasattr(kind, "from_config"):
            theirs: nn.Module = kind.from_config(config)
        else:
            theirs = kind(kind.config_class.from_dict(config))
    weights = _renamed(network.state_dict(), theirs.state_dict())
    theirs.load_state_dict(weights, strict=False, assign=True)
    _require_whole(theirs)
    return theirs.requires_grad_(False).eval()


def _our_network(place: Path, theirs: ModelMixin | PreTrainedModel) -> Any:
    """Return our network with the weights of one of diffusers or transformers."""
    kind = KINDS.get(type(theirs).__name__)
    if kind is None:
        raise InputError(f"expected a network of {', '.join(KINDS)}; got {type(theirs).__name__}")
    if hasattr(theirs, "from_config"):  # of diffusers
        config = dict(theirs.config)
    else:
        config = {**theirs.config.to_dict(), "architectures": [type(theirs).__name__]}
    weights = theirs.state_dict()
    network = build(place, kind, config, len(weights), next(theirs.parameters()).dtype)
    expected = network.state_dict()
    weights = _renamed(weights, expected)
    missing = sorted(expected.keys() - weights.keys())
    if missing:
        raise ModelMismatchError(f"{type(theirs).__name__}: {', '.join(missing[:5])} is missing; use a whole model")
    network.load_state_dict({name: weights[name] for name in expected}, strict=True, assign=True)
    return network.requires_grad_(False).eval()


def _renamed(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under the names that another version of the same network has for them."""

    def name_of(name: str) -> str:
        if name in expected:
            return name
        other = name.removeprefix(TEXT_MODEL) if name.startswith(TEXT_MODEL) else TEXT_MODEL + name
        return other if other in expected else name

    return {name_of(name): tensor.detach() for name, tensor in weights.items()}


def _require_whole(network: nn.Module) -> None:
    """Tie what is tied in transformers, and raise if a weight was given none."""
    tie = getattr(network, "tie_weights", None)
    if tie is not None:
        tie()
    empty = [name for name, parameter in network.named_parameters() if parameter.is_meta]
    if empty:
        raise ModelMismatchError(f"{type(network).__name__} of this version also has {', '.join(empty[:5])}")


def _our_tokenizer(theirs: PreTrainedTokenizerBase) -> Tokenizer:
    with tempfile.TemporaryDirectory() as place:
        theirs.save_pretrained(place)
        return Tokenizer.from_folder(place)


def _our_schedule(scheduler: SchedulerMixin) -> NoiseSchedule:
    # What nobody chose is left to the sampler, as diffusers does when one scheduler is made from another. But pipelines
    # of Stable Diffusion put steps_offset 1 in place of a default, and do not list it as chosen.
    defaults = inspect.signature(type(scheduler)).parameters
    unchosen = {
        name
        for name in scheduler.config.get("_use_default_values", ())
        if name in defaults and scheduler.config[name] == defaults[name].default
    }
    chosen = {name: value for name, value in scheduler.config.items() if name not in unchosen}
    return NoiseSchedule.from_dict({**chosen, "_class_name": type(scheduler).__name__})

"""Whether the values of a config can be used, as far as their numbers tell: nothing is built, no file is opened."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from PIL import ImageColor

from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import LatentDiffError
from latentdiff.models.autoencoder import AutoencoderConfig
from latentdiff.models.config import ModelConfig
from latentdiff.models.image_text import ImageTextConfig
from latentdiff.models.unet import UNetConfig
from latentdiff.prompts import check_prompt

from .earlier import FOLLOWING
from .yaml_file import short

MAX_PATH = 4096  # characters
MAX_NAME = 255  # bytes of a file or folder
# Of the config of a network: levels, and the largest number under a key, 16384 for all others.
MAX_LEVELS = 12
LARGEST = {
    "layers_per_block": 64,
    "transformer_layers_per_block": 64,
    "latent_channels": 256,
    "num_class_embeds": 10_000,
}
# Of a U-Net that is trained further.
GROWING = (
    *("down_block_types", "up_block_types", "transformer_layers_per_block", "only_cross_attention"),
    *("layers_per_block", "in_channels", "out_channels", "addition_embed_type", "addition_embed_type_num_heads"),
)
LARGEST_BLOCKS = 4096  # layers times transformer layers, of all levels


def check_path(path: str) -> str:
    """Return a path that a file system can have; raise ValueError for any other."""
    if "\0" in path or len(path) > MAX_PATH:
        raise ValueError(f"{short(path)} must be a path of at most {MAX_PATH} characters without NUL")
    try:
        parts = path.encode().split(b"/")
    except UnicodeEncodeError:
        raise ValueError(f"{short(path)} must be a path in valid Unicode") from None
    if max(map(len, parts)) > MAX_NAME and "://" not in path:
        raise ValueError(f"{short(path)} must have names of at most {MAX_NAME} bytes; shorten it")
    return path


def check_colour(name: str) -> str:
    """Return the name of a colour that Pillow knows; raise ValueError for any other."""
    try:
        ImageColor.getrgb(name)
    except ValueError:
        raise ValueError(f"data.background must be a colour, got {short(name)}; try white or #ff8800") from None
    return name


def check_texts(texts: list[str], what: str, allow_empty: bool = False) -> None:
    """Raise InputError where one of several texts cannot be encoded."""
    for number, text in enumerate(texts):
        check_prompt(text, what=f"{what}[{number}]", allow_empty=allow_empty)


def check_schedule(schedule: Mapping[str, Any], name: str) -> None:
    """Raise ValueError where a noise schedule cannot be made of a section."""
    for key in schedule:
        if key.startswith("_") and key != "_class_name":
            raise ValueError(f"{name}.{short(key)} counts for nothing; leave it out")
    try:
        NoiseSchedule.from_dict(schedule)
    except LatentDiffError as error:
        raise ValueError(f"{name}: {error}") from error
    except (OverflowError, TypeError) as error:
        raise ValueError(f"{name} cannot be used: {str(error)[:80]}") from error


def check_unet(model: Mapping[str, Any]) -> None:
    """Raise ValueError where a section is no config of a U-Net that could be trained."""
    for key in FOLLOWING:
        if key in model:
            raise ValueError(f"model.{key} follows from the latents and the objective; leave it out")
    _check_network(UNetConfig, model)


def check_growth(changes: Mapping[str, Any]) -> None:
    """Raise ValueError where a section is more than what a U-Net can be given that it has not."""
    for key, value in changes.items():
        if key not in GROWING:
            raise ValueError(f"start_from brings its own model.{key:.80}; leave that out, or start anew without it")
        _check_number(key, value)


def check_autoencoder(model: Mapping[str, Any], size: int) -> None:
    """Raise ValueError where a section is no config of an autoencoder that could be trained on squares of `size`."""
    config = _check_network(AutoencoderConfig, model)
    if (config.in_channels, config.out_channels) != (3, 3):
        raise ValueError("model: in_channels and out_channels are 3, of pictures in colour; leave them out")
    if not (config.use_quant_conv and config.use_post_quant_conv):  # which take the statistics at the export
        raise ValueError("model: measured latent statistics need use_quant_conv and use_post_quant_conv true")
    if size % config.downsample_factor:
        raise ValueError(
            f"data.size must be a multiple of {config.downsample_factor}, by which the model makes pictures smaller, "
            f"got {size}; use fewer block_out_channels"
        )


def check_image_text(model: Mapping[str, Any]) -> None:
    """Raise ValueError where a section is no config of an image-text model, whose text side follows from the rest."""
    following = next((key for key in ("text_dim", "text_encoder") if key in model), None)
    if following is not None:
        raise ValueError(f"model: {following} follows from the text encoder; leave it out")
    _check_network(ImageTextConfig, model)


def _check_network(kind: type[Any], model: Mapping[str, Any]) -> Any:
    for key, value in model.items():
        if key.startswith("_"):
            raise ValueError(f"model.{short(key)} counts for nothing; leave it out")
        _check_number(key, value)
    try:
        config: ModelConfig = kind.from_dict(model)
    except LatentDiffError as error:
        raise ValueError(f"model: {error}") from error
    if isinstance(config, UNetConfig):
        layers, transformers = _several(config.layers_per_block), _several(config.transformer_layers_per_block)
        if prod((len(config.block_out_channels), max(layers), max(transformers))) > LARGEST_BLOCKS:
            raise ValueError(f"model has more than {LARGEST_BLOCKS} blocks; lower layers_per_block")
    return config


def _check_number(key: str, value: object) -> None:
    numbers = _several(value)
    if len(numbers) > MAX_LEVELS:
        raise ValueError(f"model.{key} has {len(numbers)} levels, at most {MAX_LEVELS} can be trained")
    largest = LARGEST.get(key, 16384)
    for number in numbers:
        if isinstance(number, int | float) and not -largest <= number <= largest:
            raise ValueError(f"model.{key} must be at most {largest}, got {short(number)}")


def _several(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]

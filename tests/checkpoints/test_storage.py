"""What precision weights are stored in, and where: folders and single files turn into each other without loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff.checkpoints import load_pipeline, save_pipeline, single_file
from latentdiff.checkpoints.inspect import describe_folder
from latentdiff.checkpoints.weights import STORAGE_DTYPES
from latentdiff.cli import main
from latentdiff.errors import ModelMismatchError, ModelValueError
from tests.checkpoints.oracle import bitwise_equal
from tests.checkpoints.small_models import weights_of
from tests.checkpoints.test_single_file import components_of, tiny

FAMILY = "Stable Diffusion 1.x"
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


@pytest.fixture
def shape(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    shape = tiny(FAMILY)
    monkeypatch.setattr(single_file, "families", lambda: {FAMILY: shape})
    return shape


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(bitwise_equal(held, second[name]) for name, held in first.items())


@pytest.mark.parametrize("name", STORAGE_DTYPES)
def test_every_precision_survives_the_way_there_and_back(
    tmp_path: Path, shape: dict[str, object], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folder -> single file -> folder in one precision: bitwise the same files, and what was rounded once."""
    components, dtype = components_of(shape), STORAGE_DTYPES[name]
    first, file, second = tmp_path / "first", tmp_path / "file.safetensors", tmp_path / "second"
    save_pipeline(components, first, dtype)
    assert main(["convert", str(first), str(file), "--dtype", name]) == 0
    assert main(["convert", str(file), str(second), "--dtype", name]) == 0
    weight_files = sorted(path.relative_to(first) for path in first.rglob("*.safetensors"))
    assert len(weight_files) == 3
    for path in weight_files:
        before, after = load_file(first / path), load_file(second / path)
        assert same(before, after) and {tensor.dtype for tensor in before.values()} == {dtype}
    assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}
    rounded = {key: tensor.to(dtype).float() for key, tensor in weights_of(components).items()}
    for source in (first, file):
        assert same(weights_of(load_pipeline(source)), rounded)
        assert same(weights_of(load_pipeline(source, torch.bfloat16)), {k: v.bfloat16() for k, v in rounded.items()})
    kinds = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "bfloat16": "BF16", "float16": "F16"}
    assert describe_folder(first)["precision"] == kinds.get(name, "F32")


@pytest.mark.parametrize(
    ("name", "largest"), [("float8_e4m3fn", 448.0), ("float8_e5m2", 57344.0), ("float16", 65504.0)]
)
def test_what_a_precision_cannot_hold_is_refused(
    tmp_path: Path, shape: dict[str, object], name: str, largest: float, capsys: pytest.CaptureFixture[str]
) -> None:
    components = components_of(shape)
    assert components.unet is not None
    bias = components.unet.conv_in.bias
    bias.data[3] = -largest
    save_pipeline(components, tmp_path / "good", STORAGE_DTYPES[name])
    held = load_pipeline(tmp_path / "good").unet
    assert held is not None and held.conv_in.bias[3] == -largest
    for value in (largest * 1.002, -1e9, torch.nan, torch.inf):
        bias.data[3] = value
        with pytest.raises(ModelValueError, match=rf"conv_in\.bias is not finite in torch\.{name}"):
            save_pipeline(components, tmp_path / "folder", STORAGE_DTYPES[name])
        with pytest.raises(ModelValueError, match=r"save in float32"):
            single_file.save_single_file(components, tmp_path / "file.safetensors", STORAGE_DTYPES[name])
    assert [entry.name for entry in tmp_path.iterdir()] == ["good"]


def test_storage_is_not_computing(built_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "cat", "--model", str(built_model), "--dtype", "float8_e5m2", "-o", str(tmp_path)]) == 2
    assert main(["convert", str(built_model), str(tmp_path / "a"), "--dtype", "float8"]) == 2
    assert "dtype 'float8' is unknown; did you mean 'float" in capsys.readouterr().err


def test_scales_beside_the_weights_are_not_passed_over(tmp_path: Path, shape: dict[str, object]) -> None:
    """As files have them whose float8 weights are to be multiplied; without, the network would be another."""
    file = tmp_path / "file.safetensors"
    single_file.save_single_file(components_of(shape), file, torch.float8_e4m3fn)
    scaled = {**load_file(file), "model.diffusion_model.out.2.scale_weight": torch.ones(1)}
    save_file(scaled, file)
    with pytest.raises(ModelMismatchError, match=r"out\.2\.scale_weight is not expected"):
        load_pipeline(file)


def split(folder: Path, variant: str) -> None:
    """Divide the weights in a folder into two shards of a variant, with their index."""
    (file,) = folder.glob("*.safetensors")
    weights, stem = load_file(file), file.name.split(".")[0]
    file.unlink()
    placed = {}
    for number, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), start=1):
        shard = f"{stem}{variant}-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, folder / shard)
        placed |= dict.fromkeys(names, shard)
    index = {"metadata": {}, "weight_map": placed}
    (folder / f"{stem}.safetensors.index{variant}.json").write_text(json.dumps(index))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_of_one_variant_loads(model_folder: Path, built_model: Path, sharded: bool) -> None:
    for folder in (model_folder / name for name in ("unet", "vae", "text_encoder")):
        if sharded:
            split(folder, ".fp16")
        else:
            (file,) = folder.glob("*.safetensors")
            file.rename(file.with_suffix(".fp16.safetensors"))
    assert same(weights_of(load_pipeline(model_folder)), weights_of(load_pipeline(built_model)))


@pytest.mark.parametrize("plain_sharded", [False, True])
@pytest.mark.parametrize("variant_sharded", [False, True])
def test_plain_files_come_before_their_variant(
    model_folder: Path, built_model: Path, tmp_path: Path, plain_sharded: bool, variant_sharded: bool
) -> None:
    save_pipeline(load_pipeline(built_model), tmp_path / "half", torch.float16)
    for name in ("unet", "vae", "text_encoder"):
        half, folder = tmp_path / "half" / name, model_folder / name
        if variant_sharded:
            split(half, ".fp16")
        if plain_sharded:
            split(folder, "")
        for file in [*half.glob("*.safetensors"), *half.glob("*index*")]:
            file.rename(folder / (file.name if variant_sharded else f"{file.stem}.fp16.safetensors"))
    assert same(weights_of(load_pipeline(model_folder)), weights_of(load_pipeline(built_model)))

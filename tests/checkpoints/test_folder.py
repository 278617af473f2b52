"""Model folders: what is written loads again; what is odd is refused, and nothing else is opened or run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentdiff import Pipeline
from latentdiff.checkpoints import (
    load_autoencoder,
    load_pipeline,
    load_text_encoder,
    save_model,
    save_pipeline,
)
from latentdiff.checkpoints.inspect import describe_file, describe_folder
from latentdiff.errors import (
    InputError,
    ModelConfigError,
    ModelFormatError,
    ModelLoadError,
    ModelMismatchError,
    ModelPathError,
    ModelValueError,
    StorageError,
    UnsafeModelError,
)

UNET = "unet/diffusion_pytorch_model.safetensors"


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def reweigh(path: Path, change: Any) -> None:
    """Change the tensors of a file, a dict passed to `change`."""
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    save_file(weights, path)


def test_saved_model_loads_again(pipe: Pipeline, built_model: Path, tmp_path: Path) -> None:
    save_pipeline(pipe.components, tmp_path / "copy", dtype=None)
    again = load_pipeline(tmp_path / "copy")
    assert again.unet is not None
    for ours, other in ((again.unet, pipe.unet), (again.text_encoder, pipe.text_encoder)):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name])
    assert again.schedule == pipe.components.schedule
    assert again.model_hash == pipe.components.model_hash
    assert again.name == str(tmp_path / "copy")
    assert not any(network.training for network in (again.unet, again.autoencoder, again.text_encoder))


def test_half_precision_files_load_in_the_dtype_asked_for(pipe: Pipeline, tmp_path: Path) -> None:
    save_pipeline(pipe.components, tmp_path / "half")
    assert describe_folder(tmp_path / "half")["precision"] == "F16"
    for dtype in (torch.float32, torch.bfloat16):
        components = load_pipeline(tmp_path / "half", dtype=dtype)
        assert {tensor.dtype for tensor in components.autoencoder.state_dict().values()} == {dtype}
    assert load_pipeline(tmp_path / "half").model_hash != pipe.components.model_hash


def test_files_are_readable_by_everyone(built_model: Path) -> None:
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in built_model.rglob("*.safetensors"))


def test_saving_again_keeps_the_card_and_nothing_temporary(pipe: Pipeline, model_folder: Path) -> None:
    (model_folder / "README.md").write_text("card")
    (model_folder / "unet" / "old.bin").write_text("old")
    save_pipeline(pipe.components, model_folder)
    assert (model_folder / "README.md").read_text() == "card"
    assert not (model_folder / "unet" / "old.bin").exists()
    assert [entry.name for entry in model_folder.parent.iterdir()] == [model_folder.name]


def test_folders_that_are_no_models_are_not_overwritten(pipe: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="no saved model"):
        save_pipeline(pipe.components, tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_a_save_that_fails_leaves_the_old_model(
    pipe: Pipeline, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_pipeline(model_folder).model_hash

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        save_pipeline(pipe.components, model_folder)
    assert [entry.name for entry in model_folder.parent.iterdir()] == [model_folder.name]
    assert load_pipeline(model_folder).model_hash == before


def test_non_finite_weights_are_not_saved(pipe: Pipeline, tmp_path: Path) -> None:
    large = load_autoencoder(pipe.components.source.path)  # type: ignore[union-attr]
    with torch.no_grad():
        large.decoder.conv_in.weight[0, 0, 0, 0] = 1e6
    with pytest.raises(ModelValueError, match=r"decoder\.conv_in\.weight is not finite"):
        save_model(large, tmp_path / "vae", torch.float16)
    assert not list(tmp_path.iterdir())


def test_parts_load_alone(built_model: Path) -> None:
    for path in (built_model, built_model / "vae"):
        assert load_autoencoder(path).config.downsample_factor == 4
    encoder, tokenizer = load_text_encoder(built_model)
    assert encoder.config.hidden_size == 16
    assert tokenizer.model_max_length == 8


def test_shards_and_variants_load(model_folder: Path, built_model: Path) -> None:
    weights = load_file(model_folder / UNET)
    (model_folder / UNET).unlink()
    names = sorted(weights)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: weights[name] for name in members}, model_folder / "unet" / file)
    index = model_folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    placed = {name: file for file, members in parts.items() for name in members}
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    text = model_folder / "text_encoder"
    (text / "model.safetensors").rename(text / "model.fp16.safetensors")
    loaded, original = load_pipeline(model_folder).unet, load_pipeline(built_model).unet
    assert loaded is not None
    assert original is not None
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in original.state_dict().items())


def test_old_names_of_autoencoder_attention_load(model_folder: Path) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            for new, before in old.items():
                if f".attentions.0.{new}." in name:
                    weights[name.replace(new, before)] = weights.pop(name)

    reweigh(model_folder / "vae/diffusion_pytorch_model.safetensors", rename)
    assert load_autoencoder(model_folder)


def test_tables_of_older_text_encoders_are_passed_over(model_folder: Path) -> None:
    positions = torch.arange(12)[None]
    reweigh(model_folder / "text_encoder/model.safetensors", lambda w: w.update({"embeddings.position_ids": positions}))
    assert load_pipeline(model_folder)


# What is done to a model folder, the error, and what it says.
DAMAGE: dict[str, tuple[Any, type[Exception], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), ModelPathError, "expected a file, got none"),
    "index is a list": (lambda f: (f / "model_index.json").write_text("[]"), ModelFormatError, "JSON object"),
    "index is no JSON": (lambda f: (f / "model_index.json").write_text("{"), ModelFormatError, "expected JSON"),
    "unknown pipeline": (
        lambda f: edit(f / "model_index.json", _class_name="EvilPipeline"),
        ModelConfigError,
        "got 'EvilPipeline'",
    ),
    "unknown class": (
        lambda f: edit(f / "model_index.json", unet=["my_module", "MyUNet"]),
        ModelConfigError,
        "expected class UNet2DConditionModel|UNet2DConditionModel",
    ),
    "component missing": (lambda f: edit(f / "model_index.json", vae=None), ModelConfigError, "for vae"),
    "config class differs": (
        lambda f: edit(f / "unet/config.json", _class_name="AutoencoderKL"),
        ModelConfigError,
        "expected class UNet2DConditionModel, got 'AutoencoderKL'",
    ),
    "auto_map": (lambda f: edit(f / "unet/config.json", auto_map={"a": "b.C"}), ModelConfigError, "'auto_map'"),
    "nested target": (
        lambda f: edit(f / "scheduler/scheduler_config.json", x=[{"_target_": "os.system"}]),
        ModelConfigError,
        "'_target_'",
    ),
    "code in tokenizer": (
        lambda f: edit(f / "tokenizer/tokenizer_config.json", auto_map={"a": "b.C"}),
        ModelConfigError,
        "'auto_map'",
    ),
    "unknown scheduler": (
        lambda f: edit(f / "scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"),
        ModelConfigError,
        "scheduler",
    ),
    "unknown key": (lambda f: edit(f / "unet/config.json", block_chanels=3), ModelConfigError, "block_chanels"),
    "too much memory": (
        lambda f: edit(f / "unet/config.json", cross_attention_dim=2**24, block_out_channels=[2**20, 2**20]),
        ModelConfigError,
        "GiB of memory, and this machine has",
    ),
    "absurd number": (
        lambda f: edit(f / "unet/config.json", cross_attention_dim=10**30),
        ModelConfigError,
        "no number above",
    ),
    "absurd depth": (
        lambda f: edit(f / "unet/config.json", layers_per_block=10**6),
        ModelMismatchError,
        r"implies [12]000000 layers or more",
    ),
    "other shape": (
        lambda f: edit(f / "unet/config.json", cross_attention_dim=24),
        ModelMismatchError,
        r"instead of \[16, 24\]|instead of \[32, 24\]",
    ),
    "tensor missing": (
        lambda f: reweigh(f / UNET, lambda w: w.pop("conv_in.weight")),
        ModelMismatchError,
        "conv_in.weight is missing",
    ),
    "tensors too many": (
        lambda f: reweigh(f / UNET, lambda w: w.update({f"x{i}": torch.zeros(1) for i in range(9)})),
        ModelMismatchError,
        "x0 is not expected.* and 4 more",
    ),
    "whole numbers": (
        lambda f: reweigh(f / UNET, lambda w: w.update({"conv_in.bias": torch.zeros(16, dtype=torch.int64)})),
        ModelMismatchError,
        "conv_in.bias is I64",
    ),
    "NaN": (
        lambda f: reweigh(f / UNET, lambda w: w["conv_in.bias"].index_fill_(0, torch.arange(3), torch.nan)),
        ModelValueError,
        "conv_in.bias has 3 values",
    ),
    "Inf": (
        lambda f: reweigh(f / UNET, lambda w: w["conv_in.bias"].index_fill_(0, torch.arange(1), torch.inf)),
        ModelValueError,
        "conv_in.bias has 1 values",
    ),
    "weights missing": (lambda f: (f / UNET).unlink(), ModelPathError, "got neither"),
    "only a pickle": (
        lambda f: (f / UNET).rename(f / "unet/diffusion_pytorch_model.bin"),
        UnsafeModelError,
        "diffusion_pytorch_model.bin",
    ),
    "a pickle in disguise": (
        lambda f: torch.save({"a": torch.zeros(1)}, f / UNET),
        UnsafeModelError,
        "a zip archive",
    ),
    "truncated weights": (
        lambda f: os.truncate(f / UNET, (f / UNET).stat().st_size - 1),
        ModelFormatError,
        "follow the header",
    ),
    "link out of the folder": (
        lambda f: ((f / UNET).rename(f.parent / "w.safetensors"), (f / UNET).symlink_to(f.parent / "w.safetensors")),
        ModelPathError,
        "leads out of the model folder",
    ),
    "folder link out": (
        lambda f: (shutil.move(f / "vae", f.parent / "vae"), (f / "vae").symlink_to(f.parent / "vae")),
        ModelPathError,
        "leads out of the model folder",
    ),
    "link loop": (
        lambda f: ((f / "unet/config.json").unlink(), (f / "unet/config.json").symlink_to("config.json")),
        ModelPathError,
        "config.json",
    ),
    "weights are a pipe": (lambda f: ((f / UNET).unlink(), os.mkfifo(f / UNET)), ModelFormatError, "regular file"),
    "vocabulary missing": (lambda f: (f / "tokenizer/vocab.txt").unlink(), ModelPathError, "tokenizer"),
    "widths that do not fit": (
        lambda f: shutil.rmtree(f / "text_encoder") or _wider_text_encoder(f),
        ModelConfigError,
        "must be equal for text-to-image, got 16 and 24",
    ),
    "windows too long": (
        lambda f: edit(f / "tokenizer/tokenizer_config.json", model_max_length=99),
        ModelConfigError,
        "windows of 99 tokens exceed",
    ),
}


def _wider_text_encoder(folder: Path) -> None:
    from latentdiff.models.bert import BertConfig, BertModel
    from tests.models.tiny import BERT

    save_model(BertModel(BertConfig.from_dict({**BERT, "hidden_size": 24})), folder / "text_encoder")


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders_are_refused(model_folder: Path, name: str) -> None:
    damage, error, message = DAMAGE[name]
    damage(model_folder)
    with pytest.raises(error, match=message) as caught:
        load_pipeline(model_folder)
    assert isinstance(caught.value, ModelLoadError)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize(
    "file",
    ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", "..", "c:x.safetensors", "x.bin", 3, "\0.safetensors"],
)
def test_an_index_names_plain_files_only(model_folder: Path, file: Any) -> None:
    (model_folder / UNET).unlink()
    index = model_folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": file}}))
    with pytest.raises(ModelPathError, match="plain file name"):
        load_pipeline(model_folder)


def test_missing_shards_and_wrong_indices(model_folder: Path) -> None:
    index = model_folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    (model_folder / UNET).rename(model_folder / "unet" / "one.safetensors")
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "two.safetensors"}}))
    with pytest.raises(ModelPathError, match="names this shard"):
        load_pipeline(model_folder)
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "one.safetensors"}}))
    with pytest.raises(ModelMismatchError, match=r"is not expected.*by the index"):
        load_pipeline(model_folder)
    index.write_text(json.dumps({"weight_map": []}))
    with pytest.raises(ModelFormatError, match="weight_map"):
        load_pipeline(model_folder)


def test_inspection_reads_no_weights(built_model: Path) -> None:
    described = describe_folder(built_model)
    assert described["family"] == "latentdiff"
    assert described["prediction_type"] == "v_prediction"
    assert described["image_size"] == 32
    assert described["precision"] == "F32"
    assert described["bytes"] == 4 * described["parameters"]
    assert described["components"]["unet"]["class"] == "UNet2DConditionModel"
    file = describe_file(built_model / UNET)
    assert file["parameters"] == described["components"]["unet"]["parameters"]
    assert file["metadata"] == {"format": "pt"}


def test_a_vocabulary_larger_than_the_text_encoder_is_refused(model_folder: Path) -> None:
    words = model_folder / "tokenizer" / "vocab.txt"
    more = "".join(f"word{number}\n" for number in range(300))
    words.write_text(words.read_text(encoding="utf-8") + more, encoding="utf-8")
    with pytest.raises(ModelConfigError, match=r"the tokenizer has .* tokens, its text encoder 256"):
        load_pipeline(model_folder)

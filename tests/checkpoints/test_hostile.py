"""Folders that ask for too much, and tokenizers that fail when they are used: refused, and quickly."""

from __future__ import annotations

import base64
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from latentdiff import Pipeline
from latentdiff.checkpoints import load_pipeline, load_text_encoder, save_pipeline
from latentdiff.checkpoints.inspect import describe_folder
from latentdiff.errors import ModelConfigError, ModelFormatError, ModelLoadError
from latentdiff.models.tokenizer import Tokenizer
from latentdiff.models.tokenizer_rules import CLIP_WORDS
from tests.models.tiny import write_bert_vocabulary

LEVELS = 30_000
DEEP: dict[str, tuple[str, dict[str, Any]]] = {
    "unet": (
        "unet",
        {
            "block_out_channels": [64] * LEVELS,
            "down_block_types": ["DownBlock2D"] * LEVELS,
            "up_block_types": ["UpBlock2D"] * LEVELS,
        },
    ),
    "vae": ("vae", {"block_out_channels": [64] * LEVELS}),
    "layers": ("unet", {"layers_per_block": [10_000, 10_000]}),
    "layers of each": ("vae", {"layers_per_block": 60}),
}


@pytest.mark.parametrize("case", list(DEEP))
def test_more_layers_than_weights_are_never_built(model_folder: Path, case: str) -> None:
    component, change = DEEP[case]
    path = model_folder / component / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    started = time.process_time()
    with pytest.raises(ModelLoadError, match=r"resolutions, expected at most 16|implies .* layers or more"):
        load_pipeline(model_folder)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("size", [2048, [16], [16, 16, 16], [], [4, 100_000], 0.5, -8])
def test_sizes_that_cannot_be_drawn(model_folder: Path, size: Any) -> None:
    path = model_folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": size}))
    with pytest.raises(ModelConfigError, match="sample_size"):
        load_pipeline(model_folder)


def test_a_file_that_is_cut_while_its_weights_are_used(pipe: Pipeline, tmp_path: Path) -> None:
    """Not the end of the process; the weights are those that were loaded."""
    save_pipeline(pipe.components, tmp_path / "model", None)
    loaded = Pipeline.from_pretrained(tmp_path / "model", device="cpu")
    for file in (tmp_path / "model").rglob("*.safetensors"):
        file.write_bytes(b"\xff" * 100)
        os.truncate(file, 0)
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    assert torch.equal(loaded("cat", **options).images, pipe("cat", **options).images)


def rules(**changes: Any) -> dict[str, bytes]:
    """The files of a tokenizer with a tokenizer.json."""
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fox"]
    model |= {"max_input_chars_per_word": 100, "vocab": {word: number for number, word in enumerate(words)}}
    tree = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None}
    tree |= {
        "normalizer": None,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": None,
        "model": model,
        **changes,
    }
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 8}
    return {"tokenizer.json": json.dumps(tree).encode(), "tokenizer_config.json": json.dumps(settings).encode()}


def replaced(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def precompiled(table: object) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": table}


def split(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Removed", "invert": False}


MODEL = json.loads(rules()["tokenizer.json"])["model"]
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no unknown": (
        {"model": {**MODEL, "vocab": {word: n for word, n in MODEL["vocab"].items() if word != "[UNK]"}}},
        "has no readable vocabulary",
    ),
    **{
        f"precompiled {str(text)[:9]}": ({"normalizer": precompiled(text)}, "no readable table in its rule Precompiled")
        for text in ("AAAA", "", "/w" * 5000, "BAAAAAAAAAD/", "#", None, 7)
    },
    "repeated group": ({"pre_tokenizer": split("(a|a)*$")}, "may match without end"),
    "repeated in another": ({"normalizer": {"type": "Sequence", "normalizers": [split("(.*a){25}")]}}, "without end"),
    "long expression": ({"pre_tokenizer": split("a?" * 600)}, "may match without end"),
    "growing": ({"normalizer": {"type": "Sequence", "normalizers": [replaced("a", "aa")] * 3}}, "insert text"),
    "many": ({"normalizer": {"type": "Sequence", "normalizers": [replaced("", "a")] * 30}}, "insert text"),
    "prepended": ({"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}}, "insert text"),
    "other": ({"pre_tokenizer": {"type": "FixedLength", "length": 1}}, "the rule FixedLength"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_tokenizers_that_would_fail_are_refused(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    changes, message = BROKEN[case]
    with pytest.raises((ModelFormatError, ModelConfigError), match=message):
        Tokenizer(rules(**changes))
    assert len(Tokenizer(rules())) == 7
    assert capfd.readouterr().err == ""  # where the library's panics are told


@pytest.mark.parametrize("expression", [CLIP_WORDS, r"\s+", r" {2,}", r"[()*+]+", r"\)+", r"(?:a|b)c*"])
def test_expressions_of_usual_tokenizers_are_taken(expression: str) -> None:
    assert len(Tokenizer(rules(pre_tokenizer=split(expression)))) == 7


def test_a_table_of_replacements_is_taken() -> None:
    """An empty trie, whose one unit leads nowhere, and no replacements."""
    table = base64.b64encode((1024).to_bytes(4, "little") + bytes(1024)).decode()
    assert Tokenizer(rules(normalizer=precompiled(table)))(["fox"]).counts == [3]


def test_expressions_that_do_not_end_are_errors_of_the_model() -> None:
    slow = Tokenizer(rules(pre_tokenizer=split("a*" * 12 + "$")))
    with pytest.raises(ModelFormatError, match="cannot take this prompt apart"):
        slow(["a" * 40 + "b"])


@pytest.mark.parametrize("case", ["a line twice", "a number beyond"])
def test_numbers_beyond_the_table_of_the_text_encoder(model_folder: Path, case: str) -> None:
    folder = model_folder / "tokenizer"
    if case == "a line twice":
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        filler = [lines[-1]] * (300 - len(lines))
        (folder / "vocab.txt").write_text("\n".join([*lines, *filler, "end"]), encoding="utf-8")
    else:
        for name, content in rules(model={**MODEL, "vocab": {**MODEL["vocab"], "fox": 40_000}}).items():
            (folder / name).write_bytes(content)
    with pytest.raises(ModelConfigError, match=r"the tokenizer has .* tokens, its text encoder 256"):
        load_pipeline(model_folder)


def test_a_window_that_is_not_named_is_the_text_encoders(model_folder: Path, tmp_path: Path) -> None:
    """transformers writes 1e30 where a tokenizer has none."""
    write_bert_vocabulary(model_folder / "tokenizer", window=int(1e30))
    loaded = load_pipeline(model_folder)
    assert loaded.tokenizer is not None and loaded.tokenizer.model_max_length == 12
    save_pipeline(loaded, tmp_path / "again")
    assert load_pipeline(tmp_path / "again").tokenizer.model_max_length == 12  # type: ignore[union-attr]


@pytest.mark.parametrize("variant", ["bf16", "fp32", "ema", "non_ema"])
def test_weights_of_a_variant_alone(model_folder: Path, variant: str) -> None:
    for file in model_folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(f".{variant}.safetensors"))
    assert load_pipeline(model_folder).unet is not None


@pytest.mark.parametrize("call", ["exists", "read_bytes", "iterdir", "read_text", "open"])
def test_what_may_not_be_read_is_said(model_folder: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Whichever look at the folder comes first; a process with all rights cannot be shown a closed one."""
    (model_folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()  # so that all are made
    really: Any = getattr(Path, call)

    def closed(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.is_relative_to(model_folder / "unet") or call in ("read_bytes", "iterdir"):
            raise PermissionError(13, "Permission denied", str(self))
        return really(self, *arguments, **options)

    monkeypatch.setattr(Path, call, closed)
    for load in (load_pipeline, load_text_encoder, describe_folder):
        if load is not load_text_encoder or call == "read_bytes":
            with pytest.raises(ModelLoadError, match=r"cannot be read|expected diffusion_pytorch_model"):
                load(model_folder)


def test_entries_that_mean_nothing(model_folder: Path) -> None:
    for name, entry in (
        ("vae/config.json", {"shift_factor": 0.0}),
        ("scheduler/scheduler_config.json", {"trained_betas": []}),
    ):
        path = model_folder / name
        path.write_text("\ufeff" + json.dumps({**json.loads(path.read_text()), **entry}), encoding="utf-8")
    assert load_pipeline(model_folder).unet is not None


def test_a_prefix_that_is_in_the_way_is_named(tmp_path: Path) -> None:
    for prefix in ("state_dict.", "module."):
        save_file({f"{prefix}model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}, tmp_path / "a.safetensors")
        with pytest.raises(ModelConfigError, match=f"begin with '{prefix}', which is in the way"):
            load_pipeline(tmp_path / "a.safetensors")

"""LoRAs in prompts: which tags there are, and which file of a folder each means."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentdiff.errors import InputError
from latentdiff.lora_tags import Weight, lora_files, take_loras


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files by the names `style`, `fox`, `toys/style` and `a.b`; nothing in them is read here."""
    for name in ("style.safetensors", "toys/fox.safetensors", "toys/style.safetensors", "a.b.safetensors", "c.ckpt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_names_are_those_of_files(folder: Path) -> None:
    found = {name: file.relative_to(folder).as_posix() for name, file in lora_files(folder).items()}
    assert found == {
        "style": "style.safetensors",
        "a.b": "a.b.safetensors",
        "fox": "toys/fox.safetensors",
        "toys/style": "toys/style.safetensors",
    }


@pytest.mark.parametrize(
    ("prompt", "plain", "loras"),
    [
        ("a red fox", "a red fox", {}),
        ("a red fox <lora:style:0.8>", "a red fox", {"style.safetensors": 0.8}),
        ("<LoRA: style >a fox", "a fox", {"style.safetensors": 1.0}),
        ("a <lyco:fox:-1>fox", "a fox", {"toys/fox.safetensors": -1.0}),
        ("fox <lora:style:0.5:1>", "fox", {"style.safetensors": (1.0, 0.5)}),  # text encoders come first there
        ("fox<lora:toys/style:1><lora:style:2>", "fox", {"toys/style.safetensors": 1.0, "style.safetensors": 2.0}),
        ("a <b> fox (<3:1.2)", "a <b> fox (<3:1.2)", {}),
    ],
)
def test_tags_are_taken_out(folder: Path, prompt: str, plain: str, loras: dict[str, Weight]) -> None:
    assert take_loras([prompt], folder) == ([plain], {folder / name: weight for name, weight in loras.items()})


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("fox <lora:stile:1>", "no LoRA 'stile' in the folder; did you mean 'style'"),
        ("fox <lora:/etc/passwd:1>", "no LoRA '/etc/passwd'"),
        ("fox <lora:../style:1>", "no LoRA '../style'"),
        ("fox <lora::1>", "must be a name"),
        ("fox <lora:style:much>", "maybe its weight"),
        ("fox <lora:style:te=1:unet=2>", "maybe its weight"),
        ("fox <lora:style:1:1:1>", "maybe its weight"),
        ("fox <lora:style:1> <lora:style:1>", "once"),
    ],
)
def test_others_are_refused(folder: Path, prompt: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        take_loras([prompt], folder)


def test_prompts_that_are_drawn_together_name_the_same_ones(folder: Path) -> None:
    prompts = ["a fox <lora:fox:1><lora:style:1>", "<lora:style:1> a cat <lora:fox:1>"]
    assert take_loras(prompts, folder)[0] == ["a fox", "a cat"]
    with pytest.raises(InputError, match="must name the same LoRAs"):
        take_loras(["a fox <lora:fox:1>", "a cat"], folder)


def test_a_folder_is_looked_at_where_a_prompt_names_something(tmp_path: Path) -> None:
    assert take_loras(["fox"], tmp_path / "none") == (["fox"], {})
    with pytest.raises(InputError, match="must be in a folder"):
        take_loras(["fox <lora:style:1>"], tmp_path / "none")


def test_a_long_prompt_of_half_tags_is_read_at_once(folder: Path) -> None:
    prompt = "<lora:" * 100_000 + ":" * 100_000
    assert take_loras([prompt], folder) == ([prompt], {})

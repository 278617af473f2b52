"""LoRAs in a pipeline and on the command line: drawn with, recorded, replayed, taken out."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from latentdiff import Pipeline
from latentdiff.checkpoints import load_pipeline
from latentdiff.checkpoints.lora import save_lora
from latentdiff.cli import main
from latentdiff.generation.result import read_record
from latentdiff.images import read_texts
from latentdiff.models.lora import LoRA
from tests.checkpoints.test_lora import lora_of

SETTINGS: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipe: Pipeline, built_model: Path) -> Path:
    """A folder with the tiny model, by which records name it, and two LoRA files for it."""
    monkeypatch.chdir(tmp_path)
    Path(built_model.name).symlink_to(built_model)
    for seed, name in enumerate(("style.safetensors", "fox.safetensors")):
        save_lora(lora_of(pipe.components, seed=seed), name, pipe.components, ("diffusers", "kohya")[seed])
    return tmp_path


@pytest.fixture
def draw(built_model: Path) -> Any:
    return lambda *arguments: main(["generate", "cat", "--model", str(built_model), "--steps", "2", *arguments])


def test_they_change_pictures_and_go_again(pipe: Pipeline) -> None:
    plain = pipe("a red fox", **SETTINGS).images
    styled = pipe.with_loras({"style.safetensors": 0.2, Path("fox.safetensors"): (0.1, 0.4)})
    assert not torch.allclose(styled("a red fox", **SETTINGS).images, plain, atol=1e-3)
    assert torch.equal(pipe("a red fox", **SETTINGS).images, plain)
    assert torch.equal(styled.with_loras({})("a red fox", **SETTINGS).images, plain)


def test_threads_may_draw_with_and_without(pipe: Pipeline) -> None:
    def drawn(weight: float) -> torch.Tensor:
        images: torch.Tensor = pipe.with_loras({"style.safetensors": weight})("fox", **SETTINGS).images
        return images

    weights = (0.0, 0.1, 0.2, 0.3) * 2
    alone = [drawn(weight) for weight in weights]
    with ThreadPoolExecutor(4) as threads:
        assert all(torch.equal(*pair) for pair in zip(alone, threads.map(drawn, weights)))


def test_the_record_names_them(pipe: Pipeline) -> None:
    styled = pipe.with_loras({"style.safetensors": 0.2, "fox.safetensors": (1, 0)})
    first, second = styled("fox", **SETTINGS).settings["loras"]
    assert first["path"] == "style.safetensors" and len(first["hash"]) == 64 and first["weight"] == 0.2
    assert second["weight"] == [1.0, 0.0] and second["hash"] != first["hash"]
    assert pipe("fox", **SETTINGS).settings["loras"] == []


def test_command_line(draw: Any, capsys: pytest.CaptureFixture[str]) -> None:
    loras = ["--lora", "style.safetensors:0.2", "--lora", "fox.safetensors:0.3,0.1"]
    assert draw("-o", "a.png", *loras) == draw("-o", "plain.png") == 0
    assert [lora["weight"] for lora in read_record("a.png")["loras"]] == [0.2, [0.3, 0.1]]
    assert 'LoRA: "style.safetensors 0.2; fox.safetensors [0.3, 0.1]"' in read_texts("a.png")["parameters"]
    assert Path("a.png").read_bytes() != Path("plain.png").read_bytes()
    capsys.readouterr()
    assert main(["replay", "a.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"] is True
    assert Path("a-replay.png").read_bytes() == Path("a.png").read_bytes()


def test_replay_refuses_another_file(draw: Any, pipe: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw("-o", "a.png", "--lora", "style.safetensors") == 0
    save_lora(lora_of(pipe.components, seed=5), "style.safetensors", pipe.components)
    assert main(["replay", "a.png"]) == 2
    message = "style.safetensors is no longer the LoRA this picture was made with; restore it, or add --force"
    assert message in capsys.readouterr().err
    assert main(["replay", "a.png", "--force", "-o", "b.png"]) == 0
    assert "the pixels differ" in capsys.readouterr().err
    Path("style.safetensors").unlink()
    assert main(["replay", "a.png"]) == 3


def test_replay_finds_what_was_moved_and_renamed(
    draw: Any, built_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Records hold no folders, so nothing private; and files are told apart by what is in them."""
    Image.new("RGB", (32, 32), "red").save("start.png")
    paths = [str(Path(name).absolute()) for name in ("style.safetensors", "fox.safetensors", "start.png")]
    call = ["--lora", f"{paths[0]}:0.2", "--lora", f"{paths[1]}:0.1", "--image", paths[2]]
    assert draw("-o", "a.png", *call) == 0
    assert str(tmp_path).encode() not in Path("a.png").read_bytes()
    here, there = Path.cwd(), tmp_path / "there"
    there.mkdir()
    for name in ("style.safetensors", "fox.safetensors", "start.png", "a.png"):
        (here / name).rename(there / f"new-{name}")
    monkeypatch.chdir(there)
    capsys.readouterr()
    replay = ["replay", "new-a.png", "--model", str(built_model)]
    assert main(replay) in (2, 3) and capsys.readouterr().err.count("\n") == 1
    moved = ["--lora", "new-fox.safetensors", "--lora", "new-style.safetensors", "--image", "new-start.png"]
    assert main([*replay, *moved, "-o", "b.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"] is True


def test_pictures_with_a_lora_in_memory_cannot_be_replayed(pipe: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    lora: LoRA = lora_of(pipe.components)
    pipe.with_loras({lora: 0.1})("fox", num_inference_steps=2).save("a.png")
    assert main(["replay", "a.png"]) == 2
    assert "drawn with a LoRA in memory, which no file keeps; draw it in Python" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("none.safetensors", "--lora names 'none.safetensors', and there is no such file; check the path"),
        ("none.safetensors:0.8", "--lora names 'none.safetensors', and there is no such file; check the path"),
        ("style.safetensors:x", "--lora must be a file and maybe its weight, once, got 'style.safetensors:x'; try"),
        ("style.safetensors:1,2,3", "--lora must be a file and maybe its weight, once, got"),
        (":0.5", "--lora names ':0.5', and there is no such file; check the path"),
    ],
)
def test_bad_options(draw: Any, lora: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw("--lora", lora) == 2
    assert message in capsys.readouterr().err
    assert draw("--lora", "style.safetensors:nan") == 2
    assert "the weight of a LoRA must be a finite number" in capsys.readouterr().err


def test_pickles_are_refused(draw: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("style.safetensors").write_bytes(b"PK\x03\x04" + bytes(600))
    assert draw("--lora", "style.safetensors") == 3
    assert "expected safetensors, got a zip archive" in capsys.readouterr().err


def test_convert_writes_a_model_that_has_them(built_model: Path, pipe: Pipeline) -> None:
    options = ["--dtype", "float32", "--lora", "style.safetensors:0.2"]
    assert main(["convert", str(built_model), "merged", *options]) == 0
    found, merged = load_pipeline("merged"), pipe.with_loras({"style.safetensors": 0.2}).components
    for one, other in ((found.unet, merged.unet), (found.text_encoder, merged.text_encoder)):
        assert one is not None and other is not None
        weights = other.state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in one.state_dict().items())
    assert found.loras == ()


def test_prompts_name_those_of_a_folder(draw: Any, workplace: Path) -> None:
    assert draw("-o", "given.png", "--lora", "style.safetensors:0.2", "--lora", "fox.safetensors:0.1,0.4") == 0
    named = ["generate", "cat <lora:style:0.2><lora:fox:0.4:0.1>", "--lora-dir", ".", "--model", "tiny", "--steps", "2"]
    assert main([*named, "-o", "named.png"]) == 0
    records = [read_record(name) for name in ("given.png", "named.png")]
    assert records[0]["prompt"] == records[1]["prompt"] == "cat" and records[0]["loras"] == records[1]["loras"]
    assert Image.open("given.png").tobytes() == Image.open("named.png").tobytes()
    assert main(["replay", "named.png", "-o", "again.png"]) == 0


def test_a_lora_is_given_once(capsys: pytest.CaptureFixture[str]) -> None:
    twice = ["--lora-dir", ".", "--lora", "style.safetensors"]
    assert main(["generate", "cat <lora:style:0.2>", "--model", "tiny", *twice]) == 2
    assert "must be given once" in capsys.readouterr().err

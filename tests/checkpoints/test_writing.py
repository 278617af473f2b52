"""Models written over others: what is not of the model stays, links are followed, nothing is left half-way."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from latentdiff import Pipeline
from latentdiff.checkpoints import load_pipeline, save_model, save_pipeline, storage
from latentdiff.checkpoints.storage import replace_folder, save_tensors, write_json
from latentdiff.cli import main
from latentdiff.errors import InputError, StorageError

INDEX = "model_index.json"


def put_beside(folder: Path) -> dict[Path, str]:
    """Files in a model folder that are of no model, by what they hold; one is a link."""
    names = (".git/HEAD", "my_pictures/holiday.png", "safety_checker/model.safetensors", "unet/extra/notes.txt")
    kept = {folder / name: name for name in (*names, "README.md", "unet/loss.csv", ".gitattributes")}
    for path, text in kept.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "vae" / "link").symlink_to("/nowhere")
    return kept


def test_what_is_not_of_the_model_stays(pipe: Pipeline, model_folder: Path) -> None:
    kept = put_beside(model_folder)
    stale = [
        model_folder / name for name in ("unet/model.fp16.safetensors", "unet/old.bin", "vae/x.safetensors.index.json")
    ]
    for path in stale:
        path.write_text("old")
    save_pipeline(pipe.components, model_folder)
    assert {path: path.read_text() for path in kept} == kept
    assert os.readlink(model_folder / "vae" / "link") == "/nowhere"
    assert not any(path.exists() for path in stale)
    assert load_pipeline(model_folder).unet is not None
    assert not list(model_folder.parent.rglob(".tmp-*"))


def test_components_of_the_older_model_go(pipe: Pipeline, model_folder: Path) -> None:
    index = json.loads((model_folder / INDEX).read_text())
    index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
    write_json(model_folder / INDEX, index)
    for name in ("text_encoder_2", "tokenizer_2"):  # the second is named by no index
        (model_folder / name).mkdir()
        (model_folder / name / "config.json").write_text("{}")
    save_pipeline(pipe.components, model_folder)
    assert not (model_folder / "text_encoder_2").exists() and (model_folder / "tokenizer_2").exists()


def test_one_network_replaces_its_files_alone(pipe: Pipeline, built_model: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("config.json", "diffusion_pytorch_model.bin", "notes.txt"):
        (tmp_path / name).write_text("{}")
    save_model(pipe.autoencoder, tmp_path)
    expected = ["config.json", "diffusion_pytorch_model.safetensors", "notes.txt", "sub"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == expected


def test_links_are_followed(
    pipe: Pipeline, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_pipeline(model_folder).model_hash
    alias, file = tmp_path / "alias", tmp_path / "file.safetensors"
    alias.symlink_to(model_folder)
    save_pipeline(pipe.components, alias, torch.float16)
    assert alias.is_symlink() and load_pipeline(model_folder).model_hash != before
    file.symlink_to("real.safetensors")
    save_tensors({"a": torch.zeros(1)}, file)
    assert file.is_symlink() and (tmp_path / "real.safetensors").is_file()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StorageError):
        save_pipeline(pipe.components, tmp_path / "loop")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    save_pipeline(pipe.components, ".")
    assert Path.cwd() == here and (here / INDEX).is_file() and os.path.samefile(here, ".")
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("number", range(0, 20, 4))
def test_a_write_that_is_stopped_leaves_all_as_it_was(
    pipe: Pipeline, model_folder: Path, monkeypatch: pytest.MonkeyPatch, stop: Any, number: int
) -> None:
    """At any of the moves: the exchange of the components among them."""
    kept, before, calls = put_beside(model_folder), load_pipeline(model_folder).model_hash, 0
    really = os.replace

    def replace(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number + 1:
            raise stop
        really(source, target)

    monkeypatch.setattr(os, "replace", replace)
    try:
        save_pipeline(pipe.components, model_folder, torch.float16)
    except (KeyboardInterrupt, StorageError):
        monkeypatch.undo()
        assert load_pipeline(model_folder).model_hash == before
    else:
        assert number > 12
    assert {path: path.read_text() for path in kept} == kept
    assert not list(model_folder.parent.rglob(".tmp-*"))


def test_an_interrupt_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "flush_to_disk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_tensors({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def write_model(place: Path) -> None:
    for name in ("unet", "vae"):
        (place / name).mkdir()
        (place / name / "config.json").write_text("new")
    (place / INDEX).write_text('{"unet": 1, "vae": 1}')


def killed(folder: Path, moves: int) -> None:
    """Replace a model in a process that is killed after some moves of files."""
    really = os.replace

    def replace(source: Path, target: Path) -> None:
        nonlocal moves
        moves -= 1
        if moves < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        really(source, target)

    process = os.fork()
    if not process:
        os.replace = replace  # type: ignore[assignment]
        try:
            replace_folder(folder, INDEX, write_model)
        finally:
            os._exit(0)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


@pytest.mark.parametrize("moves", [0, 1, 3, 4, 5])
def test_what_a_killed_process_leaves_is_removed_by_the_next(tmp_path: Path, moves: int) -> None:
    folder = tmp_path / "model"
    for name in ("unet", "vae", "mine"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("old")
    (folder / INDEX).write_text('{"unet": 1, "vae": 1}')
    killed(folder, moves)
    assert len(list(tmp_path.rglob(".tmp-*"))) == 1
    if (folder / INDEX).exists():  # whole, of one model
        assert {(folder / name / "config.json").read_text() for name in ("unet", "vae")} == {"old"}
    replace_folder(folder, INDEX, write_model)
    assert not list(tmp_path.rglob(".tmp-*"))
    assert {(folder / name / "config.json").read_text() for name in ("unet", "vae")} == {"new"}
    assert (folder / "mine" / "config.json").read_text() == "old"


def test_the_folder_of_a_process_that_is_writing_stays(tmp_path: Path) -> None:
    def write(place: Path) -> None:
        write_json(place / INDEX, {})
        replace_folder(tmp_path / "model", INDEX, lambda other: write_json(other / INDEX, {"second": 1}))
        assert place.is_dir()

    with pytest.raises(StorageError, match="model"):  # which is there by now
        replace_folder(tmp_path / "model", INDEX, write)
    assert json.loads((tmp_path / "model" / INDEX).read_text()) == {"second": 1}


def test_a_full_disk_is_exit_code_4(built_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        assert main(["convert", str(built_model), str(tmp_path / "new")]) == 4
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert "cannot write" in error and "free space" in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "d" * 5000])
def test_names_that_no_system_takes(pipe: Pipeline, tmp_path: Path, name: str) -> None:
    with pytest.raises((InputError, StorageError), match="without NUL" if "\0" in name else "cannot write"):
        save_pipeline(pipe.components, tmp_path / name)
    with pytest.raises(StorageError, match="cannot write"):
        save_tensors({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")


def test_no_path_at_all(pipe: Pipeline) -> None:
    for nothing in (None, 3, b"folder"):
        with pytest.raises(InputError, match="must be given by its path"):
            save_pipeline(pipe.components, nothing)  # type: ignore[arg-type]


def test_a_long_name_is_no_hindrance(tmp_path: Path) -> None:
    save_tensors({"a": torch.zeros(1)}, tmp_path / f"{'a' * 243}.safetensors")
    replace_folder(tmp_path / ("b" * 255), INDEX, lambda place: write_json(place / INDEX, {}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="no saved model"):
        replace_folder(tmp_path / "mine", INDEX, lambda place: None)

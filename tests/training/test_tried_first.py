"""What could only fail later is tried first, and what fails beside the training does not end it."""

from __future__ import annotations

import shlex
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from latentdiff.training.config import load_config, parse_config
from latentdiff.training.data import prior_images
from latentdiff.training.data.dataset import read_captions
from latentdiff.training.loop.checkpointing import checkpoint_folders
from latentdiff.training.loop.run import locked
from latentdiff.training.monitor import export, samples

from latentdiff.commands.train import check as cli_check
from latentdiff.commands.train import train as cli_train
from latentdiff.errors import InputError, StorageError
from latentdiff.images import open_stored
from latentdiff.marks import GENERATED, source_type_of
from latentdiff.training import setup
from latentdiff.training import train_diffusion as stage
from tests.training.test_objective import recipe
from tests.training.test_stages import pictures


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe of four steps in pixels, with a class for each letter."""
    monkeypatch.setattr(export, "show_process", lambda *_: None)
    pictures(tmp_path / "pictures", 6)
    return recipe(tmp_path)


def no_data(*_: Any, **__: Any) -> Any:
    raise AssertionError("the data were opened")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["prompts=[z]"], "one of which must be the prompt, got 'z'"),
        (["prompts=['']"], "must not be empty"),
        (["model.norm_num_groups=7"], "model: "),
        (["model.attention_head_dim=5"], "model: "),
        (["model.cross_attention_dim=5"], "model.cross_attention_dim must be 6, that of the text encoder, got 5"),
        (["model.block_out_channels=[16384, 16384]"], "take at least"),
    ],
)
def test_a_run_that_would_fail_later_does_not_begin(
    file: str, changes: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentdiff.training.setup.open_images", no_data)
    monkeypatch.setattr("latentdiff.training.loop.resources.memory_of", lambda device: 2**30)
    for attempt in (lambda: cli_train(file, changes, False, None), lambda: cli_check(file, changes, None)):
        with pytest.raises(InputError) as caught:
            attempt()
        assert message in str(caught.value)


@pytest.mark.parametrize("key", ["autoencoder", "text_encoder"])
def test_parts_that_are_not_there_are_told_of_before_the_data_are_opened(
    file: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "open_images", no_data)
    message = f"{key}: there is no folder 'runs/none'; train it first, or choose embedded"
    for call in (lambda *given: cli_train(*given, False, None), lambda *given: cli_check(*given, None)):
        with pytest.raises(InputError, match=message):
            call(file, [f"{key}=runs/none"])


def test_what_is_in_the_place_of_the_model_is_found_first(file: str, tmp_path: Path) -> None:
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="model holds something that is no saved model; move it"):
        cli_train(file, [], False, None)
    with pytest.raises(InputError, match="model holds something that is no saved model; move it"):
        cli_check(file, [], None)
    assert not (tmp_path / "run/config.yaml").exists()


def test_a_recipe_in_the_run_folder_is_not_written_over(file: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine/config.yaml"
    mine.parent.mkdir()
    text = f"# My own.\n{Path(file).read_text()}"
    mine.write_text(text)
    with pytest.raises(InputError, match=r"config\.yaml was not written by a run"):
        cli_train(str(mine), [], False, str(mine.parent))
    assert mine.read_text() == text
    cli_train(str(mine), ["run.steps=1"], False, str(tmp_path / "run"))
    written = tmp_path / "run/config.yaml"
    cli_train(str(written), ["run.steps=2"], True, str(tmp_path / "run"))  # a resolved one can be gone on with
    assert load_config(written).run.steps == 2


def test_grids_that_cannot_be_drawn_are_told_of_once_and_cost_no_step(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at: list[list[str]] = []

    def fail(*_: Any) -> None:
        at.append([folder.name for folder in checkpoint_folders(tmp_path / "run")])
        raise StorageError("no space left")

    monkeypatch.setattr(stage, "draw_samples", fail)
    cli_train(file, ["run.sample_every=2"], False, None)
    said = capsys.readouterr().err
    assert said.count("samples could not be drawn (StorageError: no space left); training goes on without") == 1
    assert [names[0] for names in at] == ["step-00000002", "step-00000004"]  # saved before
    assert (tmp_path / "run/model/model_index.json").is_file()


def test_a_test_split_that_cannot_be_opened_costs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is first opened when the training is over, to show what was learnt."""
    pictures(tmp_path / "pictures", 6)
    (tmp_path / "pictures/test").mkdir()
    cli_train(recipe(tmp_path), ["run.steps=1"], False, None)
    captured = capsys.readouterr()
    assert "samples could not be drawn (InputError: " in captured.err and "/test has neither " in captured.err
    assert (tmp_path / "run/model/model_index.json").is_file() and "bits per dimension: " in captured.out


def test_sample_prompts_are_encoded_as_captions_are(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets, which a prompt on the command line has for weights, are part of the class's name."""
    for metadata in (tmp_path / "pictures").glob("metadata.jsonl"):
        metadata.write_text(metadata.read_text().replace('"a"', '"clock (10:30)"'))
    drawn: list[torch.Tensor] = []
    save = samples.save_grid

    def keep(images: Any, *rest: Any, **more: Any) -> None:
        drawn.append(images)
        save(images, *rest, **more)

    monkeypatch.setattr(samples, "save_grid", keep)
    cli_train(file, ["prompts=['clock (10:30)', b]"], False, None)
    assert drawn and all(images.isfinite().all() for images in drawn)


def test_two_runs_in_one_folder_are_told_of_each_other(file: str, tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(InputError, match="is being trained in by another process"):
        cli_train(file, [], False, None)
    cli_train(file, ["run.steps=1"], False, None)
    with locked(tmp_path / "run"), pytest.raises(InputError, match="is being trained in by another process"):
        cli_train(file, [], True, None)


def test_a_run_may_be_in_a_thread_and_leaves_the_process_as_it_was(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    thread = threading.Thread(target=cli_train, args=(file, [], False, None))
    thread.start()
    thread.join()
    assert (tmp_path / "run/model").is_dir()
    assert "training in a thread" in capsys.readouterr().err
    assert torch.equal(torch.get_rng_state(), state)


def test_a_finished_run_is_not_shown_again(
    file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    monkeypatch.setattr(export, "show_process", lambda *_: shown.append(1))
    cli_train(file, [], False, None)
    cli_train(file, [], True, None)
    assert shown == [1]
    assert "latentdiff evaluate " in capsys.readouterr().out


def test_prompts_may_change_when_a_run_goes_on(file: str, tmp_path: Path) -> None:
    cli_train(file, ["run.steps=1"], False, None)
    cli_train(file, ["run.steps=2", "prompts=[c]"], True, None)
    assert source_type_of(open_stored(tmp_path / "run/samples/00000002.png")) == GENERATED


def test_commands_to_try_can_be_pasted(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "my run (1)"
    cli_train(file, ["run.steps=1", "prompts=[a]"], False, str(run))
    commands = [
        line.partition("latentdiff ")[2] for line in capsys.readouterr().out.splitlines() if "latentdiff " in line
    ]
    assert [shlex.split(command)[:4] for command in commands] == [
        ["generate", "a", "--model", str(run / "model")],
        ["evaluate", str(run / "model"), "--data", str(tmp_path / "pictures")],
    ]


def test_brackets_of_a_prior_are_plain_text_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pictures are drawn as their caption is trained."""
    asked: list[dict[str, Any]] = []

    class Picture:
        def write(self, number: int, path: Path) -> None:
            path.write_bytes(b"")

    def draw(prompt: str, **options: Any) -> Picture:
        asked.append({"prompt": prompt, **options})
        return Picture()

    monkeypatch.setattr(prior_images, "Pipeline", lambda components: draw)
    given = {"start_from": "m", "prior": {"prompt": "a clock (10:30)", "pictures": 2}, "data": {"folder": "p"}}
    run = {"out": "r", "steps": 1, "batch_size": 2}
    config: Any = parse_config({"stage": "diffusion", "prompts": ["a"], "run": run, **given})
    data = prior_images.draw_prior(config, None, tmp_path)  # type: ignore[arg-type]
    assert [(one["prompt"], one["prompt_weights"], one["seed"]) for one in asked] == [
        ("a clock (10:30)", False, 0),
        ("a clock (10:30)", False, 1),
    ]
    assert read_captions(data) == [["a clock (10:30)"]] * 2

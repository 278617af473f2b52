"""Commands with closed, full or narrow streams, and interrupted ones: one line, the exit codes of the contract."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentdiff import Pipeline
from latentdiff.cli import main
from latentdiff.generation import run as run_module
from latentdiff.generation.stages import Job

ROOT = Path(__file__).parents[2]
FULL = Path("/dev/full")


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a shell command in which `latentdiff` is this package's."""
    latentdiff = f'"{sys.executable}" -m latentdiff'
    return subprocess.run(
        command.replace("latentdiff", latentdiff, 1),
        shell=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        check=False,
    )


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
@pytest.mark.parametrize("command", ["plan --sampler ddim --steps 2", "--version", "--help"])
def test_a_full_output_is_said_and_ends_with_4(tmp_path: Path, command: str) -> None:
    done = shell(f"latentdiff {command} > /dev/full", tmp_path)
    assert done.returncode == 4
    assert (
        done.stderr.startswith(b"latentdiff: cannot write the output: No space left") and done.stderr.count(b"\n") == 1
    )


@pytest.mark.long
def test_closed_streams_lose_no_picture(built_model: Path, tmp_path: Path) -> None:
    for number, streams in enumerate((">&-", "2>&-", ">&- 2>&-")):
        done = shell(f"latentdiff generate fox --model {built_model} --steps 1 -o {number}.png {streams}", tmp_path)
        assert (done.returncode, done.stderr) == (0, b"") and (tmp_path / f"{number}.png").is_file()
    assert shell("latentdiff generate fox --steps 0 2>&-", tmp_path).returncode == 2
    if FULL.exists():
        assert shell("latentdiff generate fox --steps 0 2>/dev/full", tmp_path).returncode == 2


@pytest.mark.long
def test_names_that_a_stream_or_record_cannot_hold(built_model: Path, tmp_path: Path) -> None:
    narrow = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = shell(f"latentdiff generate fox --model {built_model} --steps 1 -o \u72d0.png", tmp_path, **narrow)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\u72d0.png\n", b"")
    os.symlink(built_model, os.fsencode(tmp_path) + b"/m\xff")
    done = shell("latentdiff generate fox --model $(printf 'm\\377') --steps 1 -o a.png", tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"model: m\\xff" in shell("latentdiff inspect a.png", tmp_path, **narrow).stdout.replace(b"udcff", b"xff")


def test_an_interrupt_keeps_what_is_done(
    built_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture is written when it is decoded: before the next batch is sampled."""
    monkeypatch.chdir(tmp_path)
    sample, seen = run_module.sample_stages, list[int]()

    def interrupted(job: Job, stages: Any, images: Any, on_step: Any) -> Any:
        seen.append(len(list(tmp_path.glob("*.png"))))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return sample(job, stages, images, on_step)

    monkeypatch.setattr(run_module, "sample_stages", interrupted)
    assert main(["generate", "fox", "--model", str(built_model), "--steps", "1", "-n", "20"]) == 130
    captured = capsys.readouterr()
    assert seen == [0, 4, 8]
    assert captured.err == "latentdiff: interrupted; 8 of 20 pictures are written\n"
    assert captured.out.split() == ["fox.png", *(f"fox-{number}.png" for number in range(2, 9))]


def test_pictures_are_let_go_of_as_they_are_made(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are asked for, the decoded numbers of one alone are held."""
    decode, held, most = run_module.decode_latents, list[Any](), [0]

    def noted(*given: Any) -> Any:
        most.append(sum(one() is not None for one in held))
        pixels = decode(*given)
        held.append(weakref.ref(pixels))
        return pixels

    monkeypatch.setattr(run_module, "decode_latents", noted)
    assert len(pipe("fox", num_images=9, num_inference_steps=1).images) == len(held) == 9
    assert max(most) <= 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_with_130_and_leave_nothing_half_written(
    built_model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    call = ["generate", "fox", "--model", str(built_model), "-n", "1000"]
    # Whoever starts the tests in the background may have told them to pass over Ctrl-C.
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import runpy; "
    command = [sys.executable, "-c", f"{heeding}runpy.run_module('latentdiff', run_name='__main__')", *call]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    while not list(tmp_path.glob("fox*.png")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"of 1000 pictures are written" in said and said.count(b"\n") == 1
    assert all(path.name.startswith("fox") for path in tmp_path.iterdir())
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as picture:
            picture.load()


def test_two_commands_at_once_never_take_the_same_name(
    built_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sample, other = run_module.sample_stages, Pipeline.from_pretrained(built_model, device="cpu")

    def meanwhile(job: Job, stages: Any, images: Any, on_step: Any) -> Any:
        other("owl", num_inference_steps=1).save("fox.png") if job.settings.prompt(0) == "fox" else None
        return sample(job, stages, images, on_step)

    monkeypatch.setattr(run_module, "sample_stages", meanwhile)
    assert main(["generate", "fox", "--model", str(built_model), "--steps", "1"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fox-2.png", "fox.png"]


def test_pictures_without_metadata_say_nothing(built_model: Path, tmp_path: Path) -> None:
    for flags, said in (((), True), (("--no-metadata",), False)):
        out = tmp_path / f"{said}.png"
        assert main(["generate", "fox", "--model", str(built_model), "--steps", "1", "-o", str(out), *flags]) == 0
        with Image.open(out) as picture:
            assert ("parameters" in picture.text, "latentdiff" in picture.text) == (said, said)  # type: ignore[attr-defined]
        assert str(built_model.parent).encode() not in out.read_bytes()

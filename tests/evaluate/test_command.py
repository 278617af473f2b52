"""`latentdiff evaluate`: reports, their folders, pictures of others, comparison, sweeps, and what is refused."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentdiff.cli import main
from latentdiff.commands import evaluate as command
from latentdiff.commands.shared import load
from latentdiff.engine import execution
from latentdiff.engine.engines import Eager
from latentdiff.evaluate.features import FEATURES, LATENTS
from latentdiff.evaluate.report import read_report
from latentdiff.evaluate.run import METRICS
from latentdiff.images import open_image
from latentdiff.marks import GENERATED
from latentdiff.pipeline import Pipeline
from tests.evaluate.small import make_overflow
from tests.models.tiny import noise_picture


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("latentdiff: ") and error.count("\n") == 1
    return error


def test_killed_at_random_and_resumed_it_writes_the_identical_report(
    call: list[str], text: Path, tmp_path: Path
) -> None:
    assert main([*call, "--out", str(tmp_path / "whole")]) == 0
    broken = tmp_path / "broken"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    code = (
        "import sys, pathlib, latentdiff.evaluate.judge as judge\n"
        f"judge.embedded_model = lambda: pathlib.Path({str(text)!r})\n"
        "from latentdiff.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *call, "--out", str(broken)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(broken.glob("pictures/captions/*.png")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main([*call, "--out", str(broken)]) == 0
    for name in ("report.json", "report.html"):
        assert (broken / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    (figure,) = read_report(broken)[1]
    assert len(figure.items) == 6  # though two captions are the same
    assert all((broken / place).is_file() for place in figure.pictures.values())
    inlined = re.findall('data:image/png;base64,([^"]+)', (broken / "report.html").read_text())
    assert inlined and all(GENERATED.encode() in base64.b64decode(data) for data in inlined)


def test_metrics_of_sets_and_of_texts(call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All in one report, whose parts say what they depend on; the image-text model gives the features too."""
    names = "fid,kid,mmd,precision_recall,clip,retrieval,compose"
    assert main([*call, "--metrics", names, "--n", "8", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "every protocol: data data, data_hash " in printed and ", split train, seed 0, sampler " in printed
    subject, figures = read_report(tmp_path)
    found = {one.name: one for one in figures}
    assert list(found)[:9] == [
        *("fid", "fid_infinite", "kid", "mmd", "precision", "recall", "clip", "retrieval_top1", "retrieval_top5")
    ]
    assert {"model_hash", "device", "dtype", "seed", "n"} <= subject.keys()
    for name in ("fid", "kid", "mmd", "precision", "recall"):
        one = found[name]
        assert one.estimate.low <= one.estimate.value <= one.estimate.high and one.estimate.n == 8
        assert one.floor is not None and one.ceiling is not None
        assert one.protocol["features"] == "image-text" and "antialiased to 16" in str(one.protocol["resize"])
    assert found["retrieval_top1"].protocol["texts"] == 5 and found["retrieval_top5"].estimate.value == 1
    assert found["compose"].estimate.n == 6 and len(found["compose"].pictures) == 6


def test_compose_checks_pictures_of_any_model(
    call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The prompts that one model drew, and its pictures in their order, give the same figures as those of another."""
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    assert main([*call, "--metrics", "compose", "--n", "12", "--out", str(own)]) == 0
    one = {figure.name: figure for figure in read_report(own)[1]}
    theirs.mkdir()
    for number, place in enumerate(one["compose"].pictures.values()):
        shutil.copy(own / place, theirs / f"{number}.png")
    judge = call[call.index("--judge") + 1]
    given = ["evaluate", "--pictures", str(theirs), "--metrics", "compose", "--judge", judge]
    given += ["--out", str(tmp_path / "out"), "--prompts", str(tmp_path / "prompts.jsonl")]
    shutil.copy(own / "prompts.jsonl", tmp_path)
    assert main(given) == 0
    again = {figure.name: figure for figure in read_report(tmp_path / "out")[1]}
    assert again.keys() == one.keys() and len(one) == 7
    for name, figure in one.items():
        assert again[name].estimate == figure.estimate
        assert again[name].protocol["prompts"] == figure.protocol["prompts"]
    lines = (own / "prompts.jsonl").read_text().splitlines()
    for changed, message in (
        ({"category": "colour"}, "category 'colour' is unknown; did you mean 'color'"),
        ({"category": ["color"]}, "is unknown"),
        ({"truth": None}, "truth must be an object with things"),
        ({"truth": {"things": []}}, "truth must be an object with things"),
        ({"truth": {"things": [{"concept": "fox", "count": 5}]}}, "count must be 1 to 4, got '5'"),
        ({"truth": {"things": [{"concept": "fox", "count": True}]}}, "count must be 1 to 4"),
        ({"truth": {"things": ["fox"]}}, "each of things must have a concept"),
        ({"truth": {"things": [{"concept": "fox", "color": []}]}}, "color '[]' is unknown"),
        ({"truth": {"things": [{"concept": "a"}], "relation": "above"}}, "relation is of 2 things, got 1"),
    ):
        row = json.loads(lines[0]) | changed
        (tmp_path / "prompts.jsonl").write_text("\n".join([json.dumps(row), *lines[1:]]))
        error = error_of([*given, "--out", str(tmp_path / "bad")], capsys)
        assert message in error and "compose checks 0.png by its line of --prompts" in error


def test_a_table_that_a_batch_drew_is_measured_in_its_own_order(
    call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `evaluate` would draw itself, drawn by `batch`: the same pictures, so the same figures."""
    own, drawn = tmp_path / "own", tmp_path / "drawn"
    assert main([*call, "--metrics", "compose", "--n", "12", "--out", str(own)]) == 0
    table = str(own / "prompts.jsonl")
    batch = ["batch", table, str(drawn), "--model", call[1], "--steps", "2", "--workers", "0", "--shard-size", "5"]
    batch += ["--keep", "category", "--keep", "truth"]
    assert main([*batch, "--format", "files"]) == 0
    measure = ["evaluate", "--pictures", str(drawn), "--prompts", table, "--metrics", "compose,clip"]
    measure += ["--judge", call[call.index("--judge") + 1], "--out", str(tmp_path / "out")]
    assert main(measure) == 0
    one, again = ({figure.name: figure for figure in read_report(place)[1]} for place in (own, tmp_path / "out"))
    pictures = [[*figures["compose"].pictures.values()] for figures in (one, again)]
    assert [int(Path(place).parent.name[:8]) for place in pictures[1]] == [0] * 5 + [1] * 5 + [2] * 2
    for ours, theirs in zip(*pictures):
        difference = np.asarray(open_image(own / ours), int) - np.asarray(open_image(drawn / "shards" / theirs), int)
        assert np.abs(difference).max() <= 1
    assert again["compose"].estimate == one["compose"].estimate
    with open(table, "a") as file:
        file.write('{"prompt": "a fox", "steps": "?"}\n')
    assert main([*batch, "--format", "files", "--max-failures", "1"]) == 0
    assert "must have a picture of each row, got none of 1; see failures there" in error_of(measure, capsys)
    assert main([*batch, "--new", "--max-failures", "1"]) == 0
    assert "got webdataset; draw with --format files" in error_of(measure, capsys)


def test_what_a_metric_needs_is_missed_before_anything_is_drawn(
    call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = call.index("--judge")
    bare = [*call[:at], *call[at + 2 :], "--out", str(tmp_path / "out")]
    for metrics in ("speed,clip", "speed,kid", "speed,compose"):
        error = error_of([*bare, "--metrics", metrics], capsys)
        assert "came without the image-text model; train one with `latentdiff train configs/emoji-" in error
    assert "needs its weights" in error_of([*bare, "--metrics", "speed,lpips"], capsys)
    assert not (tmp_path / "out").exists()


def test_reports_are_compared_where_protocols_agree(
    call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, more in (("a", []), ("b", ["--steps", "3"]), ("c", ["--seed", "1"]), ("d", ["--n", "4"])):
        assert main([*call, *more, "--out", str(tmp_path / name)]) == 0
    a, b, c, d = (str(tmp_path / name) for name in "abcd")
    capsys.readouterr()
    assert main(["evaluate", "--compare", a, a, "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["comparisons"]
    assert one["paired"] and one["difference"]["value"] == 0 and one["verdict"] == "no difference shown"
    assert "num_inference_steps 2 against 3" in error_of(["evaluate", "--compare", a, b], capsys)
    assert "n 6 against 4" in error_of(["evaluate", "--compare", a, d], capsys)
    for name in ("steps", "num_inference_steps"):
        assert main(["evaluate", "--compare", a, b, "--across", name]) == 0
        assert "paired" in capsys.readouterr().out
    assert main(["evaluate", "--compare", a, c, "--across", "seed"]) == 0
    assert "unpaired" in capsys.readouterr().out
    assert "is no generation setting" in error_of(["evaluate", "--compare", a, b, "--across", "n"], capsys)
    assert "cannot read report" in error_of(["evaluate", "--compare", a, str(tmp_path / "none.json")], capsys)
    (tmp_path / "bad.json").write_text('{"figures": [{"name": "clip", "estimate": 1}]}')
    assert "cannot be read" in error_of(["evaluate", "--compare", a, str(tmp_path / "bad.json")], capsys)
    assert "holds another evaluation (num_inference_steps 2 against 4)" in error_of(
        [*call, "--steps", "4", "--out", a], capsys
    )


def test_pictures_of_others(call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, judge = tmp_path / "pictures", call[call.index("--judge") + 1]
    folder.mkdir()
    for number in (1, 2, 10):
        noise_picture(32, 32, seed=number).save(folder / f"{number}.png")
    plain = ["evaluate", "--pictures", str(folder), "--metrics", "clip", "--judge", judge]
    plain += ["--out", str(tmp_path / "out")]
    assert "needs the prompt of each picture" in error_of(plain, capsys)
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[:100])
    error = error_of([*plain[:-1], str(tmp_path / "broken")], capsys)
    assert "1.png" in error and "prompt" not in error
    (folder / "1.png").write_bytes(whole)
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": text}) for text in ("a fox", "a cat", "a dog")))
    again = [*plain[:-1], str(tmp_path / "again"), "--prompts", str(file)]
    assert main(again) == 0
    (figure,) = read_report(tmp_path / "again")[1]
    assert figure.pictures == {"a fox #0": "1.png", "a cat #1": "2.png", "a dog #2": "10.png"}
    capsys.readouterr()
    for text, message in (
        ('{"prompt": "a fox"}', "a line for each of the 3 pictures"),
        ('{"file_name": "../x.png", "prompt": "a"}', "has no picture '../x.png'"),
        ('{"file_name": "1.png"}', 'must have "prompt"'),
        ("[1]", "line 1 must be"),
        ("{", "is not JSON"),
        ("", "got none"),
    ):
        file.write_text(text)
        assert message in error_of(again, capsys)
    (tmp_path / "empty").mkdir()
    assert "must hold PNG" in error_of(["evaluate", "--pictures", str(tmp_path / "empty")], capsys)
    assert "drawn already" in error_of([*plain, "--steps", "3"], capsys)


def test_a_sweep_has_a_report_for_each_setting_and_a_table(
    call: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("latentdiff.evaluate.speed.REPEATS", 2)
    sweep = [*call, "--metrics", "clip,speed", "--sweep", "steps=1,2", "--sweep", "sampler=euler,ddim"]
    assert main([*sweep, "--out", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "steps=2, sampler=ddim" in table and "speed/flops_per_call" in table
    figures = {one.name: one for one in read_report(tmp_path / "steps=1,sampler=euler")[1]}
    assert figures["speed/flops_per_call"].estimate.value > 0 and figures["speed/peak_memory"].estimate.value > 1
    times = figures["speed/seconds_to_picture"].estimate
    assert 0 < times.low <= times.value <= times.high
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 1 + 4 * len(figures)
    drawn = (tmp_path / "sweep.svg").read_text()
    assert drawn.count("<polyline") == 2 and drawn.count("<circle") == 4 + 2  # and one each beside their names
    for text, message in (
        ("stepz=3", "--stepz is no setting; did you mean 'steps'"),
        ("steps", "--sweep must be a setting with values"),
        ("steps=0", "num_inference_steps must be"),
        ("steps=2,2", "names something twice"),
    ):
        assert message in error_of([*call, "--sweep", text], capsys)


@pytest.mark.filterwarnings("ignore:invalid value")  # of what is not finite, on the way to being refused
@pytest.mark.parametrize("network", ["unet", "vae"])
def test_a_model_that_draws_nan_is_refused_and_leaves_nothing(
    network: str, call: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_overflow(model_folder / network)
    broken = [call[0], str(model_folder), *call[2:], "--out", str(tmp_path / "out"), "--n", "2"]
    names = ["clip", "retrieval", "compose", "speed"] + ["psnr"] * (network == "vae")
    for name in names:
        error = error_of([*broken, "--metrics", name], capsys)
        assert "NaN" in error or "not finite" in error or "overflowed even in float32" in error, name
        assert not (tmp_path / "out").exists(), name
    assert main([*call, "--n", "2", "--metrics", "clip", "--out", str(tmp_path / "out")]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    error_of(broken, capsys)  # the report of another model stays as it is
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_a_sweep_over_dtypes_loads_the_model_for_each(
    call: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded: list[object] = []

    def counting(*arguments: Any, **more: Any) -> Pipeline:
        loaded.append(arguments[2])
        return load(*arguments, **more)

    monkeypatch.setattr(command, "load", counting)
    sweep = [*call, "--n", "2", "--sweep", "steps=1,2", "--sweep", "dtype=float32,bfloat16"]
    assert main([*sweep, "--out", str(tmp_path)]) == 0
    assert loaded == [torch.float32, torch.bfloat16]
    assert "dtype=bfloat16, steps=2" in capsys.readouterr().out
    values = {}
    for dtype in ("float32", "bfloat16"):
        subject, (figure,) = read_report(tmp_path / f"dtype={dtype},steps=2")
        assert subject["dtype"] == dtype
        values[dtype] = figure.estimate.value
    assert values["float32"] != values["bfloat16"]
    lines = (tmp_path / "sweep.csv").read_text().splitlines()
    assert len(lines) == 5 and lines[0].startswith("dtype,steps,")
    compared = ["evaluate", "--compare", *(str(tmp_path / f"dtype={dtype},steps=2") for dtype in values)]
    assert main(compared) == 0 and "paired" in capsys.readouterr().out
    loaded.clear()
    for text, message in (
        ("dtype=float32,bfloat", "dtype 'bfloat' is unknown; did you mean 'bfloat16'"),
        ("dtype=float32,float32", "names something twice"),
        ("dtyp=float32", "--dtyp is no setting; did you mean 'dtype'"),
    ):
        assert message in error_of([*call, "--sweep", text], capsys)
    assert not loaded


def test_a_sweep_over_engines_says_what_each_costs(
    call: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Half(Eager):
        name = "compile"

        def decode(self, autoencoder: Any) -> Any:
            real = super().decode(autoencoder)
            return lambda latents: real(latents) / 2

    monkeypatch.setattr(execution, "Compiled", lambda device: Half())
    sweep = [*call, "--n", "2", "--sweep", "engine=eager,compile"]
    assert main([*sweep, "--out", str(tmp_path)]) == 0
    found = {name: read_report(tmp_path / f"engine={name}") for name in ("eager", "compile")}
    assert all(subject["engine"] == name for name, (subject, _) in found.items())
    eager, other = (figure.estimate.value for _, (figure,) in found.values())
    assert eager != other
    capsys.readouterr()
    assert main(["evaluate", "--compare", *(str(tmp_path / f"engine={name}") for name in found)]) == 0
    assert "paired" in capsys.readouterr().out
    assert main([*call, "--n", "2", "--engine", "compile", "--out", str(tmp_path / "alone")]) == 0
    assert read_report(tmp_path / "alone")[1][0].estimate.value == other
    assert "engine 'eagre' is unknown; did you mean 'eager'?" in error_of([*call, "--sweep", "engine=eagre"], capsys)


def test_pictures_have_the_size_asked_for(call: list[str], tmp_path: Path) -> None:
    assert main([*call, "--n", "2", "--metrics", "psnr", "--size", "16x16", "--out", str(tmp_path / "small")]) == 0
    assert main([*call, "--n", "2", "--size", "16x16", "--out", str(tmp_path / "drawn")]) == 0
    assert {open_image(file).size for file in (tmp_path / "drawn/pictures").rglob("*.png")} == {(16, 16)}


def test_what_is_asked_must_fit(call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = [*call, "--out", str(tmp_path / "out")]
    for arguments, message in (
        (["evaluate"], "got neither"),
        ([*call, "--pictures", "x"], "got both"),
        ([*call, "--prompts", "x"], "got no --pictures"),
        ([*call, "--across", "steps"], "is for --compare"),
        ([*call, "--compare", "a", "b"], "something to measure besides"),
        ([*call, "--n", "9", "--metrics", "kid"], "--n must be at most the 8 pictures"),
        ([*call, "--n", "0"], "--n must be a whole number from 1"),
        ([*call, "--metrics", "kid,kid"], "names one twice"),
        ([*call, "--metrics", "kid,"], "metric '' is unknown"),
        ([*call, "--features", "inceptoin"], "features 'inceptoin' are unknown; did you mean 'inception'"),
        ([*call, "--features", "latents:there"], "features 'latents' are unknown"),
        ([*call, "--best-of", "0"], "--best-of must be a whole number from 1 to 100, got 0"),
        ([*call[:2], "--recipe", "x.yaml"], "got no --data; add it"),
        ([*call, "--recipe", str(tmp_path / "none.yaml")], "none.yaml"),
        ([*call, "--guidance", "99"], "guidance_scale must be"),
        ([*call, "--size", "16"], "--size must be WIDTHxHEIGHT in pixels, got '16'"),
        ([*call, "--size", "16x32"], "only square pictures can be measured beside real ones, got 16x32"),
        (["evaluate", call[1], "--metrics", "kid", "--out", str(tmp_path / "o")], "pass --data"),
    ):
        assert message in error_of(arguments, capsys)
    assert not (tmp_path / "out").exists() and not (tmp_path / "o").exists()


def test_a_recipe_chooses_among_the_pictures(call: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    tree = {"stage": "autoencoder", "data": {"folder": "elsewhere", "size": 32, "keep": {"text": ["a fox", "a cat"]}}}
    recipe.write_text(
        json.dumps({**tree, "run": {"out": "x", "steps": 1, "batch_size": 1}, "model": {}, "loss": {"l1": 1}})
    )
    data = call[call.index("--data") + 1]
    (all_of_them, chosen) = (command.open_references(data, "train", (32, 32), None, one) for one in (None, str(recipe)))
    assert (len(all_of_them["test"]), {*chosen["test"].captions}) == (8, {"a fox", "a cat"})
    assert all_of_them["test"].digest != chosen["test"].digest


def test_the_help_names_every_metric_and_feature_network() -> None:
    assert tuple(METRICS) == command.METRICS and {*FEATURES, LATENTS} == {*command.FEATURES}

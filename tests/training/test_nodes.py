"""The launch files of examples/training_nodes, and Ray Train beside torchrun: the same bits, also after a loss."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from latentdiff.cli import _parser
from latentdiff.commands.train import train as cli_train
from tests.training.test_distributed import OVERRIDES, logged
from tests.training.test_stages import pictures, recipe, weights_of

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples/training_nodes"
PATIENCE = 900.0  # seconds; machines are shared
LONGER = ["run.steps=12", "run.save_every=2"]

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


def asked(words: list[str]) -> Any:
    """Return the options of `latentdiff train` in a command that torchrun starts."""
    return _parser().parse_args(words[words.index("latentdiff") + 1 :])


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_scripts_ask_for_what_there_is(name: str) -> None:
    if shutil.which("bash") is not None:
        subprocess.run(["bash", "-n", str(EXAMPLES / name)], check=True)
    text = (EXAMPLES / name).read_text(encoding="utf-8").replace("\\\n", " ")
    (command,) = re.findall(r"^(?:exec|srun .*?) ?(torchrun .*)$", text, re.MULTILINE)
    options = asked(shlex.split(command))
    assert options.resume and (options.config, options.out) == ("$config", "$out")
    for config in re.findall(r"configs/[\w-]+\.yaml", text):
        assert (ROOT / config).is_file()


def test_a_jobset_starts_as_many_pods_as_torchrun_waits_for() -> None:
    (jobs,) = yaml.safe_load((EXAMPLES / "jobset.yaml").read_text(encoding="utf-8"))["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    arguments = dict(word.removeprefix("--").split("=") for word in container["args"] if "=" in word)
    assert job["parallelism"] == job["completions"] == int(arguments["nnodes"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(arguments["nproc_per_node"])
    assert arguments["master_addr"] == f"latentdiff-{jobs['name']}-0-0.latentdiff"
    assert asked(container["args"]).resume
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}


def start(command: list[str], place: Path) -> subprocess.Popen[str]:
    """Begin a program of two processes on the CPU."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=place,
        env=os.environ | own,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def torchrun(file: str, out: Path, overrides: list[str]) -> None:
    """Train with torchrun."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "latentdiff", "train", file]
    process = start([*words, "--out", str(out), *(word for one in overrides for word in ("--set", one))], out.parent)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said


def ray_train(file: str, out: Path, overrides: list[str]) -> subprocess.Popen[str]:
    """Begin to train with Ray Train."""
    words = [str(EXAMPLES / "ray_train.py"), file, "--workers", "2", "--cpu", "--out", str(out)]
    return start([*words, *(word for one in overrides for word in ("--set", one))], out.parent)


def workers_below(driver: int) -> list[int]:
    """Return the processes of Ray that train, of those that a driver started."""
    parents, found = dict[int, int](), list[int]()
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(place.parent.name)] = int(place.read_text().rpartition(")")[2].split()[1])
            found += [int(place.parent.name)] if "RayTrainWorker" in (place.parent / "cmdline").read_text() else []
        except (OSError, ValueError):
            continue

    def below(process: int) -> bool:
        while process > 1 and process != driver:
            process = parents.get(process, 0)
        return process == driver

    return [process for process in found if below(process)]


def assert_same_bits(one: Path, other: Path) -> None:
    """Compare the weights that two runs ended with."""
    weights, same = weights_of(one), weights_of(other)
    assert weights.keys() == same.keys()
    for name, tensor in weights.items():
        assert torch.equal(same[name], tensor), name


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe of the diffusion stage, whose autoencoder is trained."""
    place = tmp_path_factory.mktemp("nodes")
    pictures(place / "pictures", 10)
    cli_train(recipe(place, "autoencoder"), [], False, None)
    return recipe(place, "diffusion", run__ema_decay=0.5)


@needs_ray
@pytest.mark.long
def test_ray_train_gives_the_bits_of_torchrun_also_when_a_worker_is_lost(file: str, tmp_path: Path) -> None:
    overrides = [*OVERRIDES["diffusion"], *LONGER]
    torchrun(file, tmp_path / "torchrun", overrides)
    whole = ray_train(file, tmp_path / "whole", overrides)
    said, _ = whole.communicate(timeout=PATIENCE)
    assert whole.returncode == 0, said
    ours, theirs = logged(tmp_path / "torchrun"), logged(tmp_path / "whole")
    assert ours["loss"] == theirs["loss"] and len(ours["loss"]) == 12
    assert_same_bits(tmp_path / "torchrun", tmp_path / "whole")
    lossy, until = ray_train(file, tmp_path / "lossy", overrides), time.monotonic() + PATIENCE
    try:
        while not any((tmp_path / "lossy").glob("checkpoints/step-*")) and time.monotonic() < until:
            time.sleep(0.02)
        killed = workers_below(lossy.pid)[-1:]
        for worker in killed:
            os.kill(worker, signal.SIGKILL)
        said, _ = lossy.communicate(timeout=PATIENCE)
    finally:
        lossy.kill()
    assert lossy.returncode == 0 and killed, said
    assert_same_bits(tmp_path / "torchrun", tmp_path / "lossy")

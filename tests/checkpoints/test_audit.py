"""Every audit event of the interpreter while models are loaded: nothing is run, nothing outside is opened."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from tests.checkpoints.header_mutations import archives
from tests.checkpoints.test_folder import UNET, edit
from tests.checkpoints.test_single_file import components_of, tensors_of, tiny

ROOT = Path(__file__).parents[2]
FAMILY = "Stable Diffusion 1.x"
INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"

# Hooks cannot be removed, so all this happens in a process of its own. `inside` is where files may be opened.
WATCH = """
import json, os, pickle, subprocess, sys, warnings
from latentdiff.checkpoints import load_pipeline, single_file
from latentdiff.errors import ModelLoadError

good, file, variant = sys.argv[1:4]
hostile, shapes = json.loads(sys.argv[4]), json.loads(sys.argv[5])
single_file.families = lambda: shapes
warnings.simplefilter("ignore")
RUNS = ("exec", "compile", "import", "socket.", "subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn",
        "os.fork", "pickle.", "marshal.", "code.", "ctypes.dlopen", "pty.", "urllib.", "http.", "ftplib.")
WRITES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
          "shutil.")
package = os.path.dirname(single_file.__file__)
seen, inside, watching = [], (), False

def watch(event, arguments):
    if not watching:
        return
    if event in ("open", "os.listdir", "os.scandir"):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        written = event == "open" and set(arguments[1] or "") & set("wax+")
        if written or not any(path == place or path.startswith(place + os.sep) for place in inside):
            seen.append(f"{event} {path}")
    elif event.startswith(RUNS + WRITES):
        seen.append(f"{event} {str(arguments)[:200]}")

def load(path):
    global inside, watching
    inside = (os.path.realpath(path), package, *([os.path.realpath(good)] if path == variant else []))
    watching = True
    try:
        assert load_pipeline(path).model_hash
        return "loaded"
    except ModelLoadError as error:
        return type(error).__name__
    finally:
        watching = False

def prove():
    global watching
    watching = True
    open(os.devnull).close()
    os.listdir("/")
    exec("1")
    import this_module_is_nowhere

load(good), load(file), load(variant)  # which import what is imported late
seen.clear()
sys.addaudithook(watch)
outcomes = {path: load(path) for path in (good, file, variant, *hostile)}
violations = list(seen)
seen.clear()
try:
    prove()
except ImportError:
    pass
try:
    pickle.loads(b"cos\\ngetcwd\\n.")
    subprocess.run([sys.executable, "-c", ""])
    open(os.path.join(good, "x"), "w").close()
finally:
    watching = False
print(json.dumps({"outcomes": outcomes, "violations": violations, "proof": seen}))
"""


def index(folder: Path, file: str) -> None:
    """Let the index of the U-Net place a tensor in a file."""
    (folder / UNET).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"conv_in.weight": file}}))


def linked(path: Path, target: str) -> None:
    """Put a link where something was."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(target)


def without_vae(folder: Path, base: Any) -> None:
    """Let a folder be a variant of what a name stands for, which may be a link to /etc beside it."""
    shutil.rmtree(folder / "vae")
    tree = json.loads((folder / "model_index.json").read_text())
    del tree["vae"]
    (folder / "model_index.json").write_text(json.dumps({**tree, "_base": base}))
    (folder.parent / "etc").unlink(missing_ok=True)
    (folder.parent / "etc").symlink_to("/etc")


PICKLE_NAMES = (
    *("diffusion_pytorch_model.bin", "diffusion_pytorch_model.ckpt", "pytorch_model.bin", "model.pt", "model.pth"),
    *("diffusion_pytorch_model.pkl", "model.pickle", "diffusion_pytorch_model.fp16.bin", "model.msgpack", "model.h5"),
)
CODE = "open('executed', 'w')\n"
HOSTILE: dict[str, Callable[[Path], Any]] = {
    **{
        f"{kind} in disguise": lambda f, kind=kind: (f / UNET).write_bytes(archives()[kind])  # type: ignore[misc]
        for kind in archives()
    },
    **{
        f"only {name}": lambda f, name=name: (  # type: ignore[misc]
            (f / UNET).unlink(),
            (f / "unet" / name).write_bytes(archives()["torch"]),
        )
        for name in PICKLE_NAMES
    },
    "auto_map": lambda f: edit(f / "unet/config.json", auto_map={"AutoModel": "evil.Model"}),
    "_target_": lambda f: edit(f / "scheduler/scheduler_config.json", _target_="evil.run"),
    "nested _target_": lambda f: edit(f / "text_encoder/config.json", x=[{"y": {"_target_": "evil.run"}}]),
    "custom_pipelines": lambda f: edit(f / "model_index.json", custom_pipelines={"x": "evil"}),
    "code in tokenizer": lambda f: edit(f / "tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": "evil.T"}),
    "module of the folder": lambda f: edit(f / "model_index.json", unet=["evil", "Model"]),
    "class of the folder": lambda f: edit(f / "model_index.json", _class_name="evil.Pipeline"),
    "path as class": lambda f: edit(f / "unet/config.json", _class_name="../evil.py"),
    **{
        f"shard {number}": lambda f, file=file: index(f, file)  # type: ignore[misc]
        for number, file in enumerate(
            ("../evil.safetensors", "../../good/x.safetensors", "/etc/passwd", "evil.bin", "..")
        )
    },
    "linked weights": lambda f: linked(f / UNET, "/etc/passwd"),
    "linked config": lambda f: linked(f / "unet/config.json", "/etc/hosts"),
    "linked folder": lambda f: linked(f / "vae", "/etc"),
    "linked index": lambda f: linked(f / "model_index.json", "/proc/self/environ"),
    "linked vocabulary": lambda f: linked(f / "tokenizer/vocab.txt", "/etc/passwd"),
    "linked shard": lambda f: (index(f, "a.safetensors"), linked(f / "unet/a.safetensors", "/etc/passwd")),
    "loop": lambda f: linked(f / "scheduler/scheduler_config.json", "scheduler_config.json"),
    **{
        f"base {number}": lambda f, name=name: without_vae(f, name)  # type: ignore[misc]
        for number, name in enumerate(
            ("..", "../../good", "../good", "/etc", "etc", ".", "", 3, "\0", "base/../../good")
        )
    },
    "pipe": lambda f: ((f / UNET).unlink(), os.mkfifo(f / UNET)),
    "YAML tags": lambda f: (f / "unet/config.json").write_text("!!python/object/apply:os.system ['touch executed']"),
}


@pytest.fixture
def report(built_model: Path, tmp_path: Path) -> dict[str, Any]:
    """What a watched process saw when it loaded a good folder, file and variant, and the hostile folders."""
    shape = tiny(FAMILY)
    save_file(tensors_of(components_of(shape), shape), tmp_path / "good.safetensors")
    good = shutil.copytree(built_model, tmp_path / "good")
    variant = shutil.copytree(built_model, tmp_path / "variant")
    without_vae(variant, "good")
    hostile = []
    for number, change in enumerate(HOSTILE.values()):
        folder = shutil.copytree(built_model, tmp_path / "hostile" / str(number))
        for name in ("evil.py", "__init__.py", "sitecustomize.py", "unet/evil.py"):
            (folder / name).write_text(CODE)
        change(folder)
        hostile.append(str(folder))
    (tmp_path / "evil.py").write_text(CODE)  # which the working folder would let an import find
    arguments = [str(good), str(tmp_path / "good.safetensors"), str(variant)]
    arguments += [json.dumps(hostile), json.dumps({FAMILY: shape})]
    run = subprocess.run(
        [sys.executable, "-c", WATCH, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert not list(tmp_path.rglob("executed"))
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_loading_runs_nothing_and_opens_nothing_outside(report: dict[str, Any]) -> None:
    outcomes = list(report["outcomes"].values())
    assert outcomes[:3] == ["loaded"] * 3
    assert [name for name, outcome in zip(HOSTILE, outcomes[3:]) if outcome == "loaded"] == []
    print(f"{len(outcomes)} loads, violations: {report['violations']}")
    assert report["violations"] == []
    # The hook sees what it should: one deliberate violation of each kind.
    kinds = [entry.split()[0] for entry in report["proof"]]
    for kind in ("open", "os.listdir", "exec", "compile", "import", "pickle.find_class", "subprocess.Popen"):
        assert kind in kinds
    assert any(entry.startswith("open") and entry.endswith("/good/x") for entry in report["proof"])  # to be written

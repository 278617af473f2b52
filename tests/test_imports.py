"""What is loaded when, and who may import whom."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import latentdiff

ROOT = Path(__file__).parents[1]

# Imports point only downwards in these lists.
ROOMS = (
    "cli",
    "commands",
    "scale",
    "serve",
    "training",
    "evaluate",
    "pipeline",
    "generation",
    "checkpoints",
    "engine",
    "models",
    "diffusion",
)
LEAVES = (
    "corruptions",
    "devices",
    "signing",
    "images",
    "encoding",
    "decoding",
    "marks",
    "lora_tags",
    "embedded",
    "files",
    "memory",
    "prompts",
    "interrupts",
    "ray_driver",
    "errors",
)
TRAINING_ROOMS = (
    *(
        "speedrun",
        "check",
        "taught_text",
        "distill",
        "finetune",
        "tune_sampler",
        "tiny_decoder",
        "destination",
        "train_diffusion",
        "train_autoencoder",
        "train_image_text",
        "setup",
        "monitor",
        "losses",
        "networks",
    ),
    *("loop", "datasets", "data", "config"),
)
HEAVY = ("torch", "diffusers", "transformers", "datasets", "accelerate", "tensorboard", "pydantic", "torchvision")

# What comes before code that runs in an interpreter of its own and may not reach the network.
OFFLINE = (
    "import sys\n"
    "def no_network(event, arguments):\n"
    "    if event in ('socket.connect', 'socket.getaddrinfo'):\n"
    "        raise SystemExit('network used')\n"
    "sys.addaudithook(no_network)\n"
)


def loaded(code: str, *arguments: str) -> list[str]:
    """Run code in a fresh interpreter that may not reach the network; return which heavy modules it loaded."""
    report = f"\nimport json\nprint(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    run = subprocess.run(
        [sys.executable, "-c", OFFLINE + code + report, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded("import latentdiff\nassert latentdiff.__version__") == []
    assert loaded("import latentdiff.cli, latentdiff.images, latentdiff.errors, latentdiff.training") == []


def test_the_command_line_loads_torch_alone(built_model: Path, tmp_path: Path) -> None:
    call = "from latentdiff.cli import main\nassert main(sys.argv[1:]) == 0"
    out = tmp_path / "fox.png"
    options = ["generate", "cat", "--model", str(built_model), "--steps", "2", "-o", str(out)]
    assert loaded(call, *options) == ["torch"]
    assert out.exists()


def test_networks_are_built_without_the_compiler() -> None:
    """Arithmetic on weights without memory imports it, in a second."""
    code = """
from pathlib import Path
import torch
from latentdiff.checkpoints.build import KINDS, build
from tests.models.tiny import UNETS
for config in UNETS.values():
    build(Path("config.json"), KINDS["UNet2DConditionModel"], config, 1000, torch.float32)
assert "torch._dynamo" not in sys.modules
"""
    assert loaded(code) == ["torch"]


def test_bad_numbers_are_refused_before_torch_is_loaded() -> None:
    assert loaded("from latentdiff.cli import main\nassert main(['generate', 'cat', '--guidance', 'nan']) == 2") == []


def test_public_names() -> None:
    assert latentdiff.__all__ == [
        *("SAMPLERS", "GeneratedImage", "InputError", "LatentDiffError", "MissingDependencyError", "ModelConfigError"),
        *("ModelFormatError", "ModelLoadError", "ModelMismatchError", "ModelPathError", "ModelValueError", "Pipeline"),
        *("Result", "Settings", "StorageError", "UnsafeModelError", "__version__", "load_pipeline", "save_pipeline"),
    ]
    assert set(latentdiff.__all__) <= set(dir(latentdiff))
    assert all(getattr(latentdiff, name) is not None for name in latentdiff.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Pipelines'"):
        _ = latentdiff.Pipelines  # type: ignore[attr-defined]


PACKAGE = ROOT / "latentdiff"
TRAINING = ROOT / "training"


@cache
def modules() -> dict[str, Path]:
    """Return the dotted name and the file of every module of the package, training included."""
    found = {}
    for path in (*PACKAGE.rglob("*.py"), *TRAINING.rglob("*.py")):
        base = ROOT if path.is_relative_to(PACKAGE) else ROOT / "latentdiff"
        place = path.relative_to(PACKAGE) if base == ROOT else path.relative_to(ROOT)
        if path != PACKAGE / "training.py":  # stands in for the folder in a checkout
            found[".".join(("latentdiff", *place.with_suffix("").parts)).removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path) -> Iterator[str]:
    """Yield the dotted names of what a module imports, at the top or inside functions."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level or path.is_relative_to(TRAINING), f"{path}: relative import"
            base = package.rsplit(".", node.level - 1)[0] if node.level else None
            source = ".".join(part for part in (base, node.module) if part)
            yield from (
                f"{source}.{alias.name}" if f"{source}.{alias.name}" in modules() else source for alias in node.names
            )


def place(name: str, depth: int) -> str | None:
    """Return the room of a module of ours by its dotted name: `depth` 1 in latentdiff, 2 in latentdiff.training."""
    parts = name.split(".")
    return parts[depth] if parts[0] == "latentdiff" and len(parts) > depth else None


def test_imports_point_downwards() -> None:
    checked = 0
    for name, path in modules().items():
        own = place(name, 1)
        if own in (None, "__main__"):
            continue
        assert own in ROOMS + LEAVES, f"{path} is in no room; add it to ROOMS or LEAVES"
        for other in imports(name, path):
            assert other.split(".")[0] != "tests", f"{path} imports {other}"
            below = place(other, 1)
            if below is not None and below != own:
                checked += 1
                assert rank(below) > rank(own), f"{path} imports {other}, which is not below it"
    assert checked > 100


def rank(room: str) -> int:
    return (ROOMS + LEAVES).index(room)


def test_imports_point_downwards_in_training() -> None:
    checked = 0
    for name, path in modules().items():
        own = place(name, 2)
        if place(name, 1) != "training" or own is None:
            continue
        assert own in TRAINING_ROOMS, f"{path} is in no room; add it to TRAINING_ROOMS"
        for other in imports(name, path):
            below = place(other, 2) if place(other, 1) == "training" else None
            if below is not None and below != own:
                checked += 1
                assert TRAINING_ROOMS.index(below) > TRAINING_ROOMS.index(own), f"{path} imports {other}, not below it"
    assert checked > 50


def test_no_circle_of_imports() -> None:
    """Nowhere, inside a room neither; an import inside a function counts, and one for types alone."""
    known = modules()
    graph = {name: set(imports(name, path)) & known.keys() - {name} for name, path in known.items()}
    del graph["latentdiff"]  # exports public names from below when they are asked for
    circles, before = set(graph), set[str]()
    while circles != before:  # what is below all circles or above all of them is in none
        before = circles
        circles = {name for name in circles if graph[name] & circles}
        circles = {name for name in circles if any(name in graph[other] for other in circles)}
    assert not circles, f"these import one another: {sorted(circles)}"

"""What is loaded when, and who may import whom."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import latentdiff

ROOT = Path(__file__).parents[1]

# Imports point only downwards. `evaluate`, `engine` and `serve` have their places for when they are built.
ROOMS = (
    *(
        "cli",
        "commands",
        "serve",
        "pipeline",
        "drawing",
        "network",
        "conditioning",
        "upscaling",
        "canvas",
        "masks",
        "result",
        "settings",
        "evaluate",
        "engine",
    ),
    *("checkpoints", "models", "diffusion"),
)
LEAVES = ("devices", "images", "prompts", "errors")
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
    assert loaded("import latentdiff.cli, latentdiff.images, latentdiff.errors, training") == []


def test_the_command_line_loads_torch_alone(built_model: Path, tmp_path: Path) -> None:
    call = "from latentdiff.cli import main\nassert main(sys.argv[1:]) == 0"
    out = tmp_path / "fox.png"
    options = ["generate", "cat", "--model", str(built_model), "--steps", "2", "-o", str(out)]
    assert loaded(call, *options) == ["torch"]
    assert out.exists()


def test_bad_numbers_are_refused_before_torch_is_loaded() -> None:
    assert loaded("from latentdiff.cli import main\nassert main(['generate', 'cat', '--guidance', 'nan']) == 2") == []


def test_public_names() -> None:
    assert latentdiff.__all__ == ["Pipeline", "__version__"]
    assert set(latentdiff.__all__) <= set(dir(latentdiff))
    with pytest.raises(AttributeError, match="no attribute 'Pipelines'"):
        _ = latentdiff.Pipelines  # type: ignore[attr-defined]


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names a file imports, at the top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name: str) -> str | None:
    """Return the room of a module of ours, by its dotted name."""
    parts = name.split(".")
    return parts[1] if parts[0] == "latentdiff" and len(parts) > 1 and parts[1] in ROOMS + LEAVES else None


def rank(name: str) -> int:
    return ROOMS.index(name) if name in ROOMS else len(ROOMS) + (name == "errors")


def test_imports_point_downwards() -> None:
    package = ROOT / "latentdiff"
    checked = 0
    for path in package.rglob("*.py"):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        if own in ("__init__", "__main__"):
            continue
        assert own in ROOMS + LEAVES, f"{path} is in no room; add it to ROOMS or LEAVES"
        for name in imports(path):
            other = room(name)
            assert name.split(".")[0] != "training" or own in ("cli", "commands"), f"{path} imports {name}"
            assert name.split(".")[0] != "tests", f"{path} imports {name}"
            if other is not None and other != own:
                checked += 1
                assert rank(other) > rank(own), f"{path} imports {name}, which is not below it"
    assert checked > 20


def test_training_does_not_use_the_doors() -> None:
    for path in (ROOT / "training").rglob("*.py"):
        assert not {room(name) for name in imports(path)} & {"cli", "commands", "serve"}, path

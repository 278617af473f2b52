"""What a model's name means: a path, an embedded model, or a model in the cache of a hub, fetched or not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latentdiff.checkpoints import embedded_model, find_model, load_pipeline, save_pipeline
from latentdiff.checkpoints.find import ASSETS, find_fast_lora
from latentdiff.checkpoints.folder import FAST_LORA
from latentdiff.diffusion.tuned import TunedSampler, schedule_digest
from latentdiff.errors import InputError, ModelPathError
from latentdiff.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from tests.test_imports import OFFLINE

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_into_cache(model: Path, cache: Path, name: str = "owner/model") -> Path:
    """Lay a model folder out as huggingface_hub keeps it: every file a link to a blob."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "blobs").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        blob = place / "blobs" / f"{number:040x}"
        shutil.copy(file, blob)
        link = place / "snapshots" / COMMIT / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return place / "snapshots" / COMMIT


def run(code: str, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that is offline, as huggingface_hub has it, and may open no socket."""
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
    return subprocess.run(
        [sys.executable, "-c", OFFLINE + code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_a_cached_model_loads_offline(built_model: Path, tmp_path: Path) -> None:
    put_into_cache(built_model, tmp_path)
    names = ("owner/model", "owner/model@main", f"owner/model@{COMMIT}", "owner/other")
    code = """from latentdiff.cli import main
for number, name in enumerate(sys.argv[2:]):
    print(main(["generate", "cat", "--model", name, "--steps", "2", "-o", f"{sys.argv[1]}/{number}.png"]))
"""
    done = run(code, tmp_path, str(tmp_path), *names)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.isdigit()] == ["0", "0", "0", "2"]
    assert all((tmp_path / f"{number}.png").stat().st_size > 100 for number in range(3))
    assert not (tmp_path / "3.png").exists()
    *_, last = done.stderr.splitlines()
    assert "model 'owner/other' is no folder here, and huggingface_hub says: " in last


class Hub:
    """Stands in for huggingface_hub: copies what the patterns allow, and keeps a list of it."""

    def __init__(self, model: Path, cache: Path) -> None:
        self.model, self.cache, self.fetched = model, cache, list[str]()

    def snapshot_download(self, name: str, *, revision: str | None, local_files_only: bool, **patterns: Any) -> str:
        from huggingface_hub.utils import filter_repo_objects

        files = [str(path.relative_to(self.model)) for path in sorted(self.model.rglob("*")) if path.is_file()]
        for file in filter_repo_objects(files, **patterns):
            (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.model / file, self.cache / file)
            self.fetched.append(file)
        return str(self.cache)


@pytest.mark.parametrize("half", [False, True])
def test_only_what_is_loaded_is_fetched(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    """Never pickles, other precisions or whole checkpoints beside them; half precision where there is no other."""
    import huggingface_hub

    for file in list(model_folder.rglob("*.safetensors")):
        shutil.copy(file, file.with_suffix(".fp16.safetensors"))
        for ending in (".bin", ".non_ema.safetensors"):
            shutil.copy(file, file.with_suffix(ending))
        if half:
            file.unlink()
    for extra in ("v1-5.safetensors", "v1-5.ckpt", "README.md", "unet/run.py", "safety_checker/model.safetensors"):
        (model_folder / extra).parent.mkdir(exist_ok=True)
        (model_folder / extra).write_bytes(b"x")
    hub = Hub(model_folder, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    folder, name = find_model("owner/model")
    assert name == "owner/model" and load_pipeline(folder).unet is not None
    weights = [file for file in hub.fetched if not file.endswith((".json", ".txt"))]
    kind = ".fp16.safetensors" if half else ".safetensors"
    stem = "diffusion_pytorch_model"
    expected = {f"unet/{stem}{kind}", f"vae/{stem}{kind}", f"text_encoder/model{kind}"}
    assert expected <= set(weights) and not [
        file for file in hub.fetched if file.endswith((".bin", ".ckpt", ".py", ".md"))
    ]
    assert half or set(weights) == expected


def test_what_a_model_has_of_its_own_is_fetched(
    built_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    components = load_pipeline(built_model)
    config = AutoencoderTinyConfig(
        latent_channels=components.unet.config.in_channels,
        decoder_block_out_channels=(8, 8),
        num_decoder_blocks=(1, 1),
    )
    model, tuned = tmp_path / "model", TunedSampler(schedule_digest(components.schedule), {})
    own = replace(components, defaults={"num_inference_steps": 3}, tuned=tuned, tiny_decoder=AutoencoderTiny(config))
    save_pipeline(own, model)
    (model / FAST_LORA).write_bytes(b"x")
    hub = Hub(model, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    fetched = load_pipeline(find_model("owner/model")[0])
    assert fetched.defaults == own.defaults and fetched.tuned == tuned and fetched.tiny_decoder is not None
    assert find_fast_lora("owner/model").read_bytes() == b"x"


def test_a_link_out_of_the_cache_is_refused(built_model: Path, tmp_path: Path) -> None:
    folder = put_into_cache(built_model, tmp_path)
    assert load_pipeline(folder).unet is not None
    secret = tmp_path / "secret.json"
    shutil.copy(built_model / "unet" / "config.json", secret)
    link = folder / "unet" / "config.json"
    link.unlink()
    link.symlink_to(secret)
    with pytest.raises(ModelPathError, match="leads out of the model folder"):
        load_pipeline(folder)


def test_unknown_models_name_the_nearest(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="is no folder or file here; did you mean 'model'"):
        find_model(model_folder.with_name("modle"))
    for name in ("embedded", "embedded-inpaint", "embedded-upscale"):
        with pytest.raises(InputError, match=f"did you mean '{name}'"):
            find_model(name.replace("dd", "d"))
    with pytest.raises(InputError, match="must be a folder"):
        find_model(model_folder / "model_index.json")
    with pytest.raises(InputError, match="a path without NUL"):
        find_model("a\0b")
    monkeypatch.chdir(model_folder.parent)
    Path("runs").mkdir()
    shutil.copytree(model_folder, "runs/model")
    with pytest.raises(InputError, match="did you mean 'model'"):
        find_model("runs/modle")


def test_embedded_model_is_found_in_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import latentdiff.embedded as module

    package = tmp_path / "latentdiff"
    package.mkdir()
    monkeypatch.setattr(module, "__file__", str(package / "embedded.py"))
    embedded_model.cache_clear()
    try:
        for name, folder in ASSETS.items():
            with pytest.raises(ModelPathError, match=f"the model '{name}' is missing from this copy"):
                find_model(name)
            (package / "_assets" / folder).mkdir(parents=True)
            assert find_model(name) == (package / "_assets" / folder, name)
        assert embedded_model() == find_model(None)[0] == package / "_assets" / "emoji"
    finally:
        embedded_model.cache_clear()


def test_the_wheel_takes_every_embedded_model() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert all(f'"assets/{folder}"' in project for folder in ASSETS.values())

"""Pictures that are drawn without torch: the same files as with it, and with it again where anything is unusual."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from latentdiff.training.networks.grown_unet import grown_unet

from latentdiff import Pipeline, Settings
from latentdiff.checkpoints import save_pipeline
from latentdiff.cli import main
from latentdiff.commands import generate
from latentdiff.engine import conversions, layouts
from latentdiff.engine.conversions import CACHE
from latentdiff.engine.openvino_engine import OpenVINO
from latentdiff.engine.torch_noise import agrees_with_torch
from latentdiff.generation import make_recipe
from latentdiff.generation.options import options_of
from latentdiff.generation.recipe import recipe_place
from tests.models.tiny import noise_picture, randomize
from tests.needs import leave_out
from tests.test_imports import loaded

HOW = {"device": None, "dtype": None, "engine": "openvino"}
Draw = Callable[..., bytes]


@pytest.fixture
def cache(converted: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of conversions, and of nothing else, that a test may change."""
    if not agrees_with_torch():
        leave_out("needs a processor on which torch draws noise by the polynomials of AVX2")
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    shutil.copytree(converted / "openvino", tmp_path / "cache" / "openvino")
    return tmp_path / "cache"


@pytest.fixture
def draw(cache: Path, built_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Draws by the command line, `light` where torch has no part in it, and returns the bytes of all files."""

    def draw(*given: str, light: bool = False, prompts: Sequence[str] = ("a red fox",), status: int = 0) -> bytes:
        def refused(*arguments: object, **more: object) -> None:
            raise AssertionError("a pipeline was loaded")

        out = tmp_path / "out.png"
        options = ["--model", str(built_model), "--engine", "openvino", "-o", str(out)]
        options += [] if "--steps" in given or "--sigmas" in given else ["--steps", "3"]
        with monkeypatch.context() as patched:
            if light:
                patched.setattr(Pipeline, "from_pretrained", refused)
            assert main(["generate", *prompts, *options, *given]) == status
        files = sorted(tmp_path.glob("out*.png"))
        data = b"".join(file.read_bytes() for file in files)
        for file in files:
            file.unlink()
        return data

    return draw


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-n", "3", "--seed", "7"),
        ("--negative", "an owl", "--sampler", "dpmpp_2m_karras"),
        ("--sampler", "unipc", "--size", "48x40"),
        ("--sampler", "ddim", "--eta", "0.5", "--guidance", "1"),
        ("--sampler", "dpmpp_sde", "--guidance-interval", "0.1,2"),
        ("--sigmas", "9,3,1,0.2", "--guidance-schedule", "cosine"),
        ("--resampling", "2", "--no-prompt-weights"),
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_the_files_are_those_of_torch(options: tuple[str, ...], draw: Draw) -> None:
    expected = draw(*options)
    assert draw(*options, light=True) == expected


@pytest.mark.long
def test_a_model_with_the_text_in_its_time_embedding(pipe: Pipeline, draw: Draw, cache: Path, tmp_path: Path) -> None:
    changes = {"addition_embed_type": "text", "addition_embed_type_num_heads": 4}
    unet = grown_unet(pipe.unet, changes)
    randomize(unet)
    save_pipeline(pipe.components.with_unet(unet), tmp_path / "model", torch.float32)
    expected = draw("-n", "2", "--model", str(tmp_path / "model"))
    drawn = draw("-n", "2", "--model", str(tmp_path / "model"), "--negative", "owl", light=True)
    assert len(list(cache.glob("recipes/*"))) == 1 and drawn != expected
    assert draw("-n", "2", "--model", str(tmp_path / "model"), light=True) == expected


def test_a_recipe_is_for_any_prompt_seed_and_number(draw: Draw, cache: Path) -> None:
    draw()
    prompts = ("fox", "(fox:1.3) and [owl]", "a red fox on a cat with a fox and an owl and a cat", "")
    more = ("-n", "2", "--seed", "5", "--negative", "red")
    drawn = draw(*more, light=True, prompts=prompts)
    assert len(list(cache.glob("recipes/*"))) == 1
    shutil.rmtree(cache / "recipes")
    assert draw(*more, prompts=prompts) == drawn and drawn.count(b"IEND") == 8
    assert draw("--negative", "owl", light=True, prompts=("owl",)) == draw("--negative", "owl", prompts=("owl",))


def test_torch_is_not_loaded(draw: Draw, built_model: Path, tmp_path: Path) -> None:
    expected = draw()
    out = tmp_path / "light.png"
    options = ["generate", "a red fox", "--model", str(built_model), "--engine", "openvino", "--steps", "3"]
    call = "from latentdiff.cli import main\nassert main(sys.argv[1:]) == 0"
    assert loaded(call, *options, "-o", str(out)) == []
    assert out.read_bytes() == expected
    assert loaded("from latentdiff import Settings\nSettings(prompts=('a',), tried=True)") == []


def test_reports_notes_and_errors_are_those_of_torch(draw: Draw, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for light in (False, True):
        capsys.readouterr()
        draw("--json", "-n", "2", light=light, prompts=("fox BREAK owl",))
        draw(light=light, prompts=("(fox:99)",), status=2)
        captured = capsys.readouterr()
        report = json.loads(captured.out)
        assert report.pop("seconds") > 0 and report["settings"]["engine"] == "openvino"
        said.append((report, captured.err))
    assert said[0] == said[1] and len(said[0][0]["notes"]) == 1 and "a weight in a prompt must be" in said[0][1]


def test_what_was_drawn_without_torch_is_replayed(
    draw: Draw, tmp_path: Path, built_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw()
    picture = tmp_path / "fox.png"
    picture.write_bytes(draw("--seed", "4", light=True))
    capsys.readouterr()
    assert main(["replay", str(picture), "--model", str(built_model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"] is True


@pytest.mark.parametrize(
    "options",
    [
        ("--guidance-rescale", "0.5"),
        ("--guidance-parallel", "0.5"),
        ("--guidance-limit", "5"),
        ("--blend-prompt", "owl", "--blend", "0.5"),
        ("--variation-strength", "0.5"),
        ("--hires", "2"),
        ("--image", "noise.png"),
    ],
    ids=lambda options: options[0],
)
def test_other_pictures_are_drawn_by_torch(
    options: tuple[str, ...], draw: Draw, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    noise_picture(32, 32).save("noise.png")
    drawn = draw(*options)
    assert not (cache / "recipes").exists()
    assert draw(*options) == drawn != draw()


def test_every_option_that_is_not_heeded_takes_torch(built_model: Path) -> None:
    parser = argparse.ArgumentParser()
    generate.add_options(parser)
    options = parser.parse_args(["fox", "--model", str(built_model), "--engine", "openvino"])
    assert generate._recipe_place(options, {}) is not None
    others = {*vars(options)} - {*generate.HEEDED, *options_of(Settings)}
    assert {"lora", "embedding", "image", "upscale", "offload", "vae"} < others
    for name in others:
        changed = argparse.Namespace(**{**vars(options), name: ["given"]})
        assert generate._recipe_place(changed, {}) is None, name
    for engine in ("eager", "compile", None):
        assert generate._recipe_place(argparse.Namespace(**{**vars(options), "engine": engine}), {}) is None
    assert generate._recipe_place(argparse.Namespace(**{**vars(options), "prompts": []}), {}) is None


def test_the_place_is_of_all_that_a_picture_depends_on(
    cache: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(model_folder)
    place = recipe_place(model, HOW, {"seed": 3})
    assert place is not None and place == recipe_place(model, HOW, {"negative_prompt": "owl", "num_images": 2})
    others = [recipe_place(model, HOW, {"eta": 0.5}), recipe_place(model, {**HOW, "device": "cpu"}, {})]
    with monkeypatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "7")
        others.append(recipe_place(model, HOW, {}))
    with monkeypatch.context() as patched:
        patched.setattr("latentdiff.generation.recipe.processor", lambda: "another")
        others.append(recipe_place(model, HOW, {}))
    (model_folder / "generation_config.json").write_text("{}")
    others.append(recipe_place(model, HOW, {}))
    assert len({place, *others}) == 6
    for nothing in (str(model_folder / "unet"), str(model_folder / "model_index.json"), "owner/name", "a\0b"):
        assert recipe_place(nothing, HOW, {}) is None


@pytest.mark.parametrize("what", ["recipes", "layouts"])
def test_what_is_damaged_is_made_anew(what: str, draw: Draw, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = draw()
    damage(cache, what)
    assert draw(light=what == "layouts") == expected
    assert draw(light=True) == expected and capsys.readouterr().err == ""


def test_a_damaged_conversion_is_made_anew(
    read_at_once: None, draw: Draw, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = draw()
    damage(cache, "openvino")
    shutil.rmtree(cache / "layouts")
    capsys.readouterr()
    assert draw() == expected  # by torch
    said = capsys.readouterr().err
    assert "is damaged" in said and "converting the U-Net" in said
    assert draw(light=True) == expected and capsys.readouterr().err == ""


def damage(cache: Path, what: str) -> None:
    for file in (path for path in cache.glob(f"{what}/*/*") if path.name != conversions.CONTENTS):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


def test_layouts_that_are_gone_are_made_from_the_conversion(draw: Draw, cache: Path) -> None:
    expected = draw()
    before = {place.name for place in cache.glob("layouts/*")}
    shutil.rmtree(cache / "layouts")
    assert draw(light=True) == expected
    assert {place.name for place in cache.glob("layouts/*")} == before and len(before) == 4


def test_where_nothing_can_be_kept_it_is_said(draw: Draw, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "recipes").write_text("a file")
    drawn = draw()
    assert "cannot write to" in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert draw() == drawn


def test_of_large_networks_no_layouts_are_kept(draw: Draw, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "LARGEST", 1)
    expected = draw()
    assert not (cache / "layouts").exists() and draw(light=True) == expected


def test_noise_that_is_not_that_of_torch_has_no_recipe(
    draw: Draw, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_recipe, "agrees_with_torch", lambda: False)
    draw()
    assert not (cache / "recipes").exists()


def test_other_engines_and_precisions_have_no_recipe(pipe: Pipeline, cache: Path, tmp_path: Path) -> None:
    half = pipe.to(dtype="bfloat16")
    half = Pipeline(half.components, engine=OpenVINO(torch.float32))
    for other in (pipe, half):
        make_recipe.keep_recipe(other.make_job(""), tmp_path / "recipe")
    assert not (tmp_path / "recipe").exists()

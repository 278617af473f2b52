"""From the values on a page to what is drawn, and from a picture's record back to them; no browser is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentdiff import InputError, Pipeline, Settings
from latentdiff.checkpoints import Components
from latentdiff.generation.options import options_of
from latentdiff.serve.http.errors import ApiError
from latentdiff.serve.http.limits import Limits
from latentdiff.serve.http.loras import Loras
from latentdiff.serve.http.models import Models
from latentdiff.serve.page.asked import page_order
from latentdiff.serve.page.controls import ELSEWHERE
from latentdiff.serve.page.events import Events
from latentdiff.serve.page.layout import Parts
from latentdiff.serve.page.modes import MODES, modes_of
from latentdiff.serve.page.records import values_of_file, values_of_infotext
from tests.models.tiny import noise_picture

LIMITS = Limits()


@pytest.fixture
def models(pipe: Pipeline, upscaler: Pipeline) -> Models:
    return Models({"tiny": pipe, "large": upscaler}, Loras(None, LIMITS))


@pytest.fixture
def picture(tmp_path: Path) -> str:
    noise_picture(32, 32).save(tmp_path / "given.png")
    return str(tmp_path / "given.png")


def options(models: Models, **values: Any) -> dict[str, Any]:
    """Return what is handed in for values of a page."""
    found = page_order({"mode": "text", "prompt": "fox", "seed": "3", **values}, models, LIMITS).options
    return {name: value for name, value in found.items() if name not in ("prompt", "seed")}


def test_only_what_is_chosen_is_asked_for(models: Models) -> None:
    untouched = dict.fromkeys(options_of(Settings), "") | {"prompt_weights": True, "num_images": 1, "size": "auto"}
    assert options(models, **untouched | {"seed": "3"}) == {"num_images": 1}
    chosen = options(models, num_inference_steps="9", guidance_scale="2.5", guidance_interval="0.3,5", size="48x32")
    assert chosen == {
        "num_images": 1,
        "num_inference_steps": 9,
        "guidance_scale": 2.5,
        "guidance_interval": (0.3, 5.0),
        "width": 48,
        "height": 32,
    }
    assert options(models, prompt_weights=False)["prompt_weights"] is False


def test_options_of_other_ways_to_draw_are_left_alone(models: Models, picture: str) -> None:
    stale = {"noise_level": "50", "image_strength": 0.4, "hires": "2", "left": 16, "size": "48x32", "image": picture}
    assert options(models, **stale) == {"num_images": 1, "hires": 2.0, "width": 48, "height": 32}
    changed = options(models, **stale, mode="image")
    assert changed.pop("image").size == (32, 32)
    assert changed == {"num_images": 1, "strength": 0.4, "width": 48, "height": 32}
    extended = options(models, **stale, mode="outpaint", extended=picture, right=0, top=None)
    assert extended.pop("image").size == (32, 32)
    assert extended == {"num_images": 1, "outpaint": {"left": 16}}
    enlarged = page_order({**stale, "mode": "upscale", "enlarged": picture, "prompt": ""}, models, LIMITS)
    assert enlarged.model == "large" and enlarged.options["noise_level"] == 50


def test_strokes_become_a_mask(models: Models, picture: str, tmp_path: Path) -> None:
    layer = Image.new("RGBA", (64, 64))
    layer.paste((249, 115, 22, 255), (16, 16, 32, 48))
    layer.paste((249, 115, 22, 40), (48, 48, 64, 64))  # the soft edge of a brush
    layer.save(tmp_path / "layer.png")
    painted = {"background": picture, "layers": [str(tmp_path / "layer.png")], "composite": picture}
    mask = np.asarray(options(models, mode="inpaint", painted=painted, inpaint_strength=1)["mask"])
    assert mask.shape == (32, 32)
    assert (mask[9:23, 9:15] == 255).all() and mask.sum() <= 255 * 18 * 10 and set(np.unique(mask)) == {0, 255}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"prompt": " "}, "a prompt says what to draw"),
        ({"mode": "paint"}, "mode must be one of"),
        ({"mode": "image"}, "image needs a picture, got none"),
        ({"mode": "inpaint"}, "needs a picture to paint on"),
        ({"mode": "inpaint", "painted": {"background": None, "layers": []}}, "needs a picture to paint on"),
        ({"mode": "upscale"}, "upscale needs a picture"),
        ({"mode": "image", "image": "/none/here.png"}, "no longer here; choose it again"),
        ({"num_inference_steps": "1e9"}, "num_inference_steps"),
        ({"num_inference_steps": "500"}, "steps must stay within 200"),
        ({"guidance_scale": "nan"}, "guidance_scale must be a finite number"),
        ({"num_images": 11}, "the number of pictures must stay within 10"),
        ({"size": "large"}, "size must be auto"),
        ({"sampler": "eulr"}, "euler"),
        ({"model": "other"}, "is not served here"),
    ],
)
def test_what_cannot_be_drawn(models: Models, values: dict[str, Any], says: str) -> None:
    with pytest.raises((ApiError, InputError), match=says):
        order = page_order({"mode": "text", "prompt": "fox", **values}, models, LIMITS)
        order.pipe.make_job(**order.options)  # as handing it in does


def test_a_mask_needs_strokes_and_a_model_its_task(pipe: Pipeline, models: Models, picture: str) -> None:
    with pytest.raises(InputError, match="paint over that part"):
        options(models, mode="inpaint", painted={"background": picture, "layers": []})
    alone = Models({"tiny": pipe}, Loras(None, LIMITS))
    with pytest.raises(InputError, match="serve embedded-upscale besides"):
        options(alone, mode="upscale", enlarged=picture)


@pytest.mark.parametrize(
    "asked",
    [
        {"num_inference_steps": 3, "sampler": "dpmpp_2m_karras", "guidance_scale": 3.5, "guidance_rescale": 0.7},
        {"sigmas": (5.0, 1.0, 0.2), "negative_prompt": "blue", "width": 48, "height": 40, "hires": 2.0},
        {"num_inference_steps": 2, "variation_strength": 0.2, "variation_seed": 4, "prompt_weights": False},
    ],
)
def test_a_record_is_drawn_again(models: Models, pipe: Pipeline, tmp_path: Path, asked: dict[str, Any]) -> None:
    drawn = pipe("a red fox", seed=5, **asked)
    drawn.save(tmp_path / "fox.png")
    values, note = values_of_file(str(tmp_path / "fox.png"), models)
    assert note == ""
    order = page_order(values, models, LIMITS)
    again = order.pipe(**order.options)
    assert (np.asarray(again.images[0]) == np.asarray(drawn.images[0])).all()


def test_what_a_record_lacks_is_said(
    models: Models, pipe: Pipeline, picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = pipe("fox", image=picture, outpaint={"left": 8}, num_inference_steps=2)
    drawn.save(tmp_path / "wide.png")
    values, note = values_of_file(str(tmp_path / "wide.png"), models)
    assert (values["mode"], values["left"], values["top"]) == ("outpaint", 8, 0)
    assert note == "choose the picture that it was made of"
    monkeypatch.setattr(Components, "model_hash", "0" * 64)
    assert "its model is not served here" in values_of_file(str(tmp_path / "wide.png"), models)[1]


def test_settings_of_web_uis_are_read(models: Models, pipe: Pipeline) -> None:
    text = (
        "a (red:1.2) fox, snow\nNegative prompt: blue\nSteps: 12, Sampler: DPM++ 2M, Schedule type: Karras, "
        f"CFG scale: 4.5, Seed: 99, Size: 48x32, Model hash: {pipe.components.model_hash[:10]}, Clip skip: 2"
    )
    values, note = values_of_infotext(text, models)
    assert note == "" and values["clip_skip"] == "1"
    del values["clip_skip"]  # which a text encoder of another kind lacks
    found = page_order(values, models, LIMITS).options
    assert found == {
        "prompt": "a (red:1.2) fox, snow",
        "negative_prompt": "blue",
        "sampler": "dpmpp_2m_karras",
        "seed": 99,
        "num_inference_steps": 12,
        "guidance_scale": 4.5,
        "num_images": 1,
        "width": 48,
        "height": 32,
    }
    note = values_of_infotext("fox\nSteps: 3, Sampler: Odd, CFG scale: 2, Model: other", models)[1]
    assert (
        note
        == "its sampler Odd is not known here; its model other is not served here, so that another picture comes out"
    )
    with pytest.raises(InputError, match="must hold settings"):
        values_of_infotext("a text", models)


def test_every_option_is_somewhere() -> None:
    for name, declared in options_of(Settings).items():
        assert modes_of(name, declared) or name in ELSEWHERE
    assert all(mode in MODES for name, declared in options_of(Settings).items() for mode in modes_of(name, declared))


def test_a_lora_is_written_into_the_prompt() -> None:
    events = Events(Parts(values={"prompt": "the prompt"}, lora="the list"), studio=None, desktop=None)  # type: ignore[arg-type]
    assert events.add_lora("a fox", "style") == {"the prompt": "a fox <lora:style:0.8>", "the list": None}
    assert events.add_lora(None, "style") == {"the prompt": "<lora:style:0.8>", "the list": None}
    assert events.add_lora("a fox", None) == {"the list": None}

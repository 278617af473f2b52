"""The page in a browser: what is drawn, cancelled, painted, enlarged and drawn again."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page
from torch import Tensor

from latentdiff import Pipeline, Settings
from latentdiff.generation.result import read_record
from latentdiff.images import open_image
from latentdiff.serve.http.limits import Limits
from tests.models.tiny import noise_picture
from tests.serve.gate import Gate, eventually
from tests.serve.page.conftest import Hands, Open, Opened

At = Callable[[Opened], Hands]

BRUSH = (249, 115, 22)  # its colour


def test_a_prompt_is_drawn_several_times(server: Opened, hands: At) -> None:
    page = hands(server)
    page.write("Prompt", "a red fox")
    page.write("Steps", "3")
    page.write("Seed", "7")
    page.tab.locator("#option-num_images input[type=number]").fill("2")
    page.draw()
    page.look("drawn")
    assert read_record(page.saved())["seed"] == 7
    page.press("Picture 2", "#stage")
    page.tab.get_by_text("seed 8").wait_for()
    record = read_record(page.saved())
    assert (record["prompt"], record["num_inference_steps"], record["seed"]) == ("a red fox", 3, 8)
    assert page.tab.locator("#history li").count() == 1


def test_previews_come_and_a_drawing_is_cancelled(gate: Gate, open_page: Open, hands: At) -> None:
    server = open_page({"tiny": gate.pipe})
    page = hands(server)
    page.write("Prompt", "fox")
    page.press("Draw")
    gate.arrive()
    gate.let(8)
    page.tab.get_by_alt_text("Preview of picture 1").wait_for()
    page.says(r"Step \d+ of 25")
    page.look("drawing")
    page.press("Cancel")
    assert page.says("Cancelled") == "Cancelled."
    gate.open()
    eventually(lambda: not server.server.desk.busy)
    assert server.server.scheduler.stats().cancelled == 1
    page.tab.get_by_role("button", name="Draw", exact=True).wait_for()
    assert page.tab.get_by_role("button", name="Cancel", exact=True).count() == 0


def test_a_page_that_is_closed_leaves_nothing_being_drawn(gate: Gate, open_page: Open, hands: At, tab: Page) -> None:
    server = open_page({"tiny": gate.pipe})
    page = hands(server)
    page.write("Prompt", "fox")
    page.press("Draw")
    gate.arrive()
    tab.close()
    eventually(lambda: server.server.scheduler.stats().cancelled == 1)
    gate.open()


@pytest.mark.long
def test_what_is_painted_over_is_drawn_anew(server: Opened, hands: At) -> None:
    page = hands(server)
    page.write("Prompt", "cat")
    page.write("Steps", "3")
    page.draw()
    before = open_image(page.saved("before.png"))
    page.press("Inpaint", "#stage")
    page.says("Paint over")
    _paint(page)
    page.look("painted")
    page.press("Draw")
    page.says("Done in")
    page.tab.wait_for_function("document.querySelectorAll('#history li').length === 2")
    page.look("inpainted")
    after = page.saved("after.png")
    assert read_record(after)["mask"] is not None
    changed = np.abs(np.asarray(open_image(after), int) - np.asarray(before, int)).max(axis=2) > 0
    assert changed[12:20, 12:20].any() and not changed[:4].any() and not changed[-4:].any()
    page.press("Upscale", "#stage")  # which has gradio make the editor anew
    page.says("enlarge")
    page.press("Inpaint", "#stage")
    page.says("Paint over")
    _paint(page)
    page.press("Draw")
    page.tab.wait_for_function("document.querySelectorAll('#history li').length === 3")


def test_a_picture_is_enlarged(server: Opened, hands: At) -> None:
    page = hands(server)
    page.write("Prompt", "cat")
    page.write("Steps", "2")
    page.draw()
    page.press("Upscale", "#stage")
    page.says("enlarge")
    page.tab.wait_for_function("document.querySelector('.in-upscale img')?.naturalWidth === 32")
    page.draw()
    page.tab.get_by_text("128x128").wait_for()
    page.look("enlarged")
    assert open_image(page.saved()).size == (128, 128)


def test_a_picture_of_the_history_is_drawn_again(server: Opened, hands: At) -> None:
    page = hands(server)
    page.write("Prompt", "a red fox")
    page.write("Steps", "2")
    page.draw()
    first = page.saved("first.png")
    page.write("Prompt", "a blue cat")
    page.draw()
    page.tab.locator("#history button").nth(1).click()
    page.tab.wait_for_function("document.querySelector('#prompt textarea').value === 'a red fox'")
    page.press("Draw again", "#stage")
    page.tab.wait_for_function("document.querySelectorAll('#history li').length === 3")
    page.says("Done in")
    again = page.saved("again.png")
    assert read_record(again) == read_record(first)
    assert (np.asarray(open_image(again)) == np.asarray(open_image(first))).all()


def test_settings_are_read_from_a_picture(server: Opened, hands: At, pipe: Pipeline, tmp_path: Path) -> None:
    drawn = pipe("a fox", num_inference_steps=3, sampler="heun", seed=11, guidance_scale=4.0, width=48)
    drawn.save(tmp_path / "dropped.png")
    noise_picture(8, 8).save(tmp_path / "nothing.png")
    page = hands(server)
    page.unfold("Settings from a picture")
    page.tab.locator("#read input[type=file]").set_input_files(tmp_path / "nothing.png")
    assert "must hold latentdiff's settings" in page.says("settings")
    page.tab.locator("#read").get_by_role("button", name="Clear").click()
    page.tab.locator("#read input[type=file]").set_input_files(tmp_path / "dropped.png")
    page.says("These are the settings")
    page.look("read")
    assert page.tab.get_by_label("Seed", exact=True).input_value() == "11"
    page.draw()
    assert (np.asarray(open_image(page.saved())) == np.asarray(drawn.images[0])).all()


def test_the_keyboard_is_enough(server: Opened, hands: At) -> None:
    page = hands(server)
    keys = page.tab.keyboard
    page.write("Steps", "2")
    page.tab.get_by_label("Prompt", exact=True).focus()
    keys.type("fox")
    keys.press("Control+Enter")
    page.says("Done in")
    page.tab.get_by_role("link", name="Save PNG").focus()
    keys.press("Tab")
    keys.press("Enter")  # Draw again
    page.tab.wait_for_function("document.querySelectorAll('#history li').length === 2")
    page.says("Done in")
    page.tab.get_by_role("radio", name="Text").focus()
    keys.press("ArrowRight")
    page.tab.get_by_text("Picture to change").wait_for()
    assert page.tab.get_by_role("radio", name="Image").is_checked()


def test_bad_input_is_one_line(server: Opened, hands: At, tmp_path: Path) -> None:
    page = hands(server)
    page.press("Draw")
    assert page.says("prompt") == "a prompt says what to draw, got none; write one"
    page.write("Prompt", "fox")
    page.write("Steps", "many")
    page.press("Draw")
    assert re.fullmatch("num_inference_steps: .*got 'many'", page.says("many"))
    page.write("Steps", "3")
    page.write("Seed", "-1")
    page.press("Draw")
    assert page.says("seed").startswith("seed must be a whole number from 0")
    page.write("Seed", "")
    page.choose("Inpaint")
    page.press("Draw")
    assert page.says("picture") == "inpaint needs a picture to paint on, got none; choose one first"
    page.choose("Image")
    noise_picture(5000, 4000).save(tmp_path / "large.jpg", quality=20)
    page.tab.locator(".in-image input[type=file]").set_input_files(tmp_path / "large.jpg")
    page.tab.locator(".in-image img").first.wait_for()
    page.press("Draw")
    assert "16,777,216 pixels" in page.says("pixels")
    assert page.tab.locator("#status [role=alert]").count() == 1


def test_a_full_queue_and_a_model_that_fails_are_one_line(gate: Gate, open_page: Open, hands: At) -> None:
    server = open_page({"tiny": gate.pipe}, limits=Limits(queue=1), batch=1)
    running = server.server.scheduler.submit("first")
    gate.arrive()
    waiting = server.server.scheduler.submit("second")
    page = hands(server)
    page.write("Prompt", "fox")
    page.press("Draw")
    assert page.says("wait already") == "1 jobs wait already, which is the most that may; try again later"

    def broken(sample: Tensor) -> None:
        raise RuntimeError("a fault of the model")

    gate.refuse = broken
    waiting.cancel()
    running.cancel()
    gate.open()
    page.press("Draw")
    assert page.says("failed") == "the server failed; its log says why"
    gate.refuse = lambda sample: None
    page.draw()


def test_every_option_has_a_control(server: Opened, hands: At) -> None:
    page = hands(server)
    page.unfold("More settings")
    names = {item.name for item in fields(Settings)} - {
        "prompts",
        "negative_prompt",
        "strength",
        "outpaint",
        "width",
        "height",
    }
    there = page.tab.locator("[id^=option-]").evaluate_all("all => all.map(one => one.id.slice(7))")
    assert set(there) == names
    assert not page.tab.locator("#option-noise_level").is_visible()
    page.choose("Upscale")
    page.tab.locator("#option-noise_level").wait_for()
    assert not page.tab.locator("#option-hires").is_visible()


@pytest.mark.long
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_keeps_anyone_out(server: Opened, hands: At, theme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = hands(server)
    if theme == "dark":
        page.press("Dark or light")
    page.write("Prompt", "fox")
    page.write("Steps", "2")
    page.draw()
    page.unfold("More settings")
    for mode in ("Text", "Image", "Inpaint", "Outpaint", "Upscale"):
        page.choose(mode)
        for _ in range(8):  # parts of the page are still being laid out
            page.tab.wait_for_timeout(400)
            faults = Axe().run(page.tab).response["violations"]
            found = [one for one in faults if one["impact"] in ("serious", "critical")]
            if not found:
                break
        assert not found, [(node["html"], node["failureSummary"]) for one in found for node in one["nodes"]]
        page.look(f"{theme}-{mode}")
    page.tab.set_viewport_size({"width": 390, "height": 844})
    page.tab.wait_for_timeout(300)
    page.look(f"{theme}-phone")
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= 390


def _paint(page: Hands) -> None:
    """Paint a stroke over the middle of the picture, as often as it takes: the brush may not be there yet."""
    canvas = page.tab.locator("#editor canvas").first

    def painted() -> bool:
        box = canvas.bounding_box()
        assert box is not None
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.tab.mouse.move(middle[0] - 30, middle[1])
        page.tab.mouse.down()
        page.tab.mouse.move(middle[0] + 30, middle[1], steps=4)
        page.tab.mouse.up()
        page.tab.mouse.move(0, 0)
        page.tab.wait_for_timeout(300)
        seen = np.asarray(Image.open(BytesIO(canvas.screenshot())).convert("RGB"))
        return bool((seen[seen.shape[0] // 2, seen.shape[1] // 2] == BRUSH).all())

    eventually(painted)

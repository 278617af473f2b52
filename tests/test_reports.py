"""What the model cards say was measured is what the reports say, and the models are those that were measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentdiff import Pipeline
from latentdiff.evaluate.report import lines, read_report

ROOT = Path(__file__).resolve().parent.parent
REPORTS = {
    "embedded": "assets/emoji/README.md",
    "embedded-inpaint": "assets/emoji-inpaint/README.md",
    "embedded-upscale": "assets/emoji-upscale/README.md",
}


@pytest.mark.parametrize("name", REPORTS)
def test_cards_have_the_figures_of_the_reports(name: str) -> None:
    subject, figures = read_report(ROOT / "docs/reports" / name)
    told = "\n".join(lines(figures))
    assert subject["model"] == name and figures
    assert f"```\n{told}\n```" in (ROOT / REPORTS[name]).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", REPORTS)
def test_reports_are_of_the_models_that_ship(name: str) -> None:
    subject, _ = read_report(ROOT / "docs/reports" / name)
    assert subject["model_hash"] == Pipeline.from_pretrained(name).components.model_hash

"""The programs that say what a large job costs: a published case comes out, and a job with faults comes to its end."""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from latentdiff.scale.plan import Head, Plan, Repeats, compare

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def paper() -> Any:
    return argparse.Namespace(**runpy.run_path(str(BENCHMARKS / "scale_plan.py")))


@pytest.mark.parametrize(("gpus", "days"), [(8, 81.33), (16, 40.42), (32, 20.06), (64, 10.14), (128, 5.51)])
def test_days_of_training_are_those_that_were_published(paper: Any, gpus: int, days: float) -> None:
    """Of one throughput and one bandwidth of gradients, for all numbers of GPUs; MosaicML 2023, README of diffusion."""
    given = yaml.safe_load((BENCHMARKS / "scale_prices.yaml").read_text())
    flops, amounts = {"weights": 859_520_964 / 1e12}, given["training"]
    seconds = sum(paper.step_seconds(given, flops, side, gpus)[0] * paper.steps(amounts, side) for side in (256, 512))
    assert seconds / 86_400 == pytest.approx(days, rel=0.05)


def test_flops_are_those_of_stable_diffusion(paper: Any) -> None:
    counted = paper.count_flops()
    assert counted["weights"] * 1e12 == 859_520_964
    assert counted["unet_512"] == pytest.approx(0.803, rel=0.01) and counted["decode_512"] == pytest.approx(
        2.5, rel=0.02
    )


def test_a_simulated_job_with_faults_writes_every_shard() -> None:
    simulation = argparse.Namespace(**runpy.run_path(str(BENCHMARKS / "scale_simulation.py")))
    options = argparse.Namespace(
        rows=300_000,
        shard_size=256,
        seconds=0.5,
        spread=0.2,
        node_hours=1.0,
        away=300.0,
        driver_hours=1.0,
        restart=300.0,
        slow=0.05,
        hang=0.003,
        seed=1,
    )
    figures = simulation.simulated(options, 32)
    assert figures["nodes"] and figures["drivers"] and figures["hung"] and figures["doubled"]
    assert figures["ideal_hours"] < figures["hours"] < 2 * figures["ideal_hours"]
    assert 0 < figures["lost_share"] < 0.1 and figures["useful_share"] > 0.5


def test_equal_rows_are_counted_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}" for number in range(20_000)]
    exact = Repeats()
    exact.add([*names, *names[:300], names[0]])
    assert exact.count == 301
    monkeypatch.setattr("latentdiff.scale.plan.MOST_NAMES", 1000)
    about, none = Repeats(), Repeats()
    for first in range(0, len(names), 100):
        none.add(names[first : first + 100])
        about.add([*names[first : first + 100], *names[first : first + 50]])
    assert none.count == 0 and len(none._kept) <= 1000
    assert about.count == pytest.approx(10_000, rel=0.2)


def test_shards_are_compared_by_their_heads() -> None:
    class Written:
        def list(self, folder: str) -> set[str]:
            return {"manifests": {"a.jsonl", "c.jsonl"}, "shards": {"a.tar"}}.get(folder, set())

    heads = [Head(0, "a", 2), Head(1, "b", 2), Head(2, "c", 1)]
    store: Any = Written()
    expected = Plan(5, 3, frozenset("abc"), {1: 2, 2: 1}, frozenset("c"), 0, 0)
    assert compare(heads, "webdataset", store) == expected

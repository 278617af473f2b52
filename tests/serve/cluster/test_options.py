"""The options of the application: from a file or the command line, refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from latentdiff.cli import main
from latentdiff.errors import InputError
from latentdiff.serve.cluster.options import Options
from latentdiff.serve.cluster.router import ADMITTED, replicas_wanted

EXAMPLES = Path(__file__).parents[3] / "examples/serving"
TOKEN = "a-token-of-sixteen-and-more"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"replica": 2}, "option replica: .*did you mean 'replicas'"),
        ({"replicas": 0}, "option replicas: .*greater than or equal to 1"),
        ({"replicas": 4, "max_replicas": 2}, "max_replicas must be 4 or more, got 2"),
        ({"models": ["runs/fox", "other/fox"]}, "names of their own, got fox, fox"),
        ({"host": "0.0.0.0"}, "needs a token"),
        ({"proxies": ["0.0.0.0/0"], "token": TOKEN}, "a proxy must be"),
        ({"token_file": "nowhere"}, "token_file nowhere cannot be read"),
    ],
)
def test_what_cannot_be_used_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Options.read(given)


def test_the_token_is_that_of_a_file_and_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert Options.read({"token_file": str(tmp_path / "token"), "host": "0.0.0.0"}).secret == TOKEN
    assert TOKEN not in repr(Options.read({"token": TOKEN}))


def test_the_example_is_one(tmp_path: Path) -> None:
    whole = yaml.safe_load((EXAMPLES / "serve.yaml").read_text())
    (application,) = whole["applications"]
    assert application["import_path"] == "latentdiff.serve.cluster.application:build"
    (tmp_path / "token").write_text(TOKEN)
    options = Options.read({**application["args"], "token_file": str(tmp_path / "token")})
    assert options.host == whole["http_options"]["host"] and options.max_replicas


@pytest.mark.parametrize(("admitted", "answering", "wanted"), [(0, 0, 0), (9, 2, 2), (3, 17, 3), (8, 8, 1)])
def test_there_are_as_many_replicas_as_jobs_need(admitted: int, answering: int, wanted: int) -> None:
    context = SimpleNamespace(
        aggregated_metrics={ADMITTED: {"a": admitted / 2, "b": admitted / 2}},
        total_num_requests=answering,
        config=SimpleNamespace(target_ongoing_requests=8.0),
    )
    assert replicas_wanted(context)[0] == wanted
    context.aggregated_metrics = None
    assert replicas_wanted(context)[0] == -(-answering // 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--replicas", "2", "--ui"], "--ui is for one server"),
        (["--replicas", "2", "--name", "a"], "--name is for one server"),
        (["--replicas", "2", "--host", "0.0.0.0"], "needs a token"),
        (["--max-replicas", "2"], "--max-replicas is for several replicas, got one server; add --replicas 2"),
    ],
)
def test_the_command_refuses_what_does_not_go_together(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *words]) == 2
    assert message in capsys.readouterr().err

"""Rows: what their cells mean, and what a picture is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latentdiff.errors import InputError
from latentdiff.scale.rows import Columns, Maker, Row, read_rows
from latentdiff.scale.table import open_table
from tests.scale.small import write_table

MAKER = Maker({"model_hash": "0"})


def rows_of(tmp_path: Path, rows: list[dict[str, Any]], maker: Maker = MAKER, kept: tuple[str, ...] = ()) -> list[Row]:
    return list(read_rows(open_table(write_table(tmp_path / "rows.jsonl", rows)), maker, Columns(kept)))


def names_of(tmp_path: Path, rows: list[dict[str, Any]], maker: Maker = MAKER, kept: tuple[str, ...] = ()) -> list[str]:
    name = maker.namer()
    return [name(row) for row in rows_of(tmp_path, rows, maker, kept)]


def test_columns_set_options_by_their_names_and_by_what_their_flags_are_called(tmp_path: Path) -> None:
    flags = {"prompt": "a", "steps": 2, "guidance": 3, "negative": "b", "size": "64x48", "n": None}
    del flags["n"]
    full = {"prompt": "a", "num_inference_steps": 2, "guidance_scale": 3.0, "negative_prompt": "b"}
    one, other = rows_of(tmp_path, [flags, {**full, "width": 64, "height": 48}])
    assert one.settings == other.settings
    assert one.settings["num_inference_steps"] == 2 and one.settings["height"] == 48


def test_text_of_a_csv_means_what_a_number_means(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('prompt,seed,steps,guidance,prompt_weights,guidance_interval,outpaint\na,7,2,3,false,"0.3,5",\n')
    (row,) = read_rows(open_table(str(file)), MAKER, Columns())
    typed = {"seed": 7, "num_inference_steps": 2, "guidance_scale": 3.0, "prompt_weights": False}
    assert row.settings == {**typed, "guidance_interval": (0.3, 5.0)}
    (same,) = rows_of(tmp_path, [{"prompt": "a", **typed, "seed": 7.0, "guidance_interval": [0.3, 5]}])
    assert MAKER.namer()(row) == MAKER.namer()(same)


def test_a_cell_that_cannot_be_read_stays_for_the_row_to_fail(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,seed,steps\na,x,1.5\n")
    (row,) = read_rows(open_table(str(file)), MAKER, Columns())
    assert row.settings == {"seed": "x", "num_inference_steps": 1.5}


def test_empty_cells_say_nothing(tmp_path: Path) -> None:
    one, other = rows_of(tmp_path, [{"prompt": "a", "seed": None, "image": ""}, {"prompt": "a"}])
    assert one.settings == other.settings == {} and one.image is None


def test_an_option_in_two_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must say num_inference_steps once, got it in two columns"):
        rows_of(tmp_path, [{"prompt": "a", "steps": 2, "num_inference_steps": 3}])


def test_defaults_of_the_job_may_ask_for_several_pictures_of_each_row(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [{"prompt": "a"}, {"prompt": "b", "num_images": 1}], Maker({}, {"num_images": 2}))
    assert [(row.number, row.copy) for row in rows] == [(1, 0), (1, 1), (2, 0)]


@pytest.mark.parametrize(
    ("column", "message"),
    [("promt", r"a column 'promt', which is no setting; did you mean 'prompt'\?"), ("zzz", "--keep zzz writes it")],
)
def test_an_unknown_column_is_refused_with_the_nearest(tmp_path: Path, column: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rows_of(tmp_path, [{"prompt": "a"}, {column: "a"}])


def test_columns_that_are_kept_do_not_change_names(tmp_path: Path) -> None:
    given = [{"prompt": "a", "id": 1, "source": "x"}, {"prompt": "a"}]
    rows = rows_of(tmp_path, given, kept=("source",))
    assert rows[0].kept == {"id": 1, "source": "x"} and rows[1].kept == {}
    one, other = names_of(tmp_path, given, kept=("source",))
    assert one == other


def test_what_changes_a_picture_changes_its_name(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"one")
    (tmp_path / "a.safetensors").write_bytes(b"two")
    rows: list[dict[str, Any]] = [
        {"prompt": "a"},
        {"prompt": "b"},
        {"prompt": "a", "seed": 1},
        {"prompt": "a", "steps": 25},  # a model may have another default
        {"prompt": "a", "image": "cat.png"},
        {"prompt": "a", "image": "cat.png", "strength": 1.0},
        {"prompt": "a", "image": "cat.png", "mask": "alpha"},
        {"prompt": "a", "image": "cat.png", "mask": [0, 0, 8, 8]},
        {"prompt": "a", "lora": "a.safetensors"},
        {"prompt": "a", "lora": "a.safetensors:0.5"},
    ]
    names = names_of(tmp_path, rows)
    assert len(set(names)) == len(rows) and all(len(name) == 32 for name in names)
    assert names_of(tmp_path, [{"prompt": "a", "seed": 0, "eta": 0}])[0] == names[0]  # as if nothing was said
    (tmp_path / "cat.png").rename(tmp_path / "moved.png")
    assert names_of(tmp_path, [{"prompt": "a", "image": "moved.png"}])[0] == names[4]
    (tmp_path / "moved.png").write_bytes(b"other")
    assert names_of(tmp_path, [{"prompt": "a", "image": "moved.png"}])[0] != names[4]
    assert not set(names) & set(names_of(tmp_path, rows, Maker({"model_hash": "1"})))


def test_a_name_stays_what_it_was(tmp_path: Path) -> None:
    """It is in outputs that people have: whoever changes how it is made has to raise NAMING."""
    assert names_of(tmp_path, [{"prompt": "a red fox", "seed": 7}]) == ["090d82e693fe721bee11694c13309368"]


def test_defaults_of_the_job_are_those_of_rows_that_say_nothing(tmp_path: Path) -> None:
    maker = Maker({"model_hash": "0"}, {"seed": 5, "num_inference_steps": 3}, (("a.safetensors", (1.0,)),))
    one, other = rows_of(
        tmp_path, [{"prompt": "a"}, {"prompt": "a", "seed": 6, "lora": ["b.safetensors:1,0.5"]}], maker
    )
    assert one.settings == {"seed": 5, "num_inference_steps": 3} and one.loras == (("a.safetensors", (1.0,)),)
    assert other.settings["seed"] == 6 and other.loras == ((str(tmp_path / "b.safetensors"), (1.0, 0.5)),)


def test_a_row_of_several_pictures(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [{"prompt": "a", "seed": 3, "num_images": 3}, {"prompt": "b", "num_images": 0}])
    assert [(row.number, row.copy, row.settings["seed"]) for row in rows[:3]] == [(1, 0, 3), (1, 1, 4), (1, 2, 5)]
    assert rows[3].settings == {"num_images": 0}  # refused when it is drawn
    varied = rows_of(tmp_path, [{"prompt": "a", "variation_strength": 0.5, "num_images": 2}])
    assert [row.settings.get("variation_seed", 0) for row in varied] == [0, 1]


def test_several_loras_of_a_row(tmp_path: Path) -> None:
    both = ((str(tmp_path / "a"), (0.5,)), (str(tmp_path / "b"), (1.0, 0.0)))
    rows = rows_of(
        tmp_path, [{"lora": "a:0.5|b:1,0"}, {"lora": ["a:0.5", "b:1,0"]}, {"lora": {"a": 0.5, "b": [1.0, 0]}}]
    )
    assert all(row.loras == both for row in rows)


def test_lone_surrogates_have_names(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "\ud800"}))
    (row,) = read_rows(open_table(str(file)), MAKER, Columns())
    assert len(MAKER.namer()(row)) == 32

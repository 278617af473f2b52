"""Tables: each kind gives the same rows, and what is not well-formed is refused with the line."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentdiff.errors import InputError
from latentdiff.scale.table import open_table, place_in

ROWS = [{"prompt": "a red fox", "seed": 1}, {"prompt": 'a "cat", black', "seed": 2}]


def read(file: Path) -> list[dict]:
    return list(open_table(str(file)).rows())


def test_each_kind_of_table(tmp_path: Path) -> None:
    jsonl, csv, tsv, parquet = (tmp_path / f"rows.{kind}" for kind in ("jsonl", "csv", "tsv", "parquet"))
    jsonl.write_text('{"prompt": "a red fox", "seed": 1}\n\n{"prompt": "a \\"cat\\", black", "seed": 2}')
    csv.write_bytes('prompt,seed\r\na red fox,1\r\n"a ""cat"", black",2\r\n'.encode("utf-8-sig"))
    tsv.write_bytes('prompt\tseed\na red fox\t1\n"a ""cat"", black"\t2\n'.encode("utf-16"))
    pq.write_table(pa.Table.from_pylist(ROWS), parquet)
    assert read(jsonl) == read(parquet) == ROWS
    assert read(csv) == read(tsv) == [{**row, "seed": str(row["seed"])} for row in ROWS]
    text = tmp_path / "rows.txt"
    text.write_text("a red fox\n\n  a cat, black  \n")
    assert read(text) == [{"prompt": "a red fox"}, {"prompt": "a cat, black"}]
    table = open_table(str(text))
    assert list(table.rows()) == list(table.rows())  # it can be read again


def test_semicolons_and_line_breaks_in_csv(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('prompt;seed\n"one\ntwo";1\n')
    assert read(file) == [{"prompt": "one\ntwo", "seed": "1"}]


def test_a_table_behind_a_url() -> None:
    with fsspec.open("memory://tables/rows.txt", "wb") as file:
        file.write(b"a red fox\n")
    assert list(open_table("memory://tables/rows.txt").rows()) == [{"prompt": "a red fox"}]
    with pytest.raises(InputError, match="cannot be read"):
        open_table("memory://tables/none.txt")
    with pytest.raises(InputError, match="cannot be read"):
        open_table("nothing-like-it://tables/none.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt"\n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1 must be an object"),
        ("a.csv", b"prompt,seed\na cat, black,1\n", r"a\.csv:2 must have 2 cells .* got 3; put text with a ','"),
        ("a.csv", b'prompt\n"a cat\n', r"a\.csv:2 is not CSV"),
        ("a.csv", b"prompt,seed,prompt\n", "once, got 'prompt' twice"),
        ("a.txt", b"a caf\xe9\n", "is not UTF-8"),
        ("a.parquet", b"PAR1PAR1", "is not parquet"),
        ("a.xlsx", b"", r"must be a file in \.txt, \.jsonl"),
    ],
)
def test_what_is_not_well_formed_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        open_table(str(tmp_path / "none.txt"))


def test_files_are_named_relative_to_the_table() -> None:
    assert place_in("tables/rows.csv", "cat.png") == "tables/cat.png"
    assert place_in("tables/rows.csv", "/data/cat.png") == "/data/cat.png"
    assert place_in("s3://bucket/rows.csv?version=1", "in/cat.png") == "s3://bucket/in/cat.png"
    assert place_in("tables/rows.csv", "s3://bucket/cat.png") == "s3://bucket/cat.png"

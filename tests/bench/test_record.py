"""Benchmark files: round trip, interrupted runs, malformed lines."""

import json
import math
import pathlib
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopt_ext.bench import record
from jaxopt_ext.bench.record import Row

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from rows import ENVIRONMENT, every_row

ROW = Row(suite="s", problem="p", package="x", solver="a")


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def same(a, b):
    return repr(a) == repr(b)  # NaN equals itself there


def test_round_trip(tmp_path):
    rows = every_row()
    path = write(
        tmp_path / "a.jsonl",
        record.environment_json(ENVIRONMENT),
        *(row.to_json() for row in rows),
    )
    found, environments = record.read(path)
    assert len(found) == len(rows)
    assert all(same(a, b) for a, b in zip(found, rows, strict=True))
    assert environments["abc123"]["versions"] == ENVIRONMENT["versions"]


@settings(deadline=None, max_examples=60, database=None)
@given(f=st.floats(), work=st.floats(), text=st.text(), seed=st.integers(0, 2**31))
def test_any_number_and_text_survives(f, work, text, seed):
    row = Row("s", "p", "x", "a", seed=seed, message=text, f=f, work=work)
    row.history = {"work": [work, 1.0], "f": [f, -math.inf]}
    line = row.to_json()
    assert "\n" not in line
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert same(record.row(json.loads(line)), row)


def test_numpy_numbers_are_written_as_numbers():
    row = Row("s", "p", "x", "a", f=np.float64(1.5), extras={"k": np.int64(3), "bad": np.nan})
    found = json.loads(row.to_json())
    assert (found["f"], found["extras"]) == (1.5, {"k": 3, "bad": "nan"})


def test_a_last_line_cut_short_is_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    second = Row("s", "q", "x", "a").to_json()
    for cut in (1, 20, len(second) - 1):
        path.write_text(f"{ROW.to_json()}\n{second[:cut]}", encoding="utf-8")
        assert [row.problem for row in record.read(path)[0]] == ["p"]


def test_a_last_line_without_its_end_is_not_yet_a_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(ROW.to_json(), encoding="utf-8")
    assert record.read(path)[0] == []
    path.write_text(ROW.to_json() + "\n", encoding="utf-8")
    assert record.read(path)[0] == [ROW]


def test_blank_lines_and_empty_files(tmp_path):
    assert record.read(write(tmp_path / "a.jsonl", "", ROW.to_json(), " "))[0] == [ROW]
    assert record.read(write(tmp_path / "b.jsonl")) == ([], {})
    with pytest.raises(FileNotFoundError):
        record.read(tmp_path / "none.jsonl")


@pytest.mark.parametrize("line", ["{", "nonsense", "[1, 2]", "3", '{"suite": "s"'])
def test_a_malformed_line_is_named(tmp_path, line):
    path = write(tmp_path / "a.jsonl", ROW.to_json(), line)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: "):
        record.read(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": 99}, "schema is 99, expected 1"),
        ({"colour": 1}, "unknown fields: colour"),
        ({"status": "great"}, "status is 'great', expected one of ok"),
        ({"f": "many"}, "could not convert"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, change, reason):
    fields = {**json.loads(ROW.to_json()), **change}
    path = write(tmp_path / "a.jsonl", ROW.to_json(), json.dumps(fields))
    with pytest.raises(ValueError, match=rf"a\.jsonl, row 2: {reason}"):
        record.read(path)


def test_missing_fields_are_named(tmp_path):
    fields = {k: v for k, v in json.loads(ROW.to_json()).items() if k not in ("suite", "solver")}
    path = write(tmp_path / "a.jsonl", json.dumps(fields))
    with pytest.raises(ValueError, match="missing fields: suite, solver"):
        record.read(path)


@settings(deadline=None, max_examples=60, database=None)
@given(st.binary(max_size=80))
def test_garbage_gives_a_clean_error_or_nothing(tmp_path_factory, garbage):
    path = tmp_path_factory.mktemp("garbage") / "a.jsonl"
    path.write_bytes(garbage)
    try:
        rows, _ = record.read(path)
    except ValueError:  # UnicodeDecodeError is one
        return
    assert rows == []


def test_the_later_row_stands(tmp_path):
    old, new = Row("s", "p", "x", "a", work=1.0), Row("s", "p", "x", "a", work=2.0)
    other = Row("s", "p", "x", "a", config={"k": 1})
    paths = [
        write(tmp_path / "a.jsonl", old.to_json(), other.to_json()),
        write(tmp_path / "b.jsonl", new.to_json()),
    ]
    assert record.read(*paths)[0] == [new, other]


def test_digests_depend_on_content_only():
    assert record.digest({"a": 1, "b": [2.0]}) == record.digest({"b": (2.0,), "a": np.int64(1)})
    assert record.digest({"a": 1}) != record.digest({"a": 2})
    assert len(record.digest(None)) == 12

"""The regression gate: what shuts it, what does not, and what it says."""

import dataclasses
import json
import pathlib
import sys

import pytest

from jaxopt_ext.bench import compare, record
from jaxopt_ext.bench.compare import Gate
from jaxopt_ext.bench.record import Row

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from rows import every_row, odd_rows, solved_rows

ROWS = solved_rows(problems=4)


def changed(rows, change, where=lambda row: True):
    return [dataclasses.replace(r, **change(r)) if where(r) else r for r in rows]


def scaled(factor):
    return lambda r: {"work": r.work * factor}


def first(row):
    return (row.problem, row.contender) == ("problem 00", "jaxopt_ext GradNormSmooth")


def write(path, rows):
    path.write_text("".join(f"{row.to_json()}\n" for row in rows), encoding="utf-8")
    return path


def test_a_file_against_itself_passes(tmp_path):
    path = write(tmp_path / "a.jsonl", every_row())
    code, text = compare.main_compare(path, path)
    assert code == 0 and text.endswith("no regression")
    assert "smooth: work x1.000" in text and "worst" not in text


def test_doubled_work_fails_and_names_the_three_worst(tmp_path):
    base = write(tmp_path / "a.jsonl", ROWS)
    factors = {"problem 00": 2.0, "problem 01": 5.0, "problem 02": 2.0, "problem 03": 2.5}
    ours = [r for r in ROWS if r.contender == "jaxopt_ext SSO" and r.status == "ok"]
    assert len(ours) == 4
    worse = changed(
        changed(ROWS, scaled(2)), lambda r: {"work": r.work / 2 * factors[r.problem]}, ours_in(ours)
    )
    code, text = compare.main_compare(base, write(tmp_path / "b.jsonl", worse))
    assert code == 1 and text.endswith("regression")
    worst = text.split("worst problems:\n")[1].splitlines()[:3]
    assert "smooth/problem 01, jaxopt_ext SSO" in worst[0] and "(x5)" in worst[0]
    assert "smooth/problem 03, jaxopt_ext SSO" in worst[1] and "(x2.5)" in worst[1]
    assert "(x2)" in worst[2]
    assert "in geometric mean, allowed x1.15" in text


def ours_in(rows):
    keys = {row.key for row in rows}
    return lambda row: row.key in keys


@pytest.mark.parametrize(
    ("factor", "where", "code"),
    [
        (1.14, None, 0),
        (1.16, None, 1),
        (1.99, first, 0),
        (2.01, first, 1),
        (0.1, None, 0),
    ],
)
def test_the_limits(factor, where, code):
    new = changed(ROWS, scaled(factor), where or (lambda row: True))
    assert compare.compare(ROWS, new).code == code


def test_each_suite_has_its_own_mean():
    other = solved_rows("other", problems=40)
    new = changed(ROWS, scaled(1.3)) + other
    found = compare.compare(ROWS + other, new)
    assert found.code == 1
    assert found.means["smooth"] == pytest.approx(1.3) and found.means["other"] == 1
    assert compare.compare(ROWS, changed(ROWS, scaled(1.3)), Gate(counts=1.5)).code == 0


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("ok", "missed", 1),
        ("missed", "error", 1),
        ("ok", "timeout", 1),
        ("missed", "ok", 0),
        ("error", "error", 0),
        ("error", "missed", 0),
    ],
)
def test_statuses(old, new, code):
    base, later = (Row("s", "p", "x", "a", status=status) for status in (old, new))
    found = compare.compare([base], [later])
    assert found.code == code
    if code:
        assert found.failures == [f"status {old} -> {new}: s/p, x a, seed 0, float64"]
        assert compare.compare([base], [later], Gate(status=1)).code == 0


def test_times_never_count():
    slow = changed(ROWS, lambda r: {"run_cpu_s": [99.0], "compile_cpu_s": 99.0, "peak_bytes": 1})
    assert compare.compare(ROWS, slow).code == 0


def test_work_of_runs_that_fail_does_not_count():
    base, new = (Row("s", "p", "x", "a", status="missed", work=work) for work in (10.0, 999.0))
    assert compare.compare([base], [new]).code == 0


def test_missing_and_new_rows():
    found = compare.compare(ROWS, ROWS[1:])
    assert found.code == 1 and found.failures[0].startswith("missing: smooth/problem 00")
    found = compare.compare(ROWS[1:], ROWS)
    assert found.code == 0 and "new: smooth/problem 00" in found.text()
    skipped = changed(ROWS, lambda r: {"status": "skipped"}, first)
    assert compare.compare(ROWS, skipped).code == 1
    assert compare.compare(skipped, ROWS).code == 0


def test_a_gate_that_compares_nothing_is_shut():
    assert compare.compare([], []).failures == ["no run is in both files"]
    assert compare.compare([], ROWS).code == 1


def test_work_that_is_no_longer_counted_fails():
    found = compare.compare(ROWS, changed(ROWS, lambda r: {"work": None}, first))
    assert [f.split(":")[0] for f in found.failures] == ["work no longer counted"]


def test_options_are_no_part_of_a_run():
    new = changed(ROWS, lambda r: {"config": {"memory": 20}, "work": 3 * r.work})
    found = compare.compare(ROWS, new)
    assert found.code == 1 and not found.missing


def test_a_baseline_stands_for_its_rows(tmp_path):
    rows = ROWS + odd_rows()
    text = compare.baseline(rows)
    assert text == compare.baseline(rows[::-1])
    assert len(text) < len("".join(row.to_json() for row in rows)) / 4
    path = tmp_path / "ci.json"
    path.write_text(text, encoding="utf-8")
    new = write(tmp_path / "new.jsonl", rows)
    assert compare.main_compare(path, new)[0] == 0
    doubled = write(tmp_path / "doubled.jsonl", changed(rows, scaled(2), lambda r: r.work))
    assert compare.main_compare(path, doubled)[0] == 1
    fields = json.loads(text)["rows"][-1]
    assert set(fields) <= {*compare.IDENTITY, "status", "work", "counts"}
    tried = [row for row in rows if row.status != "skipped"]
    found = {(r.problem, r.contender): (r.status, r.work, r.counts) for r in compare.read(path)}
    assert found == {(r.problem, r.contender): (r.status, r.work, r.counts) for r in tried}
    assert compare.baseline(compare.read(path)) == text


def test_malformed_files_are_named(tmp_path):
    path = tmp_path / "ci.json"
    for content, reason in [
        ('{"kind":"baseline"}', "baseline: 'schema'"),
        ('{"kind":"baseline","schema":1,"rows":[{"suite":"s"}]}', "baseline: missing fields"),
        ('{"kind":"baseline","schema":2,"rows":[{}]}', "baseline: schema is 2"),
        ('{"kind":"baseline","schema":1,"rows":[3]}', "baseline: "),
        ("nonsense\n", "line 1: "),
    ]:
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"ci\.json, {reason}"):
            compare.read(path)
    with pytest.raises(FileNotFoundError):
        compare.read(tmp_path / "none.json")


def test_an_empty_baseline_can_be_read(tmp_path):
    path = tmp_path / "ci.json"
    path.write_text(compare.baseline([]), encoding="utf-8")
    assert compare.read(path) == []


def test_ranks_cover_every_status():
    assert set(compare.RANK) == set(record.STATUSES) and compare.RANK["ok"] == 0

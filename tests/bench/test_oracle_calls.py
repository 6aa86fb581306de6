"""Tables and pictures of the suite `sso` from rows that are known."""

import numpy as np
import pytest

from jaxopt_ext.bench import oracle_calls
from jaxopt_ext.bench.contender import OURS
from jaxopt_ext.bench.record import Row


def run(problem, package, solver, seed, status, work=40.0, error=0.5, **extras):
    return Row(
        "sso",
        problem,
        package,
        solver,
        seed=seed,
        status=status,
        work=work,
        error=error,
        f0=1.0,
        f_star=0.0,
        history={"work": [0.0, 1.0, 10.0, 100.0], "f": [1.0, 0.5, 0.1 * (seed + 1), 0.0]},
        extras={"grad_norms": [1.0, 0.5 + seed, 0.1], **extras},
    )


ROWS = [
    *(run("a", OURS, "SSO m=10", seed, "ok", work) for seed, work in enumerate((30.0, 20.0, 50.0))),
    *(run("a", "optax", "adam", seed, "ok", 40.0) for seed in range(3)),
    run("a", "reference", "SVRG", 0, "ok", 90.0),
    run("a", "reference", "SVRG", 1, "missed"),
    run("a", "optax", "sgd", 0, "missed", error=0.123),
    run("a", "jaxopt", "ArmijoSGD", 0, "skipped"),
    run("b", "optax", "sgd", 0, "timeout", error=None),
    *(
        run(f"cost-{cost}", package, solver, 0, "ok", seconds_per_update=seconds)
        for cost, package, solver, seconds in (
            (100, "optax", "sgd", 1e-3),
            (100, OURS, "SSO m=10", 3e-3),
            (10, "optax", "sgd", 1e-4),
            (10, OURS, "SSO m=10", 1e-3),
            (0, OURS, "SSO m=10", 1e-3),
        )
    ),
]


def text(sheet):
    return [sheet.head, *([cell.text for cell in line] for line in sheet.body)]


def test_calls_are_medians_over_seeds_with_their_range_and_gaps_where_nobody_gets_there():
    sheet = oracle_calls.calls_sheet(ROWS)
    assert text(sheet) == [
        ["problem", "m = 10", "SGD", "Adam", "SVRG"],
        ["a, 3 seeds", "30 (20–50)", "12.3 % left", "40", "1 of 2 seeds: 90"],  # noqa: RUF001
        ["b, 1 seed", "–", "timeout", "–", "–"],  # noqa: RUF001
    ]
    assert [cell.best for cell in sheet.body[0]] == [False, True, False, False, False]
    assert not any(cell.best for cell in sheet.body[1])


def test_costs_are_ratios_to_one_update_of_sgd():
    assert text(oracle_calls.cost_sheet(ROWS))[1:] == [
        ["2 × 10", "0.1 ms", "10"],  # noqa: RUF001
        ["2 × 100", "1 ms", "3"],  # noqa: RUF001
    ]


def test_pictures_show_the_median_and_are_written_beside_the_tables(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row for row in ROWS if row.problem == "a"]
    paths = oracle_calls.write(rows, tmp_path, ["a"])
    assert {path.name for path in paths} == {
        "sso_calls.inc",
        "sso-a-gap.svg",
        "sso-a-gradient.svg",
    }
    picture = (tmp_path / "pictures" / "sso-a-gradient.svg").read_text()
    assert "oracle calls" in picture and "m = 10 1.0e-01" in picture
    gap = oracle_calls._gaps(rows[1])
    np.testing.assert_allclose(gap, [0.5, 0.2, oracle_calls.FLOOR])


def test_command_line_writes_the_tables(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f"{row.to_json()}\n" for row in ROWS))
    assert oracle_calls.main([str(rows), "-o", str(tmp_path)]) == 0
    assert "sso_cost.inc" in capsys.readouterr().out
    assert "| 2 × 100 | 1 ms | 3 |" in (tmp_path / "sso_cost.inc").read_text()  # noqa: RUF001

"""Profiles on hand-made tables, and the identities that hold on any table."""

import math
import pathlib
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopt_ext.bench import profiles
from jaxopt_ext.bench.profiles import Case, Instance, Table
from jaxopt_ext.bench.record import Row

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from rows import every_row, scale_rows, solved_rows

INF, NAN = math.inf, math.nan
CHECKED = settings(deadline=None, max_examples=60, database=None)


def table(values, seeds=1):
    values = np.array(values, dtype=float)
    instances = [Instance(Case("s", f"p{i // seeds}"), i % seeds) for i in range(len(values))]
    return Table(tuple(instances), tuple("abcdef"[: values.shape[1]]), values)


def run(problem="p", solver="a", package="x", **fields):
    return Row(suite="s", problem=problem, package=package, solver=solver, **fields)


HAND = table([[1, 2, 4], [6, 3, INF], [5, 5, 10], [INF, INF, INF], [NAN, 8, 8]])
COSTS = st.one_of(st.just(INF), st.just(NAN), st.floats(1, 1e6))
TABLES = st.integers(2, 4).flatmap(
    lambda columns: st.lists(
        st.lists(COSTS, min_size=columns, max_size=columns), min_size=1, max_size=12
    ).map(table)
)


# ---- performance profiles, scores, wins, ratios ------------------------------------------------


def test_performance_profile_of_a_hand_made_table():
    curves = profiles.performance_profile(HAND)
    np.testing.assert_array_equal(curves.x, [1, 2, 4])
    np.testing.assert_allclose(curves.y["a"], [2 / 5, 3 / 5, 3 / 5])
    np.testing.assert_allclose(curves.y["b"], [3 / 5, 4 / 5, 4 / 5])
    np.testing.assert_allclose(curves.y["c"], [1 / 5, 2 / 5, 3 / 5])
    assert curves.instances == 5


def test_a_tie_within_rounding_is_a_win_for_both():
    curves = profiles.performance_profile(table([[1.0, 1.0 + 1e-13]]))
    assert curves.y["a"][0] == curves.y["b"][0] == 1


@CHECKED
@given(TABLES)
def test_identities_of_performance_profiles(costs):
    curves = profiles.performance_profile(costs)
    solvable = costs.solvable.mean()
    for name, share in curves.y.items():
        assert np.all(np.diff(share) >= -1e-15)
        solved = np.isfinite(costs.values[:, costs.contenders.index(name)]).mean()
        assert share[-1] == pytest.approx(solved)
    assert sum(share[0] for share in curves.y.values()) >= solvable - 1e-12
    assert np.all(np.diff(curves.x) > 0) and curves.x[0] == 1


@CHECKED
@given(TABLES)
def test_the_score_is_the_area_under_the_profile(costs):
    curves = profiles.performance_profile(costs)
    logs = np.append(np.clip(np.log2(curves.x), 0, 5), 5)
    for name, score in profiles.scores(costs).items():
        assert score == pytest.approx(np.diff(logs) @ curves.y[name] / 5)
        assert 0 <= score <= 1 + 1e-12


def test_problems_weigh_the_same_whatever_their_seeds():
    three = Case("s", "three")
    instances = (
        Instance(three, 0),
        Instance(three, 1),
        Instance(three, 2),
        Instance(Case("s", "q")),
    )
    costs = Table(instances, ("a", "b"), np.array([[1, 9], [1, 9], [1, 9], [9, 1.0]]))
    curves = profiles.performance_profile(costs)
    assert curves.y["a"][0] == pytest.approx(1 / 2)
    assert profiles.geometric_ratios(costs, to="b")["a"].value == pytest.approx(1)


def test_removing_a_contender_can_change_the_order_of_a_performance_profile():
    # Gould and Scott: with c present b is ahead of a within a factor of 2, without c it is behind
    costs = np.array([[6.0, 3, 3], [1, 5, 9], [7, 2, 1], [2, 5, 9.0]])
    full, reduced = table(costs), table(costs[:, :2])
    before = profiles.performance_profile(full).y
    after = profiles.performance_profile(reduced).y
    assert before["b"][0] != after["b"][0]


def test_wins_need_more_than_the_margin():
    counts = profiles.wins(HAND, profiles.COUNT_MARGIN)
    np.testing.assert_array_equal(counts, [[0, 1, 3], [1, 0, 3], [0, 0, 0]])
    near = table([[1.0, 1.05], [1.0, 1.2], [1.0, INF]])
    np.testing.assert_array_equal(profiles.wins(near, profiles.TIME_MARGIN), [[0, 2], [0, 0]])
    np.testing.assert_array_equal(profiles.wins(near, 0.0), [[0, 3], [0, 0]])


@CHECKED
@given(TABLES)
def test_wins_losses_and_ties_add_up(costs):
    counts = profiles.wins(costs, profiles.COUNT_MARGIN)
    assert np.all(np.diag(counts) == 0)
    tried = ~np.isnan(costs.values)
    both = tried.T.astype(int) @ tried.astype(int)
    assert np.all(counts + counts.T <= both)


def test_geometric_ratios_count_what_both_solve():
    ratios = profiles.geometric_ratios(HAND, to="b")
    assert ratios["b"][:3] == (1, 1, 1)
    assert ratios["a"].problems == 3
    assert ratios["a"].value == pytest.approx((1 / 2 * 2 * 1) ** (1 / 3))
    best = profiles.geometric_ratios(HAND)["c"]
    assert best.value == pytest.approx((4 * 2 * 1) ** (1 / 3))
    assert 1 <= best.low <= best.value <= best.high <= 4
    assert best == profiles.geometric_ratios(HAND)["c"]  # the bootstrap is seeded
    none = profiles.geometric_ratios(table([[INF, 1.0]]))["a"]
    assert none.problems == 0 and math.isnan(none.value)


def test_an_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        logs = rng.normal(0.3, 0.5, size=30)
        costs = table(np.stack([np.exp(logs), np.ones(30)], axis=1) * 10)
        ratio = profiles.geometric_ratios(costs, to="b", samples=200)["a"]
        covered += ratio.low <= math.exp(0.3) <= ratio.high
    assert covered >= 85


# ---- rows to tables ----------------------------------------------------------------------------


def test_costs_from_rows():
    rows = [
        run(solver="a", work=10.0, iterations=0, run_cpu_s=[0.2, 0.1]),
        run(solver="b", work=20.0, status="missed"),
        run(solver="c", status="skipped"),
        run("q", solver="b", work=30.0),
    ]
    work = profiles.cost_table(rows)
    assert work.contenders == ("x a", "x b")
    np.testing.assert_array_equal(work.values, [[10, INF], [NAN, 30]])
    # only a's success has iterations, so b is left out; none at all counts as one
    iterations = profiles.cost_table(rows, "iterations")
    assert iterations.contenders == ("x a",)
    np.testing.assert_array_equal(iterations.values, [[1], [NAN]])
    assert profiles.cost_table(rows, "cpu").values[0, 0] == 0.1
    assert profiles.failures(rows) == {"x a": (0, 1), "x b": (1, 2)}
    with pytest.raises(ValueError, match="cost is 'price', expected one of work"):
        profiles.cost_table(rows, "price")


def test_a_single_seed_stands_for_all():
    rows = [run(solver="random", work=float(s + 2), seed=s) for s in range(3)]
    rows.append(run(solver="fixed", work=3.0))
    np.testing.assert_array_equal(profiles.cost_table(rows).values, [[3, 2], [3, 3], [3, 4]])


def test_configurations_do_not_hide_each_other():
    rows = [run(work=float(b), config={"batch": b, "same": 1}) for b in (1, 32)]
    assert profiles.names(rows) == ["x a [batch=1]", "x a [batch=32]"]
    assert profiles.names([rows[0], run("q", config={"batch": 2})]) == ["x a", "x a"]


def test_rates_turn_into_seconds():
    rows = [run(extras={"solves_per_s": 4.0, "flag": True})]
    assert profiles.cost_table(rows, "extras.solves_per_s").values[0, 0] == 0.25
    assert profiles.cost_named("extras.solves_per_s").label == "seconds per solve"
    assert profiles.cost_table(rows, "extras.flag").contenders == ()


def test_ours_come_first():
    names = profiles.contenders_of(every_row())
    first = [profiles.is_ours(name) for name in names]
    assert first == sorted(first, reverse=True) and not profiles.is_ours("jaxopt LBFGS")


# ---- targets -----------------------------------------------------------------------------------


def descent(solver, values, work=None, **fields):
    work = list(range(1, len(values) + 1)) if work is None else work
    trace = {"work": [float(w) for w in work], "f": [float(v) for v in values]}
    known = {"f0": 100.0, "f_star": 0.0, "n": 3, "work": float(work[-1]), "f": float(values[-1])}
    return run(solver=solver, history=trace, **{**known, **fields})


def test_targets_are_read_from_the_history():
    row = descent("a", [100, 9, 0.5, 1e-9], [1, 10, 20, 30])
    found = profiles.reached(row, np.array([1000, 10, 1, 1e-3, 1e-12]))
    np.testing.assert_array_equal(found, [1, 10, 20, 30, INF])
    for tolerance, expected in [(1e-1, 10), (1e-2, 20), (1e-7, 30)]:
        assert profiles.target_table([row], tolerance).values[0, 0] == expected


def test_the_best_so_far_counts_and_nan_does_not():
    row = descent("a", [100, 5, NAN, 50])
    np.testing.assert_array_equal(profiles.trajectory(row)[1], [100, 5, 5, 5, 5])


def test_without_history_the_point_returned_counts():
    row = run(work=7.0, f=1.0, f0=100.0, f_star=0.0)
    np.testing.assert_array_equal(profiles.reached(row, np.array([2.0, 0.5])), [7, INF])
    assert profiles.reached(run(), np.array([2.0]))[0] == INF


def test_a_run_that_ends_infeasible_reaches_nothing():
    bad = descent("a", [100, -50], violation=1.0, tolerance=1e-6)
    unknown = descent("a", [100, -50], violation=NAN, tolerance=1e-6)
    good = descent("b", [100, 1], violation=1e-9, tolerance=1e-6)
    assert profiles.trajectory(bad)[0].size == profiles.trajectory(unknown)[0].size == 0
    np.testing.assert_array_equal(profiles.trajectory(good), [[1, 2, 2], [100, 1, 1]])
    assert profiles.best_values([bad, good]) == {Case("s", "p"): 0.0}
    np.testing.assert_array_equal(profiles.target_table([bad, good], 0.1).values, [[INF, 2]])


def test_targets_need_a_history():
    rows = [descent("a", [100, 1]), run(solver="b", work=5.0, f=0.0, f0=100.0, f_star=0.0, n=3)]
    assert profiles.anytime(rows) == ["x a"]
    assert profiles.target_table(rows, 0.1).contenders == ("x a",)
    assert set(profiles.ecdf(rows)[1]) == {"x a"}
    assert profiles.target_table(rows[1:], 0.1).values.size == 0
    assert profiles.ecdf(rows[1:])[1] == {}


def test_the_best_value_is_over_all_contenders_and_the_known_optimum():
    rows = [descent("a", [100, 3]), descent("b", [100, -2])]
    assert profiles.best_values(rows) == {Case("s", "p"): -2}
    assert profiles.fixed_values(rows, {Case("s", "p"): -2}) == {Case("s", "p"): 0}
    unknown = [descent("a", [100, 3], f_star=None)]
    assert profiles.fixed_values(unknown, None) == {}
    assert profiles.data_profile(unknown, 0.1).instances == 0
    started_there = [descent("a", [0.0], f0=0.0)]
    assert profiles.target_table(started_there, 0.1).instances == ()


def test_data_profile_by_hand():
    rows = [descent("a", [100, 50, 5], [1, 4, 8]), descent("b", [100, 5], [1, 40])]
    curves = profiles.data_profile(rows, 1e-1)
    np.testing.assert_array_equal(curves.x, [0, 2, 10])
    np.testing.assert_array_equal(curves.y["x a"], [0, 1, 1])
    np.testing.assert_array_equal(curves.y["x b"], [0, 0, 1])


@pytest.mark.parametrize("known", [True, False])
def test_a_data_profile_does_not_depend_on_who_takes_part(known):
    rows = solved_rows(known=known, seeds=(0, 1))
    reference = profiles.best_values(rows)
    full = profiles.data_profile(rows, 1e-5, reference)
    for gone in ("GradNormSmooth", "L-BFGS-B"):
        part = profiles.data_profile([r for r in rows if r.solver != gone], 1e-5, reference)
        for name, share in part.y.items():
            place = np.searchsorted(full.x, part.x, side="right") - 1
            np.testing.assert_array_equal(full.y[name][place], share)


def test_removing_the_best_changes_the_performance_profile():
    rows = solved_rows()
    full = profiles.performance_profile(profiles.cost_table(rows))
    rest = [r for r in rows if r.solver != "GradNormSmooth"]
    part = profiles.performance_profile(profiles.cost_table(rest))
    assert any(part.y[name][0] != full.y[name][0] for name in part.y)


def test_ecdf_by_hand():
    # from f = 50 the first two of the targets 100, 63 are there at once, the rest at work 12
    row = descent("a", [50, 0], [3, 12], f0=50.0, n=3)
    x, bands = profiles.ecdf([row])
    share = bands["x a"].y
    assert x[0] == 1 and x[-1] == 4
    assert share[0] == pytest.approx(2 / 51) and share[-1] == 1
    np.testing.assert_array_equal(bands["x a"].low, share)  # one problem has no spread


def test_ecdf_is_monotone_inside_its_interval_and_seeded():
    rows = solved_rows(seeds=(0, 1))
    _, bands = profiles.ecdf(rows)
    again = profiles.ecdf(rows)[1]
    for name, band in bands.items():
        assert np.all(np.diff(band.y) >= -1e-15) and 0 <= band.y[0] and band.y[-1] <= 1
        assert np.all(band.low <= band.y + 1e-12) and np.all(band.y <= band.high + 1e-12)
        np.testing.assert_array_equal(band.low, again[name].low)
    assert profiles.ecdf([run()])[1] == {}


# ---- slopes ------------------------------------------------------------------------------------


@CHECKED
@given(st.floats(-2, 4), st.floats(1, 1e3))
def test_a_power_law_is_found_exactly(power, constant):
    rows = [
        run(f"p{n}", n=n, work=1e6 * constant * n**power, params={"family": "p"})
        for n in (2, 8, 32, 128)
    ]
    fit = profiles.slopes(rows)["p", "x a"]
    assert fit.slope == pytest.approx(power, abs=1e-9)
    assert fit.high - fit.low < 1e-5


def test_slope_interval_is_that_of_least_squares():
    from scipy import stats

    sizes, costs = np.array([10, 20, 40, 80, 160]), np.array([1.0, 2.5, 3.9, 9.0, 15.0])
    rows = [
        run(f"p{n}", n=int(n), run_cpu_s=[c], params={"family": "p"}, extras={"theory": {"cpu": 1}})
        for n, c in zip(sizes, costs, strict=True)
    ]
    fit = profiles.slopes(rows, "cpu")["p", "x a"]
    line = stats.linregress(np.log(sizes), np.log(costs))
    half = stats.t.ppf(0.975, 3) * line.stderr
    np.testing.assert_allclose(
        [fit.slope, fit.low, fit.high, np.log(fit.constant)],
        [line.slope, line.slope - half, line.slope + half, line.intercept],
    )
    assert fit.theory == 1


def test_slopes_need_two_sizes_and_successes():
    rows = [run("p", n=5, work=3.0), run("q", n=6, work=3.0)]
    assert profiles.slopes(rows) == {}
    two = [run(f"p{n}", n=n, work=float(n), params={"family": "p"}) for n in (5, 10)]
    fit = profiles.slopes(two)["p", "x a"]
    assert fit.slope == pytest.approx(1) and math.isnan(fit.low)
    assert set(profiles.slopes(scale_rows(), "cpu")) == {
        ("ridge", "jaxopt_ext SSO"),
        ("ridge", "scipy L-BFGS-B"),
    }

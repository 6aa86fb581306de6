"""Runs of whole suites in worker processes: faults become rows, runs are resumed and repeatable."""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_ext.bench import cli, measure, record, runner
from jaxopt_ext.bench.contender import Budget, Contender
from jaxopt_ext.bench.problem import Problem
from jaxopt_ext.bench.suite import NAMES, load

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def faulty():
    """Makes the faulty suite importable here and in the workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        patch.setenv("PYTHONPATH", str(HERE), prepend=":")
        yield
    sys.modules.pop("faulty_suite", None)


def silent(done, total, what):
    pass


@pytest.fixture(scope="module")
def finished(faulty, tmp_path_factory):
    """The file of one run of the faulty suite and the rows it made."""
    out = tmp_path_factory.mktemp("run") / "rows.jsonl"
    rows = runner.run(["faulty_suite"], out, runner.Options(timeout=8, repeats=2), silent)
    return out, {(row.solver, row.seed): row for row in rows}


def test_every_fault_is_a_row(finished):
    _, rows = finished
    assert {solver: rows[solver, 0].status for solver, seed in rows if seed == 0} == {
        "good": "ok",
        "random": "missed",
        "nan": "nonfinite",
        "away": "diverged",
        "raises": "error",
        "hangs": "timeout",
        "dies": "error",
        "imports": "skipped",
        "absent": "skipped",
    }
    assert rows["raises", 0].message == "ArithmeticError: no such <luck>"
    assert "8 s" in rows["hangs", 0].message
    assert "died with code 7" in rows["dies", 0].message
    assert "last words" in rows["dies", 0].message
    assert "surely_not_installed" in rows["imports", 0].message


def test_a_library_that_is_missing_is_skipped_with_the_reason(faulty, tmp_path):
    options = runner.Options(solvers=("absent",))
    (row,) = runner.run(["faulty_suite"], tmp_path / "rows.jsonl", options, silent)
    assert (row.status, row.message) == ("skipped", "absent is not installed")


def test_only_random_contenders_get_seeds(finished):
    _, rows = finished
    assert sorted(rows[key].seed for key in rows if key[0] == "random") == [0, 1]
    assert [key[1] for key in rows if key[0] == "nan"] == [0]
    assert rows["random", 1].error == 0.0 and rows["random", 0].error == 2.0


def test_a_good_row_is_complete(finished):
    out, rows = finished
    row = next(r for r in record.read(out)[0] if r.solver == "random" and r.seed == 1)
    assert row == rows["random", 1]
    assert (row.n, row.f0, row.f, row.error, row.iterations) == (2, 2.0, 0.0, 0.0, 1)
    assert row.counts == {} and row.work is None  # it evaluates nothing
    assert len(row.run_cpu_s) == len(row.run_wall_s) == 2
    assert row.compile_cpu_s > 0 and row.problem_hash and row.x_hash


def test_the_environment_is_recorded_once_per_run(finished):
    out, rows = finished
    _, environments = record.read(out)
    (environment,) = environments.values()
    assert {row.env_id for row in rows.values()} == {environment["env_id"]}
    assert environment["settings"]["OMP_NUM_THREADS"] == "1"
    assert environment["versions"]["jax"] and "load_at_end" in environment


def test_a_run_is_resumed_where_it_was_interrupted(finished, tmp_path):
    out, rows = finished
    copy = tmp_path / "rows.jsonl"
    lines = out.read_text().splitlines()
    kept = [line for line in lines if json.loads(line).get("solver") != "nan"]
    copy.write_text("\n".join(kept) + '\n{"kind": "result", "sui')  # a line half written
    made = runner.run(["faulty_suite"], copy, runner.Options(timeout=8), silent)
    # skipped rows are tried again: what was missing may be there by now
    assert {row.solver for row in made} == {"nan", "imports", "absent"}
    assert {row.key for row in record.read(copy)[0]} == {row.key for row in rows.values()} | {
        row.key for row in record.read(out)[0]
    }
    again = runner.run(["faulty_suite"], copy, runner.Options(timeout=8), silent)
    assert {row.status for row in again} == {"skipped"}


def test_a_worker_that_does_not_start_is_not_tried_again(faulty, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "settings", lambda *_: {"XLA_FLAGS": "--no_such_flag=1"})
    started = []
    popen = runner.subprocess.Popen

    def counting(*args, **kwargs):
        started.extend(arg for arg in args[0] if arg == "jaxopt_ext.bench.worker")
        return popen(*args, **kwargs)

    monkeypatch.setattr(runner.subprocess, "Popen", counting)
    options = runner.Options(solvers=("faulty*",), timeout=8)
    rows = runner.run(["faulty_suite"], tmp_path / "rows.jsonl", options, silent)
    assert len(started) == 1 and len(rows) > 5
    assert all(row.status == "error" and "died" in row.message for row in rows)


@pytest.mark.slow
def test_two_runs_agree_to_the_last_bit(tmp_path):
    options = runner.Options(quick=True, problems="mgh-*", solvers=("ours", "scipy"), repeats=1)
    first, second = (
        {row.key: row for row in runner.run(["smooth"], tmp_path / name, options, silent)}
        for name in ("a.jsonl", "b.jsonl")
    )
    assert len(first) >= 14 and first.keys() == second.keys()
    for key, row in first.items():
        again = second[key]
        assert (row.status, row.f, row.x_hash) == (again.status, again.f, again.x_hash)
        assert (row.counts, row.work, row.history) == (again.counts, again.work, again.history)
    solved = [row for row in first.values() if row.status == "ok"]
    assert {row.package for row in solved} == {"jaxopt_ext", "scipy"}


@pytest.mark.parametrize("name", NAMES)
def test_a_suite_is_listed_without_importing_a_peer(name):
    suite = load(name)
    assert suite.name == name and suite.title and suite.summary.endswith(".")
    entries = suite.entries()
    assert any(entry.quick for entry in entries.values())
    names = [contender.name for contender in suite.contenders()]
    assert len(set(names)) == len(names)
    ours = [contender for contender in suite.contenders() if contender.package == "jaxopt_ext"]
    assert ours or name == "nlp"  # where we have no solver yet
    for contender in suite.contenders():  # everybody has something to do
        assert any(set(contender.kinds) & set(entry.kinds) for entry in entries.values())


def test_listing_imports_no_peer():
    code = (
        "import sys; from jaxopt_ext.bench.suite import NAMES, load\n"
        "for name in NAMES: load(name).entries(); load(name).contenders()\n"
        "print([m for m in ('jaxopt', 'optimistix', 'cma', 'evosax', 'cbx', 'sklearn', 'sif2jax',"
        " 'matplotlib') if m in sys.modules])"
    )
    out = runner.subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


# ---- the command line ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, found",
    [
        ("ours", {"GradNormSmooth"}),
        ("GradNorm*", {"GradNormSmooth"}),
        ("LBFGS", {"lbfgs", "lbfgs (tuned)"}),  # by method, whatever the case
        ("optax lbfgs", {"lbfgs"}),  # by the name that `list solvers` shows
        ("optax", {"lbfgs", "lbfgs (tuned)"}),
    ],
)
def test_contenders_are_found_by_library_method_and_name(pattern, found):
    def make(problem, budget):
        raise AssertionError

    contenders = [
        Contender("jaxopt_ext", "GradNormSmooth", ("smooth",), make),
        Contender("optax", "lbfgs", ("smooth",), make),
        Contender("optax", "lbfgs", ("smooth",), make, setting="tuned"),
    ]
    names = {
        c.name.removeprefix(c.package + " ") for c in contenders if runner.matches(c, [pattern])
    }
    assert names == found


@pytest.mark.parametrize(
    "argv, words",
    [
        (["run", "nonsense"], "suite is 'nonsense', expected one of smooth"),
        (["run", "smooth", "--solvers", "nobody"], "nothing to run in smooth"),
        (["run", "smooth", "--problems", "nothing"], "no problem matches 'nothing'"),
        (["run", "smooth", "--data", "/no/such/folder"], "expected a folder"),
        (["run", "smooth", "--timeout", "-1"], "--timeout is -1"),
        (["report", "/no/such/file"], "No such file"),
        (["list", "nonsense"], "expected suites, solvers, problems or data"),
    ],
)
def test_bad_input_is_an_error_in_words(argv, words, capsys):
    assert cli.main(argv) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["run"], ["run", "smooth", "--seeds", "x"], ["run", "smooth", "--budget", "time=3"]]
)
def test_bad_syntax_is_refused(argv, capsys):
    with pytest.raises(SystemExit):
        cli.main(argv)
    assert "usage" in capsys.readouterr().err


def test_the_command_line_runs_reports_and_compares(faulty, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    argv = ["run", "faulty_suite", "--solvers", "faulty random,absent", "--seeds", "1:3"]
    assert cli.main([*argv, "--repeat", "1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "3 rows" in said and "1 ok" in said and "skipped absent: absent is not installed" in said
    assert cli.main(["compare", str(out), str(out)]) == 0
    page = tmp_path / "report.html"
    assert cli.main(["report", str(out), "-o", str(page)]) == 0
    assert "Everything that can go wrong." in page.read_text()


@pytest.mark.parametrize("what", ["suites", "solvers", "problems", "data"])
def test_lists(what, capsys):
    assert cli.main(["list", what]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 6


def test_a_dense_method_is_not_tried_on_a_large_problem():
    contender = Contender("x", "dense", ("smooth",), lambda problem, budget: None, dense=True)
    large = Problem("large", lambda y, data: jnp.sum(y**2), np.zeros(5001))
    row = record.Row("s", "large", "x", "dense")
    budget = Budget(1e-8, 1, 1, 0, "float64")
    measure.solve(row, large, contender, budget, 1, lambda _, at: at["f"])
    assert (row.status, row.compile_cpu_s) == ("skipped", None)
    assert "n is 5001 > 5000" in row.message

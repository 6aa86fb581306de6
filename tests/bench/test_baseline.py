"""The quick suites with our contenders: the committed counts, and the known minima."""

import importlib.util
import os
from pathlib import Path

import pytest

from jaxopt_ext.bench import compare, record, runner

BASELINE = Path(compare.__file__).parent / "baselines" / "quick.json"
SUITES = ("smooth", "glm", "blackbox")
KNOWN = {"heart_scale", "ionosphere", "sonar", "diabetes"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rows of one run without further data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAXOPT_EXT_DATA", raising=False)
        out = tmp_path_factory.mktemp("baseline") / "rows.jsonl"
        options = runner.Options(quick=True, solvers=("ours",), repeats=1)
        runner.run(SUITES, out, options, lambda *_: None)
    return record.read(out)[0]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("sif2jax") is None, reason="the baseline holds problems of sif2jax"
)
def test_counts_and_statuses_are_no_worse_than_the_baseline(rows):
    found = compare.compare(compare.read(BASELINE), rows, compare.Gate())
    assert found.code == 0, found.text()


@pytest.mark.slow
def test_generalized_linear_models_reach_their_known_minima(rows):
    gaps = {row.key: row.extras["gap"] for row in rows if row.suite == "glm"}
    assert len(gaps) >= 8
    assert all(abs(gap) <= 1e-9 for gap in gaps.values()), gaps


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("JAXOPT_EXT_DATA"), reason="JAXOPT_EXT_DATA names no folder with the data"
)
def test_real_data_sets_reach_their_known_minima(tmp_path):
    options = runner.Options(quick=True, solvers=("ours", "scipy"), repeats=1)
    solved = set()
    for row in runner.run(["glm"], tmp_path / "rows.jsonl", options, lambda *_: None):
        name = row.problem.split("-")[2]
        if name in KNOWN and row.package == "jaxopt_ext":
            assert abs(row.extras["gap"]) <= 1e-9, row
            solved.add(name)
    assert solved == KNOWN

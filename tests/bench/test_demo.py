"""The demo's parts and its whole run; the data set; the table of compile times."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_ext.bench import datasets, demo


@pytest.fixture(scope="module")
def small():
    """Four of the thirty features, and the two levels compiled for them."""
    dataset = datasets.breast_cancer()
    dataset = dataset._replace(
        features=dataset.features[:, :4], feature_names=dataset.feature_names[:4]
    )
    split = demo.split_data(dataset, seed=0)
    zero = demo.zero_start(split)
    gradient = demo.compiled(demo.hypergradient, jnp.zeros(4), split, zero)
    loss = demo.compiled(demo.validation_loss, jnp.zeros(4), split, zero)
    return split, zero, gradient, loss


@pytest.fixture
def adam():
    """Adam of optax multiplies integers by floats, which the session's strict setting refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# ---- data ----------------------------------------------------------------------------------


def test_breast_cancer_has_the_documented_shapes_and_labels():
    dataset = datasets.breast_cancer()
    assert dataset.features.shape == (569, 30)
    assert dataset.features.dtype == np.float64
    assert np.all(np.isfinite(dataset.features))
    assert dataset.labels.shape == (569,)
    assert np.bincount(dataset.labels).tolist() == [212, 357]
    assert len(set(dataset.feature_names)) == 30


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"jaxopt-ext\[bench\]"):
        datasets.breast_cancer()


def test_split_is_stratified_seeded_and_scaled_by_the_training_part_only():
    dataset = datasets.breast_cancer()
    split = demo.split_data(dataset, seed=3)
    assert [len(part.labels) for part in split] == [284, 142, 143]
    shares = [float(jnp.mean(part.labels)) for part in split]
    np.testing.assert_allclose(shares, 357 / 569, atol=0.01)
    np.testing.assert_allclose(np.mean(split.train.features, axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(np.std(split.train.features, axis=0), 1, rtol=1e-12)
    assert np.max(np.abs(np.mean(split.test.features, axis=0))) > 1e-3
    # every sample is in one part: the parts' sorted first column is an affine image of the whole's
    column = np.sort(np.concatenate([part.features[:, 0] for part in split]))
    whole = np.sort(dataset.features[:, 0])
    np.testing.assert_allclose(
        (column - column[0]) / np.ptp(column), (whole - whole[0]) / np.ptp(whole), atol=1e-12
    )
    again = demo.split_data(dataset, seed=3)
    np.testing.assert_array_equal(split.test.features, again.test.features)


# ---- the two levels ------------------------------------------------------------------------


def test_logistic_loss_agrees_with_its_definition_and_survives_extreme_scores():
    data = demo.Data(jnp.array([[1.0], [-2.0]]), jnp.array([1.0, 0.0]))
    probability = 1 / (1 + np.exp(-np.array([0.8, -1.3])))
    expected = -np.mean(np.log([probability[0], 1 - probability[1]]))
    variables = {"w": jnp.array([0.7]), "b": jnp.array(0.1)}
    np.testing.assert_allclose(demo.logistic_loss(variables, data), expected, rtol=1e-14)
    assert float(demo.accuracy(variables, data)) == 1.0

    wrong = {"w": jnp.array([-1e4]), "b": jnp.array(0.0)}
    value, slope = jax.value_and_grad(demo.logistic_loss)(wrong, data)
    np.testing.assert_allclose(value, 1.5e4, rtol=1e-14)
    assert np.all(np.isfinite(slope["w"]))


def test_intercept_is_not_regularized():
    data = demo.Data(jnp.zeros((2, 1)), jnp.array([1.0, 0.0]))
    args = (jnp.array([3.0]), data)
    at = demo.training_loss({"w": jnp.zeros(1), "b": jnp.array(2.0)}, args)
    assert float(at) == float(demo.logistic_loss({"w": jnp.zeros(1), "b": jnp.array(2.0)}, data))
    at = demo.training_loss({"w": jnp.ones(1), "b": jnp.array(0.0)}, args)
    np.testing.assert_allclose(at, np.log(2.0) + np.exp(3.0) / 2, rtol=1e-14)


def test_five_point_rule_is_exact_for_quartics():
    x = np.array([0.3, -1.2])
    gradient = demo.central_differences(lambda x: np.sum(x**4 + x), x, 0.1)
    np.testing.assert_allclose(gradient, 4 * x**3 + 1, rtol=1e-12)


@pytest.mark.parametrize("log_weights", [[0.0, 0.0, 0.0, 0.0], [-4.0, 1.0, -2.0, -7.0]])
def test_hypergradient_equals_finite_differences(small, log_weights):
    split, zero, gradient, loss = small
    check = demo.check_gradient(loss.call, gradient.call, jnp.array(log_weights), split, zero)
    assert check.error < 1e-6
    assert np.min(np.abs(check.implicit)) > 1e-8  # a relative error of zeros would prove nothing
    assert float(check.solution.optimality) <= 1e-13


def test_hypergradient_does_not_depend_on_where_the_training_started(small):
    split, zero, gradient, _ = small
    theta = jnp.array([-4.0, 1.0, -2.0, -7.0])
    (_, solution), cold = gradient.call(theta, split, zero)
    _, warm = gradient.call(theta, split, solution.value)
    np.testing.assert_allclose(warm, cold, rtol=1e-9)


def test_tuning_keeps_the_best_weights(small, adam):
    split, zero, gradient, loss = small
    # a rate so large that the last step is not the best one
    tuning = demo.tune(gradient.call, jnp.zeros(4), split, zero, steps=12, learning_rate=3.0)
    assert tuning.validation.shape == tuning.test.shape == (13,)
    assert tuning.solved.all()
    assert 0 < tuning.best < 12
    assert tuning.validation[tuning.best] == tuning.validation.min() < tuning.validation[0]
    value, _ = loss.call(tuning.log_weights, split, zero)
    np.testing.assert_allclose(value, tuning.validation[tuning.best], rtol=1e-10)
    held = demo.logistic_loss(tuning.variables, split.validation)
    np.testing.assert_allclose(held, tuning.validation[tuning.best], rtol=1e-12)


def test_no_step_of_tuning_returns_the_start(small, adam):
    split, zero, gradient, _ = small
    tuning = demo.tune(gradient.call, jnp.ones(4), split, zero, steps=0)
    np.testing.assert_array_equal(tuning.log_weights, np.ones(4))
    assert tuning.best == 0


def test_best_single_weight_is_the_best_of_the_candidates(small):
    split, zero, _, loss = small
    candidates = [-6.0, -2.0, 0.0]
    values = [float(loss.call(jnp.full(4, c), split, zero)[0]) for c in candidates]
    chosen, variables = demo.best_single_weight(loss.call, split, zero, candidates)
    assert chosen == candidates[int(np.argmin(values))]
    held = demo.logistic_loss(variables, split.validation)
    np.testing.assert_allclose(held, min(values), rtol=1e-12)


# ---- what it shows -------------------------------------------------------------------------


def test_verdict_counts_losses_like_wins():
    results = [demo.Comparison(0.4, 0.1, 0.2), demo.Comparison(0.4, 0.4, 0.2)]
    text = demo.verdict(results)
    assert "against before tuning        lower 2, higher 0; ratio 0.50 to 0.50" in text
    assert "against best single weight   lower 1, higher 1; ratio 0.50 to 2.00" in text


def test_whole_run_prints_the_table_and_writes_the_picture(tmp_path, monkeypatch, capsys, adam):
    monkeypatch.chdir(tmp_path)
    demo.main(["--steps", "3", "--splits", "2"])
    out, err = capsys.readouterr()
    picture = tmp_path / "demo_output" / "demo.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    for words in (
        "before: every weight 1",
        "after: one weight per feature, tuned",
        "on 2 random splits",
        "max relative error against finite differences",
        "hypergradient: compile",
        "Picture: demo_output/demo.png",
    ):
        assert words in out
    (error,) = (line.split()[-1] for line in out.splitlines() if "max relative error" in line)
    assert float(error) < 1e-6
    assert "tuning" in err  # the progress bar


@pytest.mark.parametrize("argv", [["--steps", "-1"], ["--splits", "0"], ["--seed", "-1"]])
def test_bad_options_are_refused(argv, capsys):
    with pytest.raises(SystemExit):
        demo.main(argv)
    assert f"{argv[0]} is {argv[1]}, expected at least" in capsys.readouterr().err

"""Training without derivatives, on a few blobs instead of digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_ext.bench import datasets, train_without_gradients


@pytest.fixture
def adam():
    """Adam of optax multiplies integers by floats, which the session's strict setting refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_network_learns_from_values_alone(adam):
    random = np.random.RandomState(0)
    labels = random.randint(0, 3, 600)
    images = np.clip(3 * np.eye(3)[labels] @ np.eye(3, 5) + random.rand(600, 5), 0, None)
    parts = train_without_gradients.split(datasets.Dataset(images, labels))
    assert [len(part.labels) for part in parts] == [480, 120]
    assert float(jnp.max(parts[0].images)) <= 1.0
    points = train_without_gradients.train(*parts, epochs=8)
    assert [point.evaluations for point in points] == [800 * (i + 1) for i in range(8)]
    assert points[-1].consensus > 0.9


def test_table_is_printed(adam, capsys, monkeypatch):
    digits = datasets.Dataset(np.random.RandomState(1).rand(300, 4), np.arange(300) % 2)
    monkeypatch.setattr(datasets, "load", lambda name, folder: digits)
    train_without_gradients.main(["--epochs", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["1", "400"]

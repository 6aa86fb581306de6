"""Data sets that come with an installed package: nothing is downloaded."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Dataset(NamedTuple):
    """A labelled data set as NumPy arrays.

    Attributes:
        features: One row per sample, in the units of the source.
        labels: The class of each sample, 0 or 1.
        feature_names: The name of each column of `features`.
    """

    features: Float[np.ndarray, "samples features"]
    labels: Int[np.ndarray, " samples"]
    feature_names: tuple[str, ...]


def breast_cancer() -> Dataset:
    """Breast cancer Wisconsin (diagnostic): 569 samples, 30 features, label 1 for benign.

    Returns:
        The data as scikit-learn ships them.

    Raises:
        ImportError: scikit-learn is not installed.

    Reference:
        Street, Wolberg, Mangasarian, "Nuclear feature extraction for breast tumor diagnosis",
        1993; UCI Machine Learning Repository, CC BY 4.0.

    Example:
        >>> from jaxopt_ext.bench.datasets import breast_cancer
        >>> breast_cancer().features.shape
        (569, 30)
    """
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError as error:
        raise ImportError(
            "the breast cancer data come with scikit-learn, which is not installed: "
            "pip install 'jaxopt-ext[bench]'"
        ) from error
    # typed loosely because scikit-learn ships no types of its own
    bunch: dict = load_breast_cancer()  # type: ignore[assignment]
    return Dataset(
        features=np.asarray(bunch["data"], np.float64),
        labels=np.asarray(bunch["target"], np.int64),
        feature_names=tuple(str(name) for name in bunch["feature_names"]),
    )

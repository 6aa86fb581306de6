"""Problems of the CUTEst collection, from the package sif2jax (tested with 0.0.8).

`import sif2jax` builds every problem of the collection, which takes minutes. Here the module of one
problem is imported under a private package name, so the real package stays as it is, whether it is
imported or not.

The package promises inequalities c ≥ 0, but some problems return rows that are ≤ 0 as in their SIF
file, and nothing in it says which. Those of `NEGATIVE` were found by solving: only with that sign
do they have their published minimum. Optima are not the package's, some of which are wrong: they
are the least values that several methods met at feasible points, kept in `cutest_optima.json`.

Arrays that sif2jax keeps in its modules have the precision that JAX is set to when the problem is
built; they enter the compiled program as constants.

Reference:
    Gould, Orban, Toint, "CUTEst: a Constrained and Unconstrained Testing Environment with safe
    threads for mathematical optimization", Computational Optimization and Applications 60, 2015.
"""

import ast
import functools
import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxopt_ext.bench.problem import Entry, Problem

UNCONSTRAINED = (
    "AKIVA ALLINITU BEALE BENNETT5LS BIGGS6 BOX3 BOXBODLS BROWNDEN CHNROSNB CLIFF CLUSTERLS "
    "COOLHANSLS CUBE DANIWOODLS DENSCHNA DENSCHNB DENSCHNC DENSCHND DENSCHNE DENSCHNF DEVGLA1 "
    "DEVGLA2 DJTL EGGCRATE ENGVAL2 ERRINROS EXPFIT GAUSS1LS GROWTHLS HAIRY HATFLDD HATFLDE "
    "HEART6LS HEART8LS HELIX HILBERTA HILBERTB HIMMELBCLS HIMMELBG HIMMELBH HUMPS JENSMP KOWOSB "
    "LANCZOS1LS LOGHAIRY LUKSAN11LS LUKSAN15LS LUKSAN21LS MARATOSB MEXHAT MGH09LS MISRA1ALS "
    "OSBORNEA OSBORNEB PALMER1C PALMER1D POWERSUM QING RAT43LS ROSENBR S308 SISSER TRIGON1 "
    "VESUVIALS VIBRBEAM ZANGWIL2"
).split()
LARGE = "EDENSCH EG2 FLETCHCR GENROSE INTEQNELS MSQRTALS".split()  # n from 500 to 2000
EQUALITY = (
    "BT1 BT10 FLT HIMMELBC HIMMELBD HS6 HS7 HS8 HS9 MARATOS S316_322 BT2 BT4 BT5 BYRDSPHR HIMMELBE "
    "HS26 HS27 HS28 HS61 BT9 HS39 HS40 HS42 BT11 BT12 BT3 BT6 BT7 BT8 HS46 HS47 HS48 HS49 HS50 "
    "HS51 HS52 HS77 HS78 HS79 HS56 HS111LNP ORTHREGB MSS1 MSS2"
).split()
INEQUALITY = (
    "BQP1VAR HS10 HS11 HS12 HS14 HS15 HS17 HS18 HS19 HS21 HS22 HS23 HS24 SIMPLLPA SIMPLLPB TAME "
    "GIGOMEZ1 GIGOMEZ3 HS29 HS31 HS32 HS33 HS35 HS35I HS36 HS37 HS60 HS62 HS63 HS65 HS66 MINMAXRB "
    "HS41 HS44 HS44NEW HS68 HS69 HS71 HS72 HS73 BT13 HS53 HS80 HS81 HS54 HS95 HS96 HS97 HS98 "
    "MATRIX2 HS100 HS106 HS107"
).split()
# inequalities that sif2jax 0.0.8 returns as c ≤ 0
NEGATIVE = (
    "ZECEVIC2 ZECEVIC3 ZECEVIC4 CHACONN1 CHACONN2 DEMYMALO HS64 MAKELA1 MAKELA2 POLAK1 POLAK4 "
    "POLAK5 POLAK6 CANTILVR CSFI1 CSFI2 PENTAGON DIPIGRI HS101 HS102 HS103"
).split()
QUICK = {"OSBORNEB", "HS79", "HS100"}
_ROOT = "_jaxopt_ext_sif2jax"
_FAMILIES = (
    "_unconstrained_minimisation",
    "_bounded_minimisation",
    "_constrained_minimisation",
    "_quadratic_problems",
    "_nonlinear_equations",
)


def _package(name: str, folder: Path) -> None:
    """Register a package whose `__init__` is not run."""
    if name not in sys.modules:
        module = types.ModuleType(name)
        module.__path__ = [str(folder)]
        sys.modules[name] = module


@functools.cache
def _modules() -> dict[str, str]:
    """The module of each problem, read from the sources of the package."""
    spec = importlib.util.find_spec("sif2jax")
    if spec is None or spec.origin is None:
        raise ImportError(
            "the CUTEst problems come with sif2jax, which is not installed: "
            "pip install 'jaxopt-ext[peers]'"
        )
    root = Path(spec.origin).parent
    _package(_ROOT, root)
    _package(f"{_ROOT}.cutest", root / "cutest")
    found = {}
    for family in _FAMILIES:
        folder = root / "cutest" / family
        _package(f"{_ROOT}.cutest.{family}", folder)
        for node in ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    module = f"{_ROOT}.cutest.{family}.{node.module}"
                    found.setdefault(alias.asname or alias.name, module)
    return found


def source(name: str) -> Any:
    """The problem as sif2jax has it.

    Args:
        name: Of the problem in the collection.

    Returns:
        An object of sif2jax.

    Raises:
        ImportError: sif2jax is not installed, or this version of it has no such problem.
    """
    module = _modules().get(name)
    if module is None:
        raise ImportError(f"this version of sif2jax has no problem {name}")
    return getattr(importlib.import_module(module), name)()


@functools.cache
def reference_optima() -> dict[str, float]:
    """Least objectives known, from `cutest_optima.json`."""
    text = Path(__file__).with_name("cutest_optima.json").read_text(encoding="utf-8")
    return json.loads(text)["problems"]


def _bound(bound: Any, infinity: float) -> np.ndarray:
    """A bound in float64; SIF files write 1e20 for none."""
    bound = np.asarray(bound, np.float64)
    return np.where(np.abs(bound) >= 1e19, infinity, bound)


def build(name: str) -> Problem:
    """A problem of the collection in flat variables, with c_I ≤ 0.

    Args:
        name: Of the problem in the collection.

    Returns:
        The problem; its data are the arguments that sif2jax passes to the objective.

    Raises:
        ImportError: As `source`.
    """
    problem = source(name)
    init = np.asarray(problem.y0, np.float64)  # flat in all problems of the lists
    sign = 1 if name in NEGATIVE else -1

    # arrays that sif2jax keeps may be wider than the variables of a run in float32
    def fun(y, data):
        # not by `.astype`: a constant objective is a plain number while JAX differentiates
        return jnp.asarray(jnp.squeeze(problem.objective(y, data)), y.dtype)

    def part(index, factor):
        def values(y, data):
            return factor * ravel_pytree(problem.constraint(y)[index])[0].astype(y.dtype)

        return values

    equality = inequality = lower = upper = None
    if hasattr(problem, "constraint"):
        first, second = problem.constraint(problem.y0)
        equality = None if first is None else part(0, 1)
        inequality = None if second is None else part(1, sign)
    if getattr(problem, "bounds", None) is not None:
        lower = _bound(problem.bounds[0], -np.inf)
        upper = _bound(problem.bounds[1], np.inf)
    return Problem(
        name=f"cutest-{name}",
        fun=fun,
        init=init,
        data=() if problem.args is None else problem.args,
        equality=equality,
        inequality=inequality,
        lower=lower,
        upper=upper,
        optimum=reference_optima().get(name),
        meta={"source": "CUTEst by sif2jax"},
    )


ENTRIES = {
    f"cutest-{name}": Entry((kind,), functools.partial(build, name), name in QUICK)
    for kind, names in (
        ("smooth", (*UNCONSTRAINED, *LARGE)),
        ("program", (*EQUALITY, *INEQUALITY, *NEGATIVE)),
    )
    for name in names
}

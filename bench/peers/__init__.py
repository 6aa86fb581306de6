"""Other libraries: one adapter file each, which imports its library only when it is run."""

import importlib

from jaxopt_ext.bench.contender import Contender

ADAPTERS = (
    "scipy",
    "optax",
    "jaxopt",
    "optimistix",
    "sklearn",
    "cma",
    "evosax",
    "cbx",
    "ipopt",
    "septal",
    "slsqp_jax",
)


def contenders() -> tuple[Contender, ...]:
    """The contenders of all adapters.

    Returns:
        The contenders, in the order of `ADAPTERS`.
    """
    modules = (importlib.import_module(f"jaxopt_ext.bench.peers.{name}") for name in ADAPTERS)
    return tuple(contender for module in modules for contender in module.CONTENDERS)

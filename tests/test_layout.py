"""The house: packages listed, rooms reachable under one name only, nothing imported upwards."""

import pathlib
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ROOMS = ("solvers", "implicit", "bench")


def test_every_package_is_listed_for_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = set()
    for top in ("jaxopt_ext", *ROOMS):
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            if parts[0] == "jaxopt_ext" and len(parts) > 1 and parts[1] in ROOMS:
                continue  # through a link: the room itself is listed
            found.add(".".join(parts if parts[0] == "jaxopt_ext" else ("jaxopt_ext", *parts)))
    assert sorted(listed) == sorted(found)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_linked_and_guarded(room):
    link = ROOT / "jaxopt_ext" / room
    assert link.is_symlink()
    assert link.resolve() == ROOT / room
    bare = subprocess.run(
        [sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True
    )
    assert f"ImportError: import jaxopt_ext.{room}, not {room}" in bare.stderr


def test_core_dependencies_are_the_agreed_ones():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [line.split(">=")[0] for line in project["dependencies"]]
    assert names == ["jax", "jaxlib", "optax", "equinox", "chex"]
    assert {"bench", "peers", "docs", "test", "dev"} <= set(project["optional-dependencies"])


def test_version_is_one():
    import jaxopt_ext

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert jaxopt_ext.__version__ == project["version"]

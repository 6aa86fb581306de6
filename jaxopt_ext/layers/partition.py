"""Partitions of points over experts: boxes in space and time, or the user's own labels."""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxopt_ext.core import check


class Groups(eqx.Module):
    """Which points each expert has, padded to a common capacity.

    Attributes:
        index: Number of each expert's points; padding repeats its first one.
        mask: False at the padding.
        size: Number of points in all.
        dropped: Points that found no place because an expert was full.
    """

    index: Int[Array, "experts capacity"]
    mask: Bool[Array, "experts capacity"]
    size: int = eqx.field(static=True)
    dropped: Int[Array, ""]

    def split(self, tree: PyTree) -> PyTree:
        """Arrays over points to arrays over (expert, place).

        Args:
            tree: Leaves with the points along their first axis.

        Returns:
            The same with two first axes; padded places repeat a point, so they are finite.
        """
        return jax.tree.map(lambda leaf: leaf[self.index], tree)

    def merge(self, tree: PyTree, fill: float = float("nan")) -> PyTree:
        """The inverse of `split`; of a point of several experts, the last one's value.

        Args:
            tree: Leaves with axes (expert, place, ...).
            fill: Value at points that no expert has.

        Returns:
            Leaves with the points along their first axis.
        """
        target = jnp.where(self.mask, self.index, self.size).reshape(-1)

        def one(leaf):
            rest = leaf.shape[2:]
            out = jnp.full((self.size, *rest), fill, leaf.dtype)
            return out.at[target].set(leaf.reshape(-1, *rest), mode="drop")

        return jax.tree.map(one, tree)


def group(member: Bool[Any, "experts points"], capacity: int | None = None) -> Groups:
    """Groups from a table of who has which point.

    Args:
        member: Whether the expert has the point; a point may have several experts, or none.
        capacity: Places per expert; `None` takes what the fullest needs, which must be known, so
            not under `jit`. Points beyond it are dropped and counted.

    Returns:
        The groups.

    Raises:
        ValueError: `capacity` is `None` under `jit`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext import layers
        >>> labels = jnp.array([0, 1, 0, 0])
        >>> groups = layers.group(labels[None, :] == jnp.arange(2)[:, None])
        >>> print(groups.split(jnp.array([10, 11, 12, 13])))
        [[10 12 13]
         [11 11 11]]
    """
    member = jnp.asarray(member)
    counts = jnp.sum(member, axis=1)
    if capacity is None:
        if isinstance(counts, Tracer):
            raise ValueError(
                "group: capacity is None, expected a number of places under jit, where the "
                "number of points per expert is not known"
            )
        capacity = max(1, int(counts.max()))
    check.count("group", "capacity", capacity)
    capacity = min(capacity, member.shape[1])
    order = jnp.argsort(~member, axis=1, stable=True)[:, :capacity]
    mask = jnp.take_along_axis(member, order, axis=1)
    index = jnp.where(mask, order, order[:, :1])
    dropped = jnp.sum(jnp.maximum(counts - capacity, 0))
    return Groups(index, mask, member.shape[1], dropped)


def group_by_label(
    labels: Int[Array, " points"], experts: int, capacity: int | None = None
) -> Groups:
    """Groups from the user's own labels, e.g. of materials, of clusters, or of a learned choice.

    Args:
        labels: The expert of each point; points with a negative label have none.
        experts: Number of experts.
        capacity: See `group`.

    Returns:
        The groups.

    Raises:
        ValueError: `capacity` is `None` under `jit`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext import layers
        >>> print(layers.group_by_label(jnp.array([0, 1, 0, 0]), experts=2).mask)
        [[ True  True  True]
         [ True False False]]
    """
    check.count("group_by_label", "experts", experts)
    numbers = jnp.arange(experts, dtype=labels.dtype)
    return group(labels[None, :] == numbers[:, None], capacity)


def group_randomly(key: Array, points: int, experts: int) -> Groups:
    """Groups of equal size (±1) without any geometry: the control that a partition must beat.

    Args:
        key: A JAX random key.
        points: Number of points.
        experts: Number of experts.

    Returns:
        The groups.

    Example:
        >>> import jax
        >>> from jaxopt_ext import layers
        >>> print(layers.group_randomly(jax.random.key(0), points=7, experts=3).mask.sum(axis=1))
        [3 2 2]
    """
    check.count("group_randomly", "points", points)
    check.count("group_randomly", "experts", experts)
    labels = jax.random.permutation(key, jnp.arange(points, dtype=jnp.int32) % experts)
    return group_by_label(labels, experts, -(-points // experts))


class BoxPartition(eqx.Module):
    """Equal boxes of a box in space, time or both; one expert each, numbered row by row.

    Args:
        lower: Lower corner.
        upper: Upper corner, above `lower` along every axis.
        splits: Number of boxes along each axis.

    Raises:
        TypeError: An entry is not a number.
        ValueError: The lengths differ, or an entry is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext import layers
        >>> boxes = layers.BoxPartition(lower=(0.0,), upper=(1.0,), splits=(4,))
        >>> print(boxes.assign(jnp.array([[0.1], [0.3], [1.0]])))
        [0 1 3]
        >>> print(boxes.interfaces()[0].tolist())
        [[0, 1], [1, 2], [2, 3]]
    """

    lower: tuple[float, ...] = eqx.field(static=True)
    upper: tuple[float, ...] = eqx.field(static=True)
    splits: tuple[int, ...] = eqx.field(static=True)

    def __check_init__(self):
        if not len(self.lower) == len(self.upper) == len(self.splits):
            raise ValueError(
                f"BoxPartition: lower, upper and splits have lengths {len(self.lower)}, "
                f"{len(self.upper)} and {len(self.splits)}, expected one entry per axis each"
            )
        for axis, (low, high, n) in enumerate(
            zip(self.lower, self.upper, self.splits, strict=True)
        ):
            check.number("BoxPartition", f"upper[{axis}]", high, above=low)
            check.count("BoxPartition", f"splits[{axis}]", n)

    @property
    def experts(self) -> int:
        """Number of boxes."""
        return int(np.prod(self.splits))

    def corners(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper corners of the boxes, one row each."""
        low, size = np.asarray(self.lower), self._size()
        cells = np.array(list(itertools.product(*map(range, self.splits))))
        return low + cells * size, low + (cells + 1) * size

    def assign(self, points: Float[Array, "points axes"]) -> Int[Array, " points"]:
        """The box of each point; points outside belong to the nearest one.

        Args:
            points: One row each.

        Returns:
            Numbers of boxes.
        """
        low, size = self._constants(points)
        cell = jnp.floor((points - low) / size).astype(jnp.int32)
        top = jnp.asarray(self.splits, jnp.int32)[None, :] - 1
        cell = jnp.clip(cell, 0, top)
        label = jnp.zeros(points.shape[0], jnp.int32)
        for axis, n in enumerate(self.splits):
            label = label * n + cell[:, axis]
        return label

    def group(
        self,
        points: Float[Array, "points axes"],
        capacity: int | None = None,
        overlap: float = 0.0,
    ) -> Groups:
        """Each expert's points.

        Args:
            points: One row each.
            capacity: See `group`.
            overlap: By how much a box reaches into its neighbours, as a fraction of its size, ≥ 0.

        Returns:
            The groups.
        """
        check.number("BoxPartition.group", "overlap", overlap, at_least=0)
        if overlap == 0:
            return group_by_label(self.assign(points), self.experts, capacity)
        low, high = self.corners()
        reach = overlap * self._size()
        low, high = (jnp.asarray(c, points.dtype)[:, None] for c in (low - reach, high + reach))
        inside = (points[None] >= low) & (points[None] <= high)
        return group(jnp.all(inside, axis=-1), capacity)

    def windows(
        self, points: Float[Array, "points axes"], overlap: float = 0.5
    ) -> Float[Array, "points experts"]:
        """A smooth partition of unity: weights of the experts, which sum to 1 at every point.

        A weight is a product of squared cosines that vanishes `overlap` beyond the box. Outside
        all of them the nearest box has the whole weight.

        Args:
            points: One row each.
            overlap: As a fraction of the size of a box, > 0.

        Returns:
            The weights.
        """
        check.number("BoxPartition.windows", "overlap", overlap, above=0)
        low, high = (jnp.asarray(c, points.dtype)[None] for c in self.corners())
        half = (high - low) * (0.5 + overlap)
        away = (points[:, None, :] - (low + high) / 2) / half  # within ±1 in the window
        inside = jnp.all(jnp.abs(away) < 1, axis=-1)
        bump = jnp.prod(jnp.cos(jnp.pi / 2 * jnp.clip(away, -1, 1)) ** 2, axis=-1)
        bump = jnp.where(inside, bump, 0)
        total = jnp.sum(bump, axis=1, keepdims=True)
        nearest = jax.nn.one_hot(self.assign(points), self.experts, dtype=points.dtype)
        return jnp.where(total > 0, bump / jnp.where(total > 0, total, 1), nearest)

    def interfaces(
        self, points: int = 1, overlap: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The faces between neighbours.

        Args:
            points: Points along each axis of a face, in the middle of equal cells.
            overlap: With 0 there is one face between two neighbours. Otherwise there are two, each
                the boundary of one enlarged box and inside the other: see `group`, and `Schwarz`.
                At most 1.

        Returns:
            Pairs of experts (faces, 2), with overlap the one whose boundary it is first; points on
            each face (faces, points^(axes − 1), axes); and the axis that is normal to each face
            (faces,).
        """
        check.number("BoxPartition.interfaces", "overlap", overlap, at_least=0)
        low, high = self.corners()
        cells = list(itertools.product(*map(range, self.splits)))
        number = {cell: k for k, cell in enumerate(cells)}
        fractions = (np.arange(points) + 0.5) / points
        pairs, places, normals = [], [], []
        for cell, axis in itertools.product(cells, range(len(self.splits))):
            beyond = (*cell[:axis], cell[axis] + 1, *cell[axis + 1 :])
            if beyond not in number:
                continue
            both = number[cell], number[beyond]
            for owner, other, away in ((*both, overlap), (*both[::-1], -overlap)):
                middle = high[both[0], axis] + away * self._size()[axis]
                lines = [
                    np.array([middle])
                    if a == axis
                    else low[owner, a] + fractions * (high[owner, a] - low[owner, a])
                    for a in range(len(self.splits))
                ]
                pairs.append((owner, other))
                places.append(list(itertools.product(*lines)))
                normals.append(axis)
                if overlap == 0:
                    break
        d = len(self.splits)
        return (
            np.array(pairs, np.int32).reshape(-1, 2),
            np.array(places, float).reshape(-1, points ** (d - 1), d),
            np.array(normals, np.int32),
        )

    def _size(self) -> np.ndarray:
        return (np.asarray(self.upper) - np.asarray(self.lower)) / np.asarray(self.splits)

    def _constants(self, points):
        low = jnp.asarray(self.lower, points.dtype)[None, :]
        return low, jnp.asarray(self._size(), points.dtype)[None, :]

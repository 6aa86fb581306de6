"""Points of a Sobol sequence: evenly spread starting positions in up to 64 dimensions."""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

BITS = 32
# of dimensions 2, 3, ...: a primitive polynomial over GF(2), its bits from the highest power down,
# and the first direction numbers (the table new-joe-kuo-6)
DIRECTIONS: tuple[tuple[int, ...], ...] = (
    (3, 1),
    (7, 1, 3),
    (11, 1, 3, 1),
    (13, 1, 1, 1),
    (19, 1, 1, 3, 3),
    (25, 1, 3, 5, 13),
    (37, 1, 1, 5, 5, 17),
    (41, 1, 1, 5, 5, 5),
    (47, 1, 1, 7, 11, 19),
    (55, 1, 1, 5, 1, 1),
    (59, 1, 1, 1, 3, 11),
    (61, 1, 3, 5, 5, 31),
    (67, 1, 3, 3, 9, 7, 49),
    (91, 1, 1, 1, 15, 21, 21),
    (97, 1, 3, 1, 13, 27, 49),
    (103, 1, 1, 1, 15, 7, 5),
    (109, 1, 3, 1, 15, 13, 25),
    (115, 1, 1, 5, 5, 19, 61),
    (131, 1, 3, 7, 11, 23, 15, 103),
    (137, 1, 3, 7, 13, 13, 15, 69),
    (143, 1, 1, 3, 13, 7, 35, 63),
    (145, 1, 3, 5, 9, 1, 25, 53),
    (157, 1, 3, 1, 13, 9, 35, 107),
    (167, 1, 3, 1, 5, 27, 61, 31),
    (171, 1, 1, 5, 11, 19, 41, 61),
    (185, 1, 3, 5, 3, 3, 13, 69),
    (191, 1, 1, 7, 13, 1, 19, 1),
    (193, 1, 3, 7, 5, 13, 19, 59),
    (203, 1, 1, 3, 9, 25, 29, 41),
    (211, 1, 3, 5, 13, 23, 1, 55),
    (213, 1, 3, 7, 3, 13, 59, 17),
    (229, 1, 3, 1, 3, 5, 53, 69),
    (239, 1, 1, 5, 5, 23, 33, 13),
    (241, 1, 1, 7, 7, 1, 61, 123),
    (247, 1, 1, 7, 9, 13, 61, 49),
    (253, 1, 3, 3, 5, 3, 55, 33),
    (285, 1, 3, 1, 15, 31, 13, 49, 245),
    (299, 1, 3, 5, 15, 31, 59, 63, 97),
    (301, 1, 3, 1, 11, 11, 11, 77, 249),
    (333, 1, 3, 1, 11, 27, 43, 71, 9),
    (351, 1, 1, 7, 15, 21, 11, 81, 45),
    (355, 1, 3, 7, 3, 25, 31, 65, 79),
    (357, 1, 3, 1, 1, 19, 11, 3, 205),
    (361, 1, 1, 5, 9, 19, 21, 29, 157),
    (369, 1, 3, 7, 11, 1, 33, 89, 185),
    (391, 1, 3, 3, 3, 15, 9, 79, 71),
    (397, 1, 3, 7, 11, 15, 39, 119, 27),
    (425, 1, 1, 3, 1, 11, 31, 97, 225),
    (451, 1, 1, 1, 3, 23, 43, 57, 177),
    (463, 1, 3, 7, 7, 17, 17, 37, 71),
    (487, 1, 3, 1, 5, 27, 63, 123, 213),
    (501, 1, 1, 3, 5, 11, 43, 53, 133),
    (529, 1, 3, 5, 5, 29, 17, 47, 173, 479),
    (539, 1, 3, 3, 11, 3, 1, 109, 9, 69),
    (545, 1, 1, 1, 5, 17, 39, 23, 5, 343),
    (557, 1, 3, 1, 5, 25, 15, 31, 103, 499),
    (563, 1, 1, 1, 11, 11, 17, 63, 105, 183),
    (601, 1, 1, 5, 11, 9, 29, 97, 231, 363),
    (607, 1, 1, 5, 15, 19, 45, 41, 7, 383),
    (617, 1, 3, 7, 7, 31, 19, 83, 137, 221),
    (623, 1, 1, 1, 3, 23, 15, 111, 223, 83),
    (631, 1, 1, 5, 13, 31, 15, 55, 25, 161),
    (637, 1, 1, 3, 13, 25, 47, 39, 87, 257),
)
MOST = len(DIRECTIONS) + 1


@functools.cache
def directions(dimensions: int) -> np.ndarray:
    """Direction numbers as 32-bit integers, one row a dimension.

    Args:
        dimensions: At most `MOST`.

    Returns:
        An array (dimensions, 32).
    """
    table = np.zeros((dimensions, BITS), np.uint64)
    table[0] = 1
    for row, (polynomial, *start) in zip(table[1:], DIRECTIONS, strict=False):
        degree = len(start)
        row[:degree] = start
        inner = [polynomial >> (degree - k) & 1 for k in range(1, degree)]
        for i in range(degree, BITS):
            number = int(row[i - degree]) ^ (int(row[i - degree]) << degree)
            for k, bit in enumerate(inner, start=1):
                number ^= bit * (int(row[i - k]) << k)
            row[i] = number
    return (table << np.arange(BITS - 1, -1, -1, dtype=np.uint64)).astype(np.uint32)


def sobol(number: int, dimensions: int) -> UInt32[Array, "number dimensions"]:
    """The first points of the sequence, times 2³².

    Args:
        number: How many.
        dimensions: At most `MOST`.

    Returns:
        The points in the order of the Gray code.

    Raises:
        ValueError: More dimensions than the table has.

    Reference:
        Joe, Kuo, "Constructing Sobol sequences with better two-dimensional projections", SIAM
        Journal on Scientific Computing 30, 2008.

    Example:
        >>> from jaxopt_ext.solvers import cbo_sobol
        >>> print(cbo_sobol.sobol(4, 2) / 2.0**32)
        [[0.   0.  ]
         [0.5  0.5 ]
         [0.75 0.25]
         [0.25 0.75]]
    """
    if dimensions > MOST:
        raise ValueError(
            f"sobol: dimensions is {dimensions}, expected at most {MOST}; a Latin hypercube has no "
            "such limit"
        )
    index = jnp.arange(number, dtype=jnp.uint32)
    gray = index ^ (index >> 1)
    points = jnp.zeros((number, dimensions), jnp.uint32)
    for bit, column in enumerate(directions(dimensions).T[: max(number - 1, 1).bit_length()]):
        chosen = (gray >> bit) & jnp.uint32(1)
        points ^= chosen[:, None] * jnp.asarray(column)[None]
    return points

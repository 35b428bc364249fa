"""Made rows of features among real ones, by nearest neighbours. Pure.

Precision and recall are Kynkäänniemi et al. 2019 (arXiv 1904.06991), density and coverage Naeem et al. 2020
(arXiv 2002.09797). A row's ball reaches to its k-th nearest neighbour of the same set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import ndarray


@dataclass(frozen=True)
class Manifolds:
    """Scores of single rows, whose means are the figures."""

    precision: ndarray  # (made,): 1 for a made row within the ball of a real one
    recall: ndarray  # (real,): 1 for a real row within the ball of a made one
    density: ndarray  # (made,): the number of real balls around a made row, over k
    coverage: ndarray  # (real,): 1 for a real row with a made one in its ball


def manifolds(real: ndarray, made: ndarray, near: int = 3, dense: int = 5) -> Manifolds:
    """Scores of sets `(n, d)` and `(m, d)`; balls of precision and recall reach to neighbour `near`, others `dense`.

    Raises `ValueError` for sets of no more than `dense` rows.
    """
    import numpy as np
    from scipy.spatial.distance import cdist

    if min(len(real), len(made)) <= max(near, dense):
        raise ValueError(f"{len(real)} and {len(made)} rows have no {max(near, dense)} neighbours")
    between = cdist(real, made)  # (n, m)
    of_real = np.sort(cdist(real, real), 1)  # (n, n); column 0 is the row itself
    of_made = np.sort(cdist(made, made), 1)
    within = between < of_real[:, [dense]]
    return Manifolds(
        (between <= of_real[:, [near]]).any(0).astype(float),
        (between <= of_made[:, near]).any(1).astype(float),
        within.sum(0) / dense,
        within.any(1).astype(float),
    )


def spread(rows: ndarray) -> tuple[float, ndarray]:
    """The mean distance of two rows `(n, d)`, and the mean distance of each row from the others."""
    from scipy.spatial.distance import cdist

    of_each = cdist(rows, rows).sum(1) / (len(rows) - 1)
    return float(of_each.mean()), of_each

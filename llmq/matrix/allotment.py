"""One choice for each of many parts, so that all choices together cost least within a budget: an integer program."""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

ROOM = 1e-6
"""The share of the budget by which the solver may be off: then it is asked again, for a little less."""
SECONDS = 60.0


def allot(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], budget: float) -> list[int] | None:
    """The number of the choice of each part with the least sum of costs whose sizes add up to `budget` at most.

    `costs[i][j]` and `sizes[i][j]` are those of choice `j` of part `i`. None if no choices fit. HiGHS proves the
    least sum to 1e-6 of it, unless a minute passes first.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    if sum(map(min, sizes)) > budget:
        return None
    part: NDArray[np.int64] = np.repeat(np.arange(len(costs)), [len(each) for each in costs])
    place = np.arange(len(part))
    one_each = csr_array((np.ones(len(part)), (part, place)), shape=(len(costs), len(part)))
    cost, size = (np.concatenate([np.asarray(each, float) for each in of]) for of in (costs, sizes))
    left = budget
    while True:
        rows = [LinearConstraint(one_each, 1, 1), LinearConstraint(size[None] / budget, -np.inf, left / budget)]
        with _printing_to_stderr():
            found = milp(
                cost / (cost.max() or 1),
                constraints=rows,
                integrality=np.ones(len(part)),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": ROOM, "time_limit": SECONDS},
            )
        if found.x is None:  # only the least of all is left
            return [int(np.argmin(each)) for each in sizes]
        taken = np.flatnonzero(found.x > 0.5)
        if size[taken].sum() <= budget:
            return [int(each) for each in taken - np.searchsorted(part, np.arange(len(costs)))]
        left -= max(size[taken].sum() - budget, ROOM * budget)


@contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """HiGHS prints some lines whatever it is asked, and standard output is for answers alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what C has not written yet
        os.dup2(kept, 1)
        os.close(kept)

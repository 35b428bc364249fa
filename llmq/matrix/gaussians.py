"""The Fréchet distance of two Gaussians, and its standard error. Pure.

For N(m1, C1) and N(m2, C2) the distance is |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½) (Dowson & Landau 1982), the square of
their 2-Wasserstein distance. FID is this distance of two sets of Inception features (Heusel et al. 2017, eq. 6).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import ndarray
    from numpy.typing import ArrayLike


def of_moments(mean1: ArrayLike, covariance1: ArrayLike, mean2: ArrayLike, covariance2: ArrayLike) -> float:
    """The Fréchet distance of two Gaussians, given by their means `(d,)` and covariances `(d, d)`."""
    import numpy as np

    return _distance(np.asarray(mean1, float), _root(covariance1), np.asarray(mean2, float), _root(covariance2))


def frechet_distance(first: ArrayLike, second: ArrayLike) -> float:
    """The Fréchet distance of the Gaussians fitted to two sets of rows `(n, d)`; covariances divide by n - 1.

    A set has the distance 0 to itself. Two sets drawn from one distribution have a distance of about c / n.
    """
    return _distance(*_fitted(first), *_fitted(second))


def frechet_with_stderr(first: ArrayLike, second: ArrayLike, groups: int = 10) -> tuple[float, float]:
    """The Fréchet distance of two sets of rows, and its standard error by the grouped jackknife.

    A bootstrap repeats rows, and a set with repeated rows spans fewer dimensions; a jackknife leaves rows out instead.
    Row i of both sets is in one group, so that for pairs (images of the same latents) only the difference counts.
    """
    import numpy as np

    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)  # each (n, d)
    whole = frechet_distance(a, b)
    kept = [[np.arange(len(rows)) % groups != g for rows in (a, b)] for g in range(groups)]  # masks (n,)
    without = np.array([frechet_distance(a[of_a], b[of_b]) for of_a, of_b in kept])  # (groups,)
    return whole, float(np.sqrt((groups - 1) * np.mean((without - without.mean()) ** 2)))


def _fitted(rows: ArrayLike) -> tuple[ndarray, ndarray]:
    """The mean `(d,)` of rows `(n, d)`, and R `(k, d)` with R'R their covariance, k the smaller of n and d."""
    import numpy as np

    values = np.asarray(rows, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise ValueError(f"a covariance needs two rows of numbers or more, these are {values.shape}")
    mean = values.mean(0)
    root = (values - mean) / np.sqrt(len(values) - 1)  # (n, d)
    # The R of a QR factorization has the same R'R in d rows, so that the product of two roots is (d, d) at most.
    return mean, np.asarray(np.linalg.qr(root, mode="r")) if len(root) > root.shape[1] else root


def _root(covariance: ArrayLike) -> ndarray:
    """R with R'R the covariance, which may be singular. Raises `ValueError` if it has a negative eigenvalue."""
    import numpy as np

    matrix = np.atleast_2d(np.asarray(covariance, dtype=np.float64))
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)  # (d,), (d, d)
    if values.min() < -1e-9 * max(1e-300, abs(values).max()):  # rounding makes small negative ones
        raise ValueError(f"this is no covariance: it has the eigenvalue {values.min():.3g}")
    root: ndarray = np.sqrt(values.clip(0))[:, None] * vectors.T
    return root


def _distance(mean1: ndarray, root1: ndarray, mean2: ndarray, root2: ndarray) -> float:
    import numpy as np

    # tr (C1 C2)^½ is the sum of the singular values of R1 R2'. Square roots of the eigenvalues of C1 C2 would turn an
    # error of 1e-16 into one of 1e-8, and need complex numbers where a covariance is singular.
    overlap = np.linalg.svd(root1 @ root2.T, compute_uv=False).sum()
    shift = float(np.sum((mean1 - mean2) ** 2))
    return max(0.0, shift + float(np.sum(root1**2) + np.sum(root2**2) - 2 * overlap))

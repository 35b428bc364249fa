"""The gap between a classifier's confidence and accuracy, and accuracy by class. Pure: numbers in, numbers out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy import ndarray

BINS = 15


def calibration_error(confidence: ndarray, right: ndarray, bins: int = BINS) -> ndarray:
    """The expected calibration error (Guo et al. 2017) of samples `(..., n)`: bins of equal width, weighed by samples.

    In each bin |mean confidence - share right| is taken. The last axis is summed over, so that resamples go in at once.
    """
    import numpy as np

    at = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # (low, high] as torchmetrics and Guo have it
    gaps = [np.abs(np.where(at == b, confidence - right, 0.0).sum(-1)) for b in range(bins)]
    error: ndarray = np.sum(gaps, 0) / confidence.shape[-1]
    return error


def balanced(truth: Sequence[int], right: Sequence[float]) -> tuple[list[float], float]:
    """Scores whose mean is the mean accuracy of the classes that occur, and its standard error class by class.

    Half an answer is added to each side of a class, so that the error of one that is always right is not 0.
    """
    import numpy as np

    labels, hits = np.asarray(truth), np.asarray(right, np.float64)
    _, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    weight = len(labels) / (len(counts) * counts)  # of an answer in a class
    shrunk = (np.bincount(place, hits) + 0.5) / (counts + 1)
    error = float(np.sqrt((shrunk * (1 - shrunk) / counts).sum())) / len(counts)
    return [float(score) for score in hits * weight[place]], error

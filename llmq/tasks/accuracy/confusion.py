"""The confusion matrix of a classifier, as a picture and in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import ndarray

MOST = 30
"""The classes of a picture, the most frequent first."""
NAMED = 6  # confusions in words
LETTERS = 14  # of a name


def confused(truth: Sequence[int], answers: Sequence[int], names: Callable[[int], str]) -> str:
    """The accuracy of the classes that occur, the worst first, and the confusions that are most frequent."""
    counts, hits = Counter(truth), Counter(t for t, a in zip(truth, answers, strict=True) if t == a)
    worst = sorted(counts, key=lambda c: (hits[c] / counts[c], c))[:NAMED]
    told = ", ".join(f"{names(c)} {hits[c]} of {counts[c]}" for c in worst)
    wrong = Counter(pair for pair in zip(truth, answers, strict=True) if pair[0] != pair[1])
    pairs = ", ".join(f"{names(t)} → {names(a)} {n}" for (t, a), n in wrong.most_common(NAMED))
    return f"right, the worst first: {told}; confused: {pairs or 'none'}"


def matrix(truth: Sequence[int], answers: Sequence[int], classes: Sequence[int]) -> ndarray:
    """The images of each class (rows) by answer (columns), `(classes, classes)`; others are left out."""
    from sklearn.metrics import confusion_matrix

    counts: ndarray = confusion_matrix(truth, answers, labels=list(classes))
    return counts


def picture(truth: Sequence[int], answers: Sequence[int], names: Callable[[int], str]) -> bytes:
    """The matrix as PNG, each row in shares of its class, of at most `MOST` classes that occur."""
    import numpy as np

    from llmq.vision.pictures import panels, png

    known = [c for c, _ in Counter([*truth, *answers]).most_common(MOST)]
    classes = sorted(known)
    counts = matrix(truth, answers, classes)
    of_class = [max(1, truth.count(c)) for c in classes]
    side = max(3.0, 0.32 * len(classes) + 1.2)
    figure, axes = panels(1, 1, side, side)
    panel = axes[0, 0]
    panel.imshow(counts / np.array(of_class)[:, None], cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    labels = [name if len(name := names(c)) <= LETTERS else f"{name[: LETTERS - 1]}…" for c in classes]
    panel.set_xticks(range(len(classes)), labels, rotation=90, fontsize=7)
    panel.set_yticks(range(len(classes)), labels, fontsize=7)
    panel.set(xlabel="answer", ylabel="label")
    for (row, column), count in np.ndenumerate(counts):
        if count:
            dark = count / of_class[row] > 0.5
            panel.text(column, row, str(count), ha="center", va="center", fontsize=6.5, color="w" if dark else "k")
    return png(figure)

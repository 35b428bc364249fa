"""Pairs of samples: those of two stages on the same documents. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmq.types import Samples


@dataclass(frozen=True)
class Pairs:
    """The samples of two stages on the documents that both scored, and the counts that only one of them scored."""

    stage: Samples
    base: Samples
    only_stage: int = 0
    only_base: int = 0

    @property
    def n(self) -> int:
        """The number of documents that both scored."""
        return count(self.stage)


def pairs(stage: Samples, base: Samples) -> Pairs:
    """The samples of documents that both stages scored, paired by id, or without ids by position.

    Raises `ValueError` if the samples do not pair.
    """
    if stage.ids is None or base.ids is None or (stage.statistic, stage.quantile) != (base.statistic, base.quantile):
        check_pairs(stage, base)
        return Pairs(stage, base)
    places, base_places = _places(stage.ids), _places(base.ids)
    both = [name for name in places if name in base_places]
    if not both:
        raise ValueError("samples do not pair: no document stands on both sides")
    found = _chosen(stage, [places[k] for k in both]), _chosen(base, [base_places[k] for k in both])
    check_pairs(*found)
    return Pairs(*found, len(places) - len(both), len(base_places) - len(both))


def count(samples: Samples) -> int:
    """The number of documents; several samples of one document count once."""
    return len(samples.values) if samples.clusters is None else len(set(samples.clusters))


def _places(ids: Sequence[str]) -> dict[tuple[str, int], int]:
    """The position of each document by name and turn, as one document may be asked twice."""
    seen: Counter[str] = Counter()
    places = {}
    for place, name in enumerate(ids):
        places[name, seen[name]] = place
        seen[name] += 1
    return places


def _chosen(samples: Samples, rows: Sequence[int]) -> Samples:
    def of(values: tuple[Any, ...] | None) -> Any:
        return None if values is None else tuple(values[i] for i in rows)

    return replace(
        samples, values=of(samples.values), weights=of(samples.weights), clusters=of(samples.clusters), ids=None
    )


def check_pairs(a: Samples, b: Samples) -> None:
    """Raise `ValueError` if the samples of two sides, in their order, are not of the same questions."""
    if len(a.values) != len(b.values) or (a.statistic, a.quantile) != (b.statistic, b.quantile):
        raise ValueError(f"samples do not pair: {len(a.values)} {a.statistic} against {len(b.values)} {b.statistic}")
    if _partition(a.clusters) != _partition(b.clusters):
        raise ValueError("samples do not pair: they share their documents in other ways")


def _partition(clusters: Sequence[int] | None) -> list[int] | None:
    """For each sample the first sample of its document."""
    first: dict[int, int] = {}
    return None if clusters is None else [first.setdefault(c, i) for i, c in enumerate(clusters)]

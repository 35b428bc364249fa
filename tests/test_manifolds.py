"""Precision, recall, density and coverage against their definitions done slowly, with scikit-learn's neighbours."""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from llmq.matrix.neighbours import manifolds, spread


def sets(seed: int, shift: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(60, 4)), shift + 0.7 * rng.normal(size=(45, 4))


def radii(rows: np.ndarray, k: int) -> np.ndarray:
    return NearestNeighbors(n_neighbors=k + 1).fit(rows).kneighbors(rows)[0][:, k]


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_the_definitions(seed):
    real, made = sets(seed)
    found = manifolds(real, made)
    near_real, near_made, dense = radii(real, 3), radii(made, 3), radii(real, 5)

    def inside(point: np.ndarray, centre: np.ndarray, radius: float) -> bool:
        return float(np.linalg.norm(point - centre)) <= radius

    for i, m in enumerate(made):
        assert found.precision[i] == any(inside(m, r, near_real[j]) for j, r in enumerate(real))
        assert found.density[i] == pytest.approx(sum(inside(m, r, dense[j]) for j, r in enumerate(real)) / 5)
    for j, r in enumerate(real):
        assert found.recall[j] == any(inside(r, m, near_made[i]) for i, m in enumerate(made))
        assert found.coverage[j] == any(inside(m, r, dense[j]) for m in made)


def test_what_each_is_for():
    rng = np.random.default_rng(0)
    real, alike = rng.normal(size=(2, 400, 8))
    one_mode = 0.05 * rng.normal(size=(400, 8))  # sharp and all the same
    away = alike + 20
    same, collapsed, off = (manifolds(real, made) for made in (alike, one_mode, away))
    assert same.density.mean() == pytest.approx(1, abs=0.1)
    assert same.coverage.mean() == pytest.approx(1 - 0.5**5, abs=0.05)  # Naeem et al. 2020, equation 9
    assert collapsed.precision.mean() == 1
    assert max(collapsed.recall.mean(), collapsed.coverage.mean()) < 0.1
    assert off.precision.mean() == off.recall.mean() == off.density.mean() == off.coverage.mean() == 0
    assert spread(one_mode)[0] / spread(real)[0] == pytest.approx(0.05, rel=0.05)
    assert spread(real)[0] == pytest.approx(
        np.mean([np.linalg.norm(a - b) for a in real[:60] for b in alike[:60]]), rel=0.05
    )


def test_a_set_without_neighbours_is_told():
    with pytest.raises(ValueError, match="5 and 45 rows have no 5 neighbours"):
        manifolds(sets(0)[0][:5], sets(0)[1])

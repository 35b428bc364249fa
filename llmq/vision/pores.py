"""Measures of pores, in slices `(height, width)` and volumes `(depth, height, width)`, all boolean.

`apart` is the distance of successive slices of a volume in pixels of a slice. Neighbours share a side or a face, and
what lies beyond the edge is unknown: neither pore nor solid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import ndarray


def connected_porosity(pores: ndarray) -> float:
    """The share of all pixels in pores that reach the edge of the slice or volume, through faces."""
    import numpy as np
    from scipy.ndimage import label

    numbered, _ = label(pores)
    sides = [numbered.take(end, axis) for axis in range(pores.ndim) for end in (0, -1)]
    open_ones = np.unique(np.concatenate([side.ravel() for side in sides]))
    return float(np.isin(numbered, open_ones[open_ones > 0]).mean())


def euler_number(pores: ndarray) -> int:
    """Pores less holes in them; in a volume plus enclosed solids, less tunnels (4- and 6-connected, scikit-image)."""
    from skimage.measure import euler_number as counted

    return int(counted(pores, connectivity=1))


def specific_surface(pores: ndarray, apart: float = 1.0) -> float:
    """The boundary of pores and solid over the area or volume, in 1/pixel; the edge of the image is no boundary.

    A length by Crofton's formula in four directions, or the area of marching cubes (both of scikit-image).
    """
    import numpy as np
    from skimage.measure import marching_cubes, mesh_surface_area, perimeter_crofton

    if pores.all() or not pores.any():
        return 0.0
    if pores.ndim == 2:
        # Each perimeter counts its own part of the edge, and both together the whole edge.
        both = perimeter_crofton(pores) + perimeter_crofton(~pores) - perimeter_crofton(np.ones_like(pores))
        return float(both / 2 / pores.size)
    corners, faces, *_ = marching_cubes(pores.astype(np.float32), 0.5, spacing=(apart, 1.0, 1.0))
    return float(mesh_surface_area(corners, faces) / (pores.size * apart))


def local_thickness(pores: ndarray, apart: float = 1.0) -> ndarray:
    """The diameter of the largest disc or ball within the pores that covers a pixel, in pixels; 0 in the solid.

    Diameters are 2, 4, 6, …: a ball of radius r around a pixel holds the pixels nearer than r (Hildebrand and
    Rüegsegger 1997).
    """
    from scipy.ndimage import distance_transform_edt

    thickness: ndarray = 2.0 * pores
    if pores.all():  # no solid, and no distance from it: as wide as the image
        thickness[:] = min(pores.shape)
        return thickness
    sampling = (apart, 1.0, 1.0)[-pores.ndim :]
    inside = distance_transform_edt(pores, sampling)  # to the nearest solid
    for radius in range(2, int(inside.max()) + 1):
        covered = distance_transform_edt(inside < radius, sampling) < radius  # by balls of this radius
        thickness[covered & pores] = 2 * radius
    return thickness


def two_point(pores: ndarray, distance: int) -> ndarray:
    """The chance that two points 1, 2, … `distance` pixels apart are both pore, the mean of rows and columns.

    Only pairs within the image count; its sides are longer than `distance`. `(distance,)`
    """
    import numpy as np

    chances = np.empty(distance)
    for r in range(1, distance + 1):
        down, right = pores[..., r:, :] & pores[..., :-r, :], pores[..., r:] & pores[..., :-r]
        chances[r - 1] = (down.mean() + right.mean()) / 2
    return chances


def blocks(volume: ndarray, side: int, apart: float = 1.0) -> list[ndarray]:
    """A volume `(z, y, x)` cut along each axis into the whole number of equal parts nearest to `side` pixels."""
    import numpy as np

    parts = [volume]
    for axis, step in enumerate((apart, 1.0, 1.0)):
        depth = volume.shape[axis]
        n = max(1, min(round(depth * step / side), depth // 2))  # a surface needs two slices
        parts = [each for part in parts for each in np.array_split(part, n, axis)]
    return parts

"""GPTQ and SparseGPT as the papers' equations have them: float64, one input at a time, nothing clever.

Matrices are numpy arrays `[outputs, inputs]`. Frantar et al. 2022 (arXiv 2210.17323), Frantar & Alistarh 2023 (arXiv
2301.00774).
"""

import numpy as np

BLOCK = 128


def damped(hessian, percent):
    """The Hessian with `percent` of its mean curvature on the diagonal; an input that never fires has the mean."""
    diagonal = np.diagonal(hessian)
    mean = diagonal[diagonal > 0].mean()
    return hessian + np.diag(np.where(diagonal == 0, mean, 0) + percent * mean)


def eliminated(hessian):
    """Row `i` of the inverse Hessian once the inputs before `i` are eliminated from it (GPTQ, eq. 3), for every `i`."""
    inverse = np.linalg.inv(hessian)
    rows = []
    for i in range(len(inverse)):
        rows.append(inverse[i].copy())
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return rows


def bfloat16(values):
    """To 8 significant bits."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa * 256), exponent - 8)


def grid(weights, bits, sym, mse):
    """Scale and zero of each row."""
    top = 2**bits - 1
    low, high = np.minimum(weights.min(1), 0), np.maximum(weights.max(1), 0)
    if sym:
        high = np.maximum(high, -low)
        low = -high
    nothing = high == low
    low, high = np.where(nothing, -1, low), np.where(nothing, 1, high)
    tried = []
    for share in 1 - np.arange(17 if mse else 1) / 32:
        scale = bfloat16((share * high - share * low) / top)
        zero = np.full_like(scale, 2 ** (bits - 1)) if sym else np.clip(np.round(-share * low / scale), 1, top)
        codes = np.clip(np.round(weights / scale[:, None]) + zero[:, None], 0, top)
        error = ((codes - zero[:, None]) * scale[:, None] - weights) ** 2
        tried.append((error.sum(1), scale, zero))
    errors, scales, zeros = map(np.array, zip(*tried, strict=True))
    best, outputs = errors.argmin(0), np.arange(len(weights))
    return scales[best, outputs], zeros[best, outputs]


def gptq(weight, rows, bits, group_size, sym, mse, order, static_groups):
    """Codes `[outputs, inputs]`, scales and zeros `[outputs, groups]`, and the group of each input.

    `rows` are `eliminated`, in `order`. A group's grid is found when the block of 128 that holds the group begins.
    """
    outputs, inputs = weight.shape
    size = inputs if group_size == -1 else group_size
    left, codes = weight[:, order].copy(), np.empty((outputs, inputs))
    groups = (order if static_groups else np.arange(inputs)) // size
    scales, zeros = np.empty((2, outputs, inputs // size))
    if static_groups:
        for g in range(inputs // size):
            scales[:, g], zeros[:, g] = grid(weight[:, g * size : (g + 1) * size], bits, sym, mse)
    for i in range(inputs):
        if i % BLOCK == 0:
            at_block = left.copy()
        g = groups[i]
        if not static_groups and i % size == 0:
            scales[:, g], zeros[:, g] = grid(at_block[:, i : i + size], bits, sym, mse)
        codes[:, i] = np.clip(np.round(left[:, i] / scales[:, g]) + zeros[:, g], 0, 2**bits - 1)
        error = left[:, i] - (codes[:, i] - zeros[:, g]) * scales[:, g]
        left -= np.outer(error, rows[i]) / rows[i][i]
    back = np.argsort(order)
    return codes[:, back], scales, zeros, groups[back]


def sparsegpt(weight, rows, share, of_each):
    """The pruned matrix: the mask chosen for 128 inputs at a time over all outputs, or for each n:m group."""
    left = weight.copy()
    gone = np.zeros(weight.shape, dtype=bool)
    pivots = np.array([row[i] for i, row in enumerate(rows)])
    step = of_each[1] if of_each else BLOCK
    for i in range(weight.shape[1]):
        if i % step == 0:
            scores = left[:, i : i + step] ** 2 / pivots[i : i + step]
            if of_each:
                ranks = scores.argsort(1).argsort(1)
                gone[:, i : i + step] = ranks < step - of_each[0]
            else:
                ranks = scores.flatten().argsort().argsort().reshape(scores.shape)
                gone[:, i : i + step] = ranks < round(share * scores.size)
        error = np.where(gone[:, i], left[:, i], 0)
        left -= np.outer(error, rows[i]) / pivots[i]
    return np.where(gone, 0, left)

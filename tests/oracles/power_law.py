"""Power-law fit to the largest of some values, written from the paper in numpy without the package."""

import numpy as np


def clauset(eigenvalues):
    """Exponent and distance of the fit with the smallest distance, one candidate and one value at a time."""
    data, best = np.sort(eigenvalues), (np.inf, np.nan)
    for start in range(len(data) - 1):
        tail = data[start:]
        logs = np.log(tail / tail[0])
        if logs.sum() == 0:
            continue
        alpha = 1 + len(tail) / logs.sum()
        law = 1 - (tail / tail[0]) ** (1 - alpha)
        best = min(best, (np.abs(law - np.arange(len(tail)) / len(tail)).max(), alpha))
    return best

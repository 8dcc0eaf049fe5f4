"""Every way to lay out documents and padding in a short row: exhaustive, so no arrangement can hide."""

from itertools import groupby, product

import numpy as np

LENGTH = 6


def is_valid(row):
    """Padding stands between documents, never inside one: ids on the two sides of padding differ."""
    runs = [key for key, _ in groupby(row)]
    return all(before != after for before, pad, after in zip(runs, runs[1:], runs[2:], strict=False) if pad == 0)


ALL_ROWS = np.array([row for row in product((0, 1, 2), repeat=LENGTH) if is_valid(row)], np.int32)


def documents(row):
    """Time indices of each document of a row, in order."""
    found, before = [], None
    for time, segment in enumerate(row):
        if segment == 0:
            continue
        if segment != before:
            found.append([])
        found[-1].append(time)
        before = segment
    return found

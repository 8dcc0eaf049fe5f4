"""Random arguments of `ssd`, for the tests of all its implementations."""

import numpy as np


def ssd_arguments(b, t, h, p, g, n, *, skip=True, initial=True, seed=0):
    """All but the segments, as a dict of float64; dt log-uniform over three decades."""
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((b, t, h, p)),
        "dt": 10 ** rng.uniform(-2.5, 0.5, (b, t, h)),
        "A": -rng.uniform(0.05, 3, h),
        "B": rng.standard_normal((b, t, g, n)),
        "C": rng.standard_normal((b, t, g, n)),
        "D": rng.standard_normal(h) if skip else None,
        "initial_state": rng.standard_normal((b, h, p, n)) if initial else None,
    }

"""Decays of the scan as sums of logarithms, exact over a chunk whatever their sizes.

Between tokens s and l of a chunk a head forgets exp(a_{s+1} + ... + a_l), a_k = dt_k A <= 0. The difference of two
cumulative sums would lose the small terms to the rounding of the large ones, and sums masked for every pair cost a
cumulative sum per pair. Here no term is below `forget`, where exp is already 0, and each is split into a multiple of
`STEP` and a rest of at most half of it:

- Cumulative sums of the multiples are integers of `STEP`, so exact in float32 over 2^9 tokens; so are differences.
- Cumulative sums of the rests stay below 1: their exponentials may be taken apart, and multiplied.

Restarting the state at a document is then the term `forget`: it needs no mask.
"""

import jax.numpy as jnp

from zamba2_jax.ops.segments import document_index
from zamba2_jax.typing import Array, DTypeLike, Float, Int, at_least_fp32

STEP = 2.0**-8
MAX_CHUNK = 2**9
"""Longest chunk over which sums are exact."""


def forget(dtype: DTypeLike) -> float:
    """A log decay that leaves nothing: its exponential is 0 in `dtype`, float32 or float64."""
    return -128.0 if jnp.finfo(dtype).bits == 32 else -768.0


def log_decays(
    dt: Float[Array, "b t h"], A: Float[Array, " h"], segment_ids: Int[Array, "b t"] | None = None
) -> Float[Array, "b t h"]:
    """dt A in [forget, 0], in at least float32, and `forget` where a document but the first of its row starts."""
    wide = at_least_fp32(dt.dtype)
    least = forget(wide)
    decays = jnp.maximum(dt.astype(wide) * A.astype(wide), least)
    if segment_ids is None:
        return decays
    starts = jnp.diff(document_index(segment_ids), axis=1, prepend=0) > 0
    return jnp.where(starts[..., None], least, decays)


def split(log_decay: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The nearest multiple of `STEP`, and the rest; their sum is exact."""
    coarse = jnp.round(log_decay / STEP) * STEP
    return coarse, log_decay - coarse

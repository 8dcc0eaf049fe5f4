"""Documents in a row: `segment_ids` and what the other ops derive from them.

`segment_ids` is an integer array [b, t]. Zero marks padding; every other value names the document a token belongs to,
and a document ends where the next one's id differs. Padding stands before, between or after documents, never inside
one.
"""

import jax
import jax.numpy as jnp

from zamba2_jax.ops.placement import compiled_apart
from zamba2_jax.typing import Array, Bool, Int


def _document_starts(segment_ids: Int[Array, "b t"]) -> Bool[Array, "b t"]:
    """True at the first token of every document of a row but its first."""
    time = jnp.arange(segment_ids.shape[1])
    last_real = jax.lax.cummax(jnp.where(segment_ids != 0, time, -1), axis=1)
    before = jnp.pad(last_real[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    id_before = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    return (segment_ids != 0) & (before >= 0) & (segment_ids != id_before)


def document_index(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Numbers the documents of each row 0, 1, 2...; padding takes the number of the document before it."""

    def count(segment_ids: Array) -> Array:
        return jnp.cumsum(_document_starts(segment_ids), axis=1, dtype=jnp.int32)

    return compiled_apart(count, segment_ids)


def document_positions(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Position of every token in its document, from 0; what it says at padding has no meaning."""
    count = jnp.cumsum(segment_ids != 0, axis=1, dtype=jnp.int32) - 1
    first = jax.lax.cummax(jnp.where(_document_starts(segment_ids), count, 0), axis=1)
    return jnp.maximum(count - first, 0)

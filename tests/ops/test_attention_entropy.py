import jax.numpy as jnp
import numpy as np

from tests.helpers import assert_close, normal
from zamba2_jax.ops.attention_entropy import attention_entropy

SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0], [0] * 3 + [1] * 7])


def entropies(q, k, scale, segment_ids):
    """Of every query and head, over that of uniform attention; NaN for a query that sees only itself, and padding."""
    b, t, h, _ = q.shape
    found = np.full((b, t, h), np.nan)
    for row, at, head in np.ndindex(b, t, h):
        seen = [i for i in range(at + 1) if segment_ids[row, i] == segment_ids[row, at]]
        if segment_ids[row, at] and len(seen) > 1:
            scores = k[row, seen, head // (h // k.shape[2])] @ q[row, at, head] * scale
            w = np.exp(scores) / np.exp(scores).sum()
            found[row, at, head] = -(w * np.log(w)).sum() / np.log(len(seen))
    return found


def test_every_query_by_hand(x64):
    q, k = normal(2, 10, 4, 6), normal(2, 10, 2, 6, seed=1)
    expected = entropies(np.asarray(q), np.asarray(k), 0.7, SEGMENTS)
    counted = ~np.isnan(expected[..., 0])
    sums = np.nansum(expected, axis=(0, 1)), float(counted.sum())
    assert_close(attention_entropy(q, k, 0.7, jnp.asarray(SEGMENTS)), sums, 1e-12)
    some = expected[:, [2, 5, 9]]  # the last of each third
    found = attention_entropy(q, k, 0.7, jnp.asarray(SEGMENTS), queries=3)
    assert_close(found, (np.nansum(some, axis=(0, 1)), float((~np.isnan(some[..., 0])).sum())), 1e-12)


def test_its_ends():
    k = normal(1, 64, 1, 8)
    sums, queries = attention_entropy(jnp.zeros((1, 64, 2, 8)), k, 1.0)
    np.testing.assert_allclose(sums / queries, 1, rtol=1e-6)
    sums, queries = attention_entropy(1e6 * normal(1, 64, 2, 8, seed=1), k, 1.0)
    assert (sums / queries < 0.01).all()
    assert np.isfinite(sums).all()
    assert queries == 16

"""Ops on rows divided in time, against the same ops on whole rows: values and gradients, in float64.

The short rows are all there are: every document boundary falls on, before and after an edge of a part, and every part
may be padding.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.helpers import assert_close, normal
from tests.ops.segment_rows import ALL_ROWS, LENGTH
from tests.ops.ssd_arguments import ssd_arguments
from zamba2_jax import ops
from zamba2_jax.ops import attention_xla
from zamba2_jax.parallel import sequence
from zamba2_jax.parallel.mesh import make_mesh

ROWS = jnp.asarray(ALL_ROWS)
TIME = P(None, "sequence")
ROUNDING = 1e-13


@pytest.fixture(autouse=True)
def float64(x64):
    pass


def in_parts(function, parts, in_specs, out_specs):
    """`function`, which takes the name of the axis last, on so many devices."""
    run = partial(function, axis_name="sequence")
    return jax.shard_map(run, mesh=make_mesh(sequence=parts), in_specs=in_specs, out_specs=out_specs, check_vma=False)


def assert_same(whole, parts, weights, *inputs):
    """Both give the same, and so do their gradients, of the results weighed by `weights`."""

    @partial(jax.jit, static_argnums=0)
    def with_gradients(function, *inputs):
        out, pull = jax.vjp(function, *inputs)
        return out, pull(weights)

    (out, gradients), (expected, expected_gradients) = (with_gradients(f, *inputs) for f in (parts, whole))
    masked = jax.tree.map(lambda a, w: jnp.where(w == 0, 0, a), (out, expected), (weights, weights))
    assert_close(*masked, ROUNDING)
    assert_close(gradients, expected_gradients, ROUNDING)


def real(array, rows=ROWS):
    """The array with zeros where the rows have padding."""
    return jnp.where((rows != 0).reshape(rows.shape + (1,) * (array.ndim - 2)), array, 0)


def test_convolve():
    taps, width = 4, 3
    inputs = normal(len(ROWS), LENGTH, width), normal(taps, width), normal(width)
    divided = in_parts(sequence.convolve, 2, (TIME, P(), P(), TIME), TIME)
    weights = real(normal(len(ROWS), LENGTH, width, seed=1))
    assert_same(
        lambda x, w, bias: ops.causal_conv1d(x, w, bias, segment_ids=ROWS)[0],
        lambda x, w, bias: divided(x, w, bias, ROWS),
        weights,
        *inputs,
    )
    short = in_parts(sequence.convolve, 6, (TIME, P(), P(), P()), TIME)
    with pytest.raises(ValueError, match="1 tokens on each device of mesh axis 'sequence': expected at least 3"):
        short(*inputs, None)


@pytest.mark.parametrize("parts", [3, 6])
def test_scan(parts):
    h, p, g, n = 4, 5, 2, 3
    given = ssd_arguments(len(ROWS), LENGTH, h, p, g, n, initial=False)
    given.pop("initial_state")
    inputs = [jnp.asarray(array) for array in given.values()]
    divided = in_parts(sequence.scan, parts, (TIME, TIME, P(), TIME, TIME, P(), TIME), (TIME, P()))
    weights = real(normal(len(ROWS), LENGTH, h, p, seed=1)), normal(len(ROWS), h, p, n, seed=2)
    assert_same(
        lambda *inputs: ops.ssd(*inputs, segment_ids=ROWS, implementation="sequential"),
        lambda *inputs: divided(*inputs, ROWS),
        weights,
        *inputs,
    )


@pytest.mark.parametrize("parts", [3, 6])
def test_selective_scan(parts):
    h, p, n, b = 2, 3, 4, len(ROWS)
    dt, A = jnp.exp(normal(b, LENGTH, h, p, seed=1)), -jnp.exp(normal(h, p, n))
    of_state = normal(b, LENGTH, h, n), normal(b, LENGTH, h, n, seed=1)
    inputs = normal(b, LENGTH, h, p), dt, A, *of_state, normal(h, p)
    divided = in_parts(sequence.selective_scan, parts, (TIME, TIME, P(), TIME, TIME, P(), TIME), (TIME, P()))
    weights = real(normal(b, LENGTH, h, p, seed=2)), normal(b, h, p, n, seed=2)
    assert_same(
        lambda *inputs: ops.selective_scan(*inputs, segment_ids=ROWS, implementation="sequential"),
        lambda *inputs: divided(*inputs, ROWS),
        weights,
        *inputs,
    )


@pytest.mark.parametrize("parts", [3, 6])
def test_attend_to_short_rows(parts):
    h, kv, p = 4, 2, 3
    inputs = normal(len(ROWS), LENGTH, h, p), *(normal(len(ROWS), LENGTH, kv, p, seed=i) for i in (1, 2))
    attend_in_parts(inputs, ROWS, parts)


@pytest.mark.parametrize(("packed", "window"), [(True, None), (False, None), (True, 6), (False, 14)])
def test_attend_in_blocks(monkeypatch, packed, window):
    """Parts of two blocks and a rest, that see up to three spans, or a window that reaches into the part before."""
    monkeypatch.setattr(attention_xla, "BLOCK", 4)
    monkeypatch.setattr(attention_xla, "SPANS", 3)
    b, t, h, kv, p = 2, 33, 4, 2, 3
    inputs = normal(b, t, h, p), *(normal(b, t, kv, p, seed=i) for i in (1, 2))
    rows = jnp.asarray(np.repeat([[1] * 6 + [2] * 3, [0] + [3] * 6 + [4] * 2], [3, 3, 3, 3, 4, 4, 4, 4, 5], axis=1))
    attend_in_parts(inputs, rows if packed else None, 3, window)


def attend_in_parts(inputs, rows, parts, window=None):
    scale = 0.7
    attend = partial(sequence.attend, scale=scale, window=window)

    def divided(q, k, v):
        run = in_parts(
            lambda q, k, v, ids, axis_name: attend(q, k, v, segment_ids=ids, axis_name=axis_name),
            parts,
            (TIME, TIME, TIME, P() if rows is None else TIME),
            TIME,
        )
        return run(q, k, v, rows)

    def whole(q, k, v):
        return ops.causal_attention(q, k, v, scale, rows, implementation="plain", window=window)

    assert_same(whole, divided, normal(*inputs[0].shape, seed=3), *inputs)


def test_small_decays_are_exact_beside_large_ones():
    """In float32: as a difference of two sums, what is forgotten after a token would be lost in that before it."""
    dt = np.where(np.arange(4096) < 2048, 127, 1.1e-3)
    ones = jnp.ones((1, 4096, 1, 1), jnp.float32)
    decay, state = sequence._reduced(ones, jnp.asarray(dt, jnp.float32)[None, :, None], -ones[0, 0, 0], ones, None)
    after = np.cumsum(dt[::-1])[::-1] - dt
    assert_close(state.item(), np.sum(dt * np.exp(-after)), 1e-6)
    assert decay == 0

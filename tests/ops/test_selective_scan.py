"""The selective scan against a plain loop in numpy, by chunks and token by token."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import as_dtype, assert_close, assert_finite
from tests.ops.segment_rows import ALL_ROWS, documents
from zamba2_jax.ops import selective_scan, selective_scan_step

b, t, h, p, n = 4, 12, 3, 8, 7

# In every row something else: two documents, padding between, an id that comes back, padding at both ends.
SEGMENTS = np.array(
    [
        [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2],
        [3, 3, 0, 0, 4, 5, 5, 5, 5, 5, 5, 5],
        [1, 1, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 7, 7, 7, 0, 0, 8, 9, 9, 9, 0],
    ]
)


def arguments(*, skip=True, initial=True, segments=False, length=t, sizes=(b, h, p, n)):
    """As a dict of float64; dt log-uniform over three decades."""
    rng, (b, h, p, n) = np.random.default_rng(0), sizes
    return {
        "x": rng.standard_normal((b, length, h, p)),
        "dt": 10 ** rng.uniform(-2.5, 0.5, (b, length, h, p)),
        "A": -rng.uniform(0.05, 3, (h, p, n)),
        "B": rng.standard_normal((b, length, h, n)),
        "C": rng.standard_normal((b, length, h, n)),
        "D": rng.standard_normal((h, p)) if skip else None,
        "initial_state": rng.standard_normal((b, h, p, n)) if initial else None,
        "segment_ids": SEGMENTS if segments else None,
    }


def on_device(inputs):
    return {name: None if array is None else jnp.asarray(array) for name, array in inputs.items()}


def loop(x, dt, A, B, C, D, initial_state, segment_ids):
    """y and the last state, a token of a row at a time; y is 0 at padding."""
    b, t, h, p = x.shape
    y = np.zeros_like(x)
    states = np.zeros((b, h, p, A.shape[-1])) if initial_state is None else initial_state.copy()
    for row in range(b):
        docs = [list(range(t))] if segment_ids is None else documents(segment_ids[row])
        for number, times in enumerate(docs):
            for head in range(h):
                state = states[row, head] * (number == 0)
                for i in times:
                    step = dt[row, i, head][:, None]
                    state = np.exp(step * A[head]) * state + step * np.outer(x[row, i, head], B[row, i, head])
                    y[row, i, head] = state @ C[row, i, head] + (0 if D is None else D[head] * x[row, i, head])
                states[row, head] = state
    return y, states


@partial(jax.jit, static_argnames=("implementation", "chunk_size", "window"))
def run(inputs, **options):
    """y with padding at 0, and the state."""
    y, state = selective_scan(**inputs, **options)
    if inputs["segment_ids"] is not None:
        y = jnp.where(inputs["segment_ids"][..., None, None] != 0, y, 0)
    return y, state


CASES = [
    ({"implementation": "sequential"}, {"segments": True}),
    ({"implementation": "sequential"}, {"skip": False, "initial": False}),
    ({"chunk_size": 1}, {"segments": True}),
    ({"chunk_size": 5, "window": 1}, {"segments": True, "initial": False}),
    ({"chunk_size": 3, "window": 2}, {"segments": True}),
    ({"chunk_size": 2, "window": 4}, {"skip": False}),
    ({"chunk_size": 4, "window": 3}, {"segments": True, "skip": False, "initial": False}),
    ({}, {"initial": False}),
]


@pytest.mark.parametrize(("options", "kind"), CASES, ids=str)
def test_equals_the_loop(x64, options, kind):
    inputs = arguments(**kind)
    assert_close(run(on_device(inputs), **options), loop(**inputs), 1e-13)  # float64 has 1e-16; sums of 12 steps


def test_every_short_row_of_documents(x64):
    """All arrangements of documents and padding, against each document apart."""
    inputs = arguments(length=ALL_ROWS.shape[1], sizes=(len(ALL_ROWS), 1, 2, 3)) | {"segment_ids": ALL_ROWS}
    expected = loop(**inputs)
    for options in ({"implementation": "sequential"}, {"chunk_size": 4}, {"chunk_size": 2, "window": 2}):
        assert_close(run(on_device(inputs), **options), expected, 1e-13, f"{options} ")


FLOATS = ("x", "dt", "A", "B", "C", "D", "initial_state")


@partial(jax.jit, static_argnames=("implementation", "chunk_size", "window"))
def gradients(inputs, weights, **options):
    """Of a random sum of y and the state, by every floating-point argument."""

    def total(floats):
        y, state = run(inputs | floats, **options)
        return jnp.sum(y * weights[0]) + jnp.sum(state * weights[1])

    return jax.grad(total)({name: inputs[name] for name in FLOATS if inputs[name] is not None})


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"chunk_size": 5, "window": 1}, {"segments": True}),
        ({"chunk_size": 3, "window": 2}, {"segments": True}),
        ({"chunk_size": 2, "window": 6}, {"skip": False, "initial": False}),
    ],
    ids=str,
)
def test_gradients_equal_those_of_the_recurrence(x64, options, kind):
    """Which JAX has derived of the oracle."""
    inputs = on_device(arguments(**kind))
    weights = [jnp.asarray(np.random.default_rng(1).standard_normal(shape)) for shape in ((b, t, h, p), (b, h, p, n))]
    expected = gradients(inputs, weights, implementation="sequential")
    assert_close(gradients(inputs, weights, **options), expected, 1e-12)


def test_the_oracle_has_every_derivative(x64):
    """A Hessian-vector product, forward over reverse, against differences of gradients."""
    inputs = on_device(arguments(segments=True))
    weights = jnp.ones((b, t, h, p)), jnp.ones((b, h, p, n))

    def gradient(dt):
        return gradients(inputs | {"dt": dt}, weights, implementation="sequential")["A"]

    direction, step = inputs["x"], 1e-5
    _, found = jax.jvp(gradient, (inputs["dt"],), (direction,))
    sides = [gradient(inputs["dt"] + sign * step * direction) for sign in (1, -1)]
    assert_close(found, (sides[0] - sides[1]) / (2 * step), 1e-6)


@pytest.mark.parametrize("options", [{"chunk_size": 5}, {"chunk_size": 3, "window": 2}], ids=str)
def test_extremes_stay_finite(options):
    """dt and A over many decades, zeros among them, to where dt A overflows; and a row of nothing but padding."""
    inputs, ids = arguments(segments=True), SEGMENTS.copy()
    ids[0] = 0
    ids[1] = 1
    small = {name: inputs[name] * 1e-3 for name in ("x", "B", "C", "initial_state")}
    dt = np.resize([0, 1e-38, 1e-6, 1e-3, 1, 1e2, 1e3], (b, t, h, p))
    A = np.resize([0, -1e-6, -1e-2, -1, -1e4, -1e38], (h, p, n))
    inputs = as_dtype(on_device(inputs | small | {"dt": dt, "A": A, "segment_ids": ids}), jnp.float32)
    y, state = run(inputs, **options)
    assert_finite((y, state))
    assert_finite(gradients(inputs, (jnp.ones((b, t, h, p)), jnp.ones((b, h, p, n))), **options))
    np.testing.assert_array_equal(state[0], inputs["initial_state"][0])
    np.testing.assert_array_equal(y[0], 0)


@pytest.mark.parametrize("options", [{"chunk_size": 32}, {"chunk_size": 7, "window": 5}], ids=str)
def test_float32_is_as_exact_as_float32_can_be(options):
    """Long rows of small steps, and a few steps that forget everything, of inputs too small to matter."""
    inputs, forget = arguments(length=300), np.arange(300) % 50 < 5
    inputs["dt"] /= 100
    inputs["dt"][:, forget] = 100
    inputs["x"][:, forget] *= 1e-6
    inputs = {name: None if a is None else a.astype(np.float32) for name, a in (inputs | {"D": None}).items()}
    expected = loop(**{name: None if a is None else a.astype(np.float64) for name, a in inputs.items()})
    assert_close(run(on_device(inputs), **options), expected, 1e-6)  # 16 roundings of 6e-8


@pytest.mark.parametrize("skip", [True, False])
def test_pieces_and_steps_are_the_row(x64, skip):
    inputs = on_device(arguments(skip=skip))
    expected = run(inputs, implementation="sequential")
    by_time = ("x", "dt", "B", "C")
    first, second = ({k: v[:, s] if k in by_time else v for k, v in inputs.items()} for s in (slice(5), slice(5, None)))
    y, state = run(first, chunk_size=3)
    ys = [y]
    for i in range(3):
        now = [second[name][:, i] for name in by_time]
        y, state = selective_scan_step(now[0], now[1], inputs["A"], *now[2:], inputs["D"], state=state)
        ys.append(y[:, None])
    rest = {k: v[:, 3:] if k in by_time else v for k, v in second.items()} | {"initial_state": state}
    y, state = run(rest, chunk_size=2, window=2)
    assert_close((jnp.concatenate([*ys, y], axis=1), state), expected, 1e-13)


def test_bfloat16_is_computed_in_float32():
    """Only the result is rounded: by at most 2^-8 of its value, half a unit in the last place of bfloat16."""
    inputs = on_device(arguments())
    low = as_dtype(inputs, jnp.bfloat16) | {name: inputs[name].astype(jnp.float32) for name in ("dt", "A", "D")}
    exact, exact_state = run(as_dtype(low, jnp.float32), implementation="sequential")
    y, state = run(low, chunk_size=5)
    one = {name: low[name][:, 0] for name in ("x", "dt", "B", "C")}
    first, _ = selective_scan_step(**one, A=low["A"], D=low["D"], state=low["initial_state"].astype(jnp.float32))
    assert (y.dtype, state.dtype, first.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    for found, expected in ((y, exact), (first, exact[:, 0])):
        np.testing.assert_allclose(np.float32(found), expected, rtol=2**-8, atol=1e-5)
    assert_close(state, exact_state, 1e-6)


def test_memory_of_the_gradient_is_a_few_times_its_inputs(unchecked):
    inputs = jax.eval_shape(lambda: as_dtype(on_device(arguments(length=1024, sizes=(1, 2, 128, 16))), jnp.float32))
    inputs.pop("segment_ids")

    def both(inputs):
        y, pull = jax.vjp(lambda inputs: selective_scan(**inputs)[0], inputs)
        return y, pull(y)

    found = jax.jit(both).lower(inputs).compile().memory_analysis()
    assert found.temp_size_in_bytes < 4 * sum(4 * array.size for array in jax.tree.leaves(inputs))


WRONG = [
    ({"chunk_size": 0}, "chunk_size=0: expected an integer >= 1"),
    ({"window": 0}, "window=0: expected an integer >= 1"),
    ({"implementation": "cuda"}, "implementation='cuda': expected one of xla, sequential"),
    ({"x": jnp.zeros((2, 3, 4))}, "x has shape (2, 3, 4) and A (3, 8, 7), expected [b, t, h, p] and [h, p, n]"),
    ({"x": jnp.zeros((b, 0, h, p))}, "x has shape (4, 0, 3, 8): expected at least one token"),
    ({"dt": jnp.zeros((b, t, h))}, "dt has shape (4, 12, 3), expected (4, 12, 3, 8) for x of shape (4, 12, 3, 8)"),
    ({"D": jnp.zeros(h)}, "D has shape (3,), expected (3, 8)"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_is_named(unchecked, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        selective_scan(**on_device(arguments()) | changes)

"""The scan against a plain loop in numpy, in every implementation."""

import re
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.helpers import as_dtype, assert_close, assert_finite, for_a_gpu
from tests.ops.segment_rows import ALL_ROWS, documents
from tests.ops.ssd_arguments import ssd_arguments
from zamba2_jax.ops import ssd, ssd_step
from zamba2_jax.ops.ssd import default_implementation

# All different, but for r = h / g, so that no axis can stand in for another.
b, t, h, p, n = 4, 12, 6, 8, 7

# In every row something else: two documents, padding between, an id that comes back, padding at both ends.
SEGMENTS = np.array(
    [
        [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2],
        [3, 3, 0, 0, 4, 5, 5, 5, 5, 5, 5, 5],
        [1, 1, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 7, 7, 7, 0, 0, 7 + 1, 9, 9, 9, 0],
    ]
)


def arguments(g, *, skip=True, initial=True, segments=False, length=t, seed=0):
    inputs = ssd_arguments(b, length, h, p, g, n, skip=skip, initial=initial, seed=seed)
    return inputs | {"segment_ids": SEGMENTS if segments else None}


def on_device(inputs):
    return {name: None if array is None else jnp.asarray(array) for name, array in inputs.items()}


def loop(x, dt, A, B, C, D, initial_state, segment_ids):
    """y and the last state, one number at a time; y is 0 at padding."""
    b, t, h, p = x.shape
    y = np.zeros_like(x)
    states = np.zeros((b, h, p, B.shape[-1])) if initial_state is None else initial_state.copy()
    for row in range(b):
        docs = [list(range(t))] if segment_ids is None else documents(segment_ids[row])
        for number, times in enumerate(docs):
            for head in range(h):
                state = states[row, head] * (number == 0)
                group = head * B.shape[2] // h
                for i in times:
                    step = dt[row, i, head]
                    state = np.exp(step * A[head]) * state + step * np.outer(x[row, i, head], B[row, i, group])
                    y[row, i, head] = state @ C[row, i, group] + (0 if D is None else D[head] * x[row, i, head])
                states[row, head] = state
    return y, states


@partial(jax.jit, static_argnames=("implementation", "chunk_size"))
def run(inputs, **options):
    """y with padding at 0, and the state."""
    y, state = ssd(**inputs, **options)
    if inputs["segment_ids"] is not None:
        y = jnp.where(inputs["segment_ids"][..., None, None] != 0, y, 0)
    return y, state


CASES = [
    ("sequential", 1, {"g": 2, "segments": True}),
    ("sequential", 1, {"g": 1, "skip": False, "initial": False}),
    ("associative", 1, {"g": 3, "segments": True}),
    ("associative", 1, {"g": 6, "skip": False, "initial": False}),
    ("xla", 1, {"g": 2, "segments": True}),
    ("xla", 3, {"g": 1}),
    ("xla", 4, {"g": 3, "segments": True, "initial": False}),
    ("xla", 5, {"g": 2, "segments": True}),
    ("xla", 5, {"g": 6, "skip": False}),
    ("xla", 12, {"g": 6, "segments": True, "skip": False}),
    ("xla", 64, {"g": 2, "initial": False}),
]


@pytest.mark.parametrize(("implementation", "chunk_size", "options"), CASES)
def test_equals_the_loop(x64, implementation, chunk_size, options):
    inputs = arguments(**options)
    got = run(on_device(inputs), implementation=implementation, chunk_size=chunk_size)
    assert_close(got, loop(**inputs), 1e-13)  # float64 has 1e-16; sums of 12 steps


def test_every_short_row_of_documents(x64):
    """All arrangements of documents and padding, against each document apart."""
    rng = np.random.default_rng(0)
    rows, length = ALL_ROWS.shape
    inputs = {
        "x": rng.standard_normal((rows, length, 1, 1)),
        "dt": rng.uniform(0.1, 1, (rows, length, 1)),
        "A": np.array([-0.5]),
        "B": rng.standard_normal((rows, length, 1, 1)),
        "C": rng.standard_normal((rows, length, 1, 1)),
        "D": None,
        "initial_state": rng.standard_normal((rows, 1, 1, 1)),
        "segment_ids": ALL_ROWS,
    }
    expected = loop(**inputs)
    for implementation in ("xla", "associative", "sequential"):
        got = run(on_device(inputs), implementation=implementation, chunk_size=4)
        assert_close(got, expected, 1e-13, f"{implementation} ")


FLOATS = ("x", "dt", "A", "B", "C", "D", "initial_state")


@partial(jax.jit, static_argnames=("implementation", "chunk_size"))
def gradients(inputs, weights, **options):
    """Of a random sum of y and the state, by every floating-point argument."""

    def total(floats):
        y, state = run(inputs | floats, **options)
        return jnp.sum(y * weights[0]) + jnp.sum(state * weights[1])

    return jax.grad(total)({name: inputs[name] for name in FLOATS if inputs[name] is not None})


GRADIENT_CASES = [
    ("associative", 1, {"g": 2, "segments": True}),
    ("xla", 3, {"g": 2}),
    ("xla", 5, {"g": 2, "segments": True}),
    ("xla", 64, {"g": 1, "segments": True}),
]


@pytest.mark.parametrize(("implementation", "chunk_size", "options"), GRADIENT_CASES)
def test_gradients_equal_those_of_the_recurrence(x64, implementation, chunk_size, options):
    inputs = on_device(arguments(**options))
    weights = [jnp.asarray(np.random.default_rng(1).standard_normal(shape)) for shape in ((b, t, h, p), (b, h, p, n))]
    expected = gradients(inputs, weights, implementation="sequential", chunk_size=1)
    got = gradients(inputs, weights, implementation=implementation, chunk_size=chunk_size)
    assert_close(got, expected, 1e-11)


def test_gradients_of_the_recurrence_are_its_differences(x64):
    inputs = {name: None if a is None else a[:1] for name, a in arguments(2, segments=True, length=t).items()}
    inputs |= {name: arguments(2)[name] for name in ("A", "D")}
    inputs = on_device(inputs)

    def of_floats(*values):
        return run(inputs | dict(zip(FLOATS, values, strict=True)), implementation="sequential", chunk_size=1)

    values = [inputs[name] for name in FLOATS]
    check_grads(of_floats, values, order=1, modes=["rev"], eps=1e-5, rtol=1e-6, atol=1e-6)


def test_float32_is_as_exact_as_float32_can_be():
    """Long rows of small steps, and a few steps that forget everything, of inputs too small to matter.

    Log decays reach -3000 early in a chunk, next to -0.01: differences of one cumulative sum would lose four digits.
    """
    rng = np.random.default_rng(0)
    inputs = arguments(2, length=300)
    dt, A = 10 ** rng.uniform(-4, -2, (b, 300, h)), -(10 ** rng.uniform(-1, 1.5, h))
    forget = np.arange(300) % 50 < 5
    dt[:, forget] = 100
    inputs["x"][:, forget] *= 1e-6
    inputs |= {"dt": dt, "A": A, "D": None}
    inputs = {name: None if a is None else a.astype(np.float32) for name, a in inputs.items()}
    expected = loop(**{name: None if a is None else a.astype(np.float64) for name, a in inputs.items()})
    for implementation in ("xla", "associative", "sequential"):
        got = run(on_device(inputs), implementation=implementation, chunk_size=64)
        assert_close(got, expected, 1e-6, f"{implementation} ")  # 16 roundings of 6e-8


def extremes(dtype):
    """dt and A over many decades, zeros among them, to where dt A overflows; and rows of nothing but padding."""
    inputs = arguments(2, segments=True)
    dt = np.resize([0, 1e-38, 1e-6, 1e-3, 1, 1e2, 1e3], (b, t, h))
    ids = SEGMENTS.copy()
    ids[0] = 0
    ids[1] = 1
    A = np.array([0, -1e-6, -1e-2, -1, -1e4, -1e38])
    small = {name: inputs[name] * 1e-3 for name in ("x", "B", "C", "initial_state")}
    return as_dtype(on_device(inputs | small | {"dt": dt, "A": A, "segment_ids": ids}), dtype)


@pytest.mark.parametrize("implementation", ["xla", "associative", "sequential"])
def test_extremes_stay_finite(implementation):
    inputs = extremes(jnp.float32)
    assert_finite(run(inputs, implementation=implementation, chunk_size=5))
    weights = (jnp.ones((b, t, h, p)), jnp.ones((b, h, p, n)))
    assert_finite(gradients(inputs, weights, implementation=implementation, chunk_size=5))
    y, state = run(inputs, implementation=implementation, chunk_size=5)
    np.testing.assert_array_equal(state[0], inputs["initial_state"][0])  # a row of padding
    np.testing.assert_array_equal(y[0], 0)


def test_no_time_leaves_the_state_alone():
    inputs = on_device(arguments(2, skip=False)) | {"dt": jnp.zeros((b, t, h))}
    _, state = run(as_dtype(inputs, jnp.float32), implementation="xla", chunk_size=5)
    np.testing.assert_array_equal(state, inputs["initial_state"].astype(jnp.float32))


@pytest.mark.parametrize("split", [1, 5, 11])
def test_a_row_in_two_pieces_is_the_row(x64, split):
    inputs = on_device(arguments(2))
    pieces = (slice(split), slice(split, None))
    first, second = ({k: v[:, s] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()} for s in pieces)
    y1, state = run(first, implementation="xla", chunk_size=3)
    y2, state = run(second | {"initial_state": state}, implementation="xla", chunk_size=3)
    got = jnp.concatenate([y1, y2], axis=1), state
    assert_close(got, run(inputs, implementation="sequential", chunk_size=1), 1e-13)


@pytest.mark.parametrize("skip", [True, False])
def test_steps_are_the_row(x64, skip):
    inputs = on_device(arguments(3, skip=skip))

    def step(state, now):
        y, state = ssd_step(now["x"], now["dt"], inputs["A"], now["B"], now["C"], inputs["D"], state=state)
        return state, y

    by_time = {name: jnp.moveaxis(inputs[name], 1, 0) for name in ("x", "dt", "B", "C")}
    state, y = jax.lax.scan(step, inputs["initial_state"], by_time)
    assert_close((jnp.moveaxis(y, 0, 1), state), run(inputs, implementation="sequential", chunk_size=1), 1e-13)


@pytest.mark.parametrize("implementation", ["xla", "associative", "sequential"])
def test_bfloat16_is_computed_in_float32(implementation):
    """Only the result is rounded: by at most 2^-8 of its value, half a unit in the last place of bfloat16."""
    inputs = on_device(arguments(2))
    low = as_dtype(inputs, jnp.bfloat16) | {name: inputs[name].astype(jnp.float32) for name in ("dt", "A", "D")}
    y, state = run(low, implementation=implementation, chunk_size=5)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    exact, exact_state = run(as_dtype(low, jnp.float32), implementation="sequential", chunk_size=1)
    np.testing.assert_allclose(np.float32(y), exact, rtol=2**-8, atol=1e-5)
    assert_close(state, exact_state, 1e-6)

    one = {name: low[name][:, 0] for name in ("x", "dt", "B", "C")}
    y, state = ssd_step(**one, A=low["A"], D=low["D"], state=low["initial_state"].astype(jnp.float32))
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(np.float32(y), exact[:, 0], rtol=2**-8, atol=1e-5)


WRONG = [
    ({"chunk_size": 0}, "chunk_size=0: expected an integer from 1 to 512"),
    (
        {"implementation": "cuda"},
        "implementation='cuda': expected one of xla, pallas_tpu, pallas_gpu, associative, sequential",
    ),
    ({"x": jnp.zeros((2, 3, 4))}, "x has shape (2, 3, 4) and B (4, 12, 2, 7), expected [b, t, h, p] and [b, t, g, n]"),
    ({"x": jnp.zeros((4, 0, 6, 8))}, "x has shape (4, 0, 6, 8): expected at least one token"),
    ({"B": jnp.zeros((4, 12, 4, 7))}, "6 heads do not divide into 4 groups"),
    ({"dt": jnp.zeros((4, 6, 12))}, "dt has shape (4, 6, 12), expected (4, 12, 6) for x of shape (4, 12, 6, 8)"),
    ({"A": jnp.zeros(5)}, "A has shape (5,), expected (6,)"),
    ({"C": jnp.zeros((4, 12, 2, 8))}, "C has shape (4, 12, 2, 8), expected (4, 12, 2, 7)"),
    ({"D": jnp.zeros((6, 1))}, "D has shape (6, 1), expected (6,)"),
    ({"initial_state": jnp.zeros((4, 6, 7, 8))}, "initial_state has shape (4, 6, 7, 8), expected (4, 6, 8, 7)"),
    ({"segment_ids": jnp.ones(12, int)}, "segment_ids has shape (12,), expected (4, 12)"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments_are_named(unchecked, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ssd(**on_device(arguments(2)) | changes)


@pytest.mark.parametrize(
    ("backend", "devices", "dtype", "expected"),
    [
        ("cpu", 1, jnp.bfloat16, "xla"),
        ("tpu", 1, jnp.float32, "pallas_tpu"),
        ("tpu", 8, jnp.float32, "xla"),
    ],
)
def test_default_implementation(monkeypatch, backend, devices, dtype, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert default_implementation(dtype) == expected


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        ("NVIDIA H200", jnp.bfloat16, "pallas_gpu"),
        ("NVIDIA H100 80GB HBM3", jnp.bfloat16, "pallas_gpu"),
        ("NVIDIA H200", jnp.float32, "xla"),
        ("NVIDIA A100-SXM4-80GB", jnp.bfloat16, "xla"),
    ],
)
def test_default_implementation_by_gpu(monkeypatch, kind, dtype, expected):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with for_a_gpu(kind):
        assert default_implementation(dtype) == expected


def test_kernels_are_the_default_of_a_shard():
    """Inside of a `shard_map` every device has its own, whole problem; the platform is that of the mesh."""
    seen = []

    def shard(x):
        seen.append(default_implementation(jnp.bfloat16))
        return x

    specs = jax.sharding.PartitionSpec("data")
    for platform, kind in (("tpu", "any"), ("gpu", "NVIDIA H200"), ("cpu", "any")):
        device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=auto, abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            seen.append(default_implementation(jnp.bfloat16))
            jax.eval_shape(jax.shard_map(shard, in_specs=specs, out_specs=specs, check_vma=False), np.zeros(2))
    assert seen == ["xla", "pallas_tpu", "xla", "pallas_gpu", "xla", "xla"]


@pytest.mark.parametrize(
    ("implementation", "platform", "kernel", "context"),
    [
        ("pallas_tpu", "tpu", "tpu_custom_call", nullcontext()),
        ("pallas_gpu", "cuda", "__gpu$xla.gpu.triton", for_a_gpu()),
    ],
)
def test_kernels_are_what_is_lowered(implementation, platform, kernel, context):
    inputs = as_dtype(on_device(arguments(2)), jnp.float32)
    with context:
        traced = jax.jit(partial(ssd, implementation=implementation)).trace(**inputs)
        assert kernel in traced.lower(lowering_platforms=(platform,)).as_text()

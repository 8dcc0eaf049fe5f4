"""Attention against a loop over queries in numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import assert_close, assert_finite, for_a_gpu, normal
from tests.ops.segment_rows import ALL_ROWS, LENGTH, documents
from zamba2_jax import ops
from zamba2_jax.ops import attention, attention_splash, attention_xla
from zamba2_jax.ops.attention import default_implementation

SCALE = 0.7
b, t, h, kv, p = 2, 6, 6, 2, 5


causal_attention, cached_attention = (
    jax.jit(op, static_argnames="scale") for op in (ops.causal_attention, ops.cached_attention)
)


@pytest.fixture(params=[False, True], ids=["float32", "float64"])
def rounding(request):
    """What is left of the difference between two right answers, relative to the largest number."""
    with jax.enable_x64(request.param):
        yield 1e-13 if request.param else 1e-6


def attend(q, k, v):
    """One query [h, p] to keys and values [u, kv, p]: query head i reads head i // (h / kv)."""
    out = np.empty_like(q)
    for head in range(len(q)):
        group = head // (len(q) // k.shape[1])
        weights = np.exp(k[:, group] @ q[head] * SCALE)
        out[head] = weights @ v[:, group] / weights.sum()
    return out


def arguments(rows=b, length=t, heads=h, kv_heads=kv):
    return normal(rows, length, heads, p), *(normal(rows, length, kv_heads, p, seed=seed) for seed in (1, 2))


def by_documents(q, k, v, segment_ids, window=None):
    """What `causal_attention` says at real tokens; 0 at padding."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for row, ids in enumerate(segment_ids):
        for times in documents(ids):
            for count, i in enumerate(times, start=1):
                seen = times[max(0, count - (window or count)) : count]
                out[row, i] = attend(q[row, i], k[row, seen], v[row, seen])
    return out


def test_equals_the_loop(rounding):
    q, k, v = arguments()
    assert_close(causal_attention(q, k, v, SCALE), by_documents(q, k, v, np.ones((b, t))), rounding)


def test_every_short_row_of_documents(rounding):
    q, k, v = arguments(len(ALL_ROWS), LENGTH, 2, 1)
    got = causal_attention(q, k, v, SCALE, jnp.asarray(ALL_ROWS))
    assert_finite(got)
    real = ALL_ROWS[..., None, None] != 0
    assert_close(jnp.where(real, got, 0), by_documents(q, k, v, ALL_ROWS), rounding)


def test_one_key_head_is_read_as_if_repeated(rounding):
    q, k, v = arguments(heads=4, kv_heads=1)
    repeated = [jnp.repeat(x, 4, axis=2) for x in (k, v)]
    assert_close(causal_attention(q, k, v, SCALE), causal_attention(q, *repeated, SCALE), rounding)


def test_gradients_are_finite_where_scores_are_huge_and_rows_are_padding():
    q, k, v = arguments()
    ids = jnp.array([[0] * t, [0, 1, 1, 2, 0, 0]])
    total = jax.jit(jax.grad(lambda *qkv: causal_attention(*qkv, 1e8, ids).sum(), argnums=(0, 1, 2)))
    gradients = total(q, k, v)
    assert_finite(gradients)


def test_cache_takes_rows_in_pieces(rounding):
    """Row 0 takes tokens 4 + 2, row 1 takes 2 + 3, padded, next to slots that hold anything."""
    q, k, v = map(np.asarray, arguments())
    expected = by_documents(q, k, v, np.ones((b, t)))
    cached = [np.full_like(k, 1e30, shape=(b, kv, 8, p))] * 2
    lengths = np.zeros(b, int)
    for taken in ([4, 2], [2, 3]):
        slots = lengths[:, None] + np.arange(4)
        real = np.arange(4) < np.array(taken)[:, None]
        piece = [np.stack([x[row][slots[row] % t] for row in range(b)]) for x in (q, k, v)]
        out, *cached = cached_attention(*piece, *cached, slots, real, SCALE)
        for row in range(b):
            assert_close(
                np.asarray(out)[row, : taken[row]], expected[row, lengths[row] : lengths[row] + taken[row]], rounding
            )
        lengths += taken
    for row, length in enumerate(lengths):
        for got, x in zip(cached, (k, v), strict=True):
            np.testing.assert_array_equal(np.asarray(got)[row, :, :length], x[row, :length].swapaxes(0, 1))
            assert (np.asarray(got)[row, :, length:] == k.dtype.type(1e30)).all()


@pytest.mark.parametrize("window", [1, 2, 5, 6])
def test_a_ring_takes_rows_in_pieces(rounding, window):
    """Row 0 takes tokens 4 + 1 + 1, row 1 takes 2 + 1 + 3, padded, next to slots that hold anything."""
    q, k, v = map(np.asarray, arguments())
    expected = by_documents(q, k, v, np.ones((b, t)), window)
    ring, take = (
        [np.full_like(k, 1e30, shape=(b, kv, window, p))] * 2,
        jax.jit(partial(ops.window_attention, scale=SCALE)),
    )
    lengths = np.zeros(b, int)
    for size, taken in ((4, [4, 2]), (1, [1, 1]), (3, [1, 3])):
        slots = lengths[:, None] + np.arange(size)
        real = np.arange(size) < np.array(taken)[:, None]
        piece = [np.stack([x[row][slots[row] % t] for row in range(b)]) for x in (q, k, v)]
        out, *ring = take(*piece, *ring, slots, real)
        for row in range(b):
            assert_close(
                np.asarray(out)[row, : taken[row]], expected[row, lengths[row] : lengths[row] + taken[row]], rounding
            )
        lengths += taken
    for got, x in zip(ring, (k, v), strict=True):
        for i in range(t - window, t):
            np.testing.assert_array_equal(np.asarray(got)[:, :, i % window], x[:, i])


@pytest.mark.parametrize(
    ("platform", "queries", "u"), [("cpu", 3, 135), ("cpu", 1, 71), ("gpu", 3, 135), ("gpu", 1, 135), ("gpu", 1, 50)]
)
def test_a_cache_of_many_blocks(monkeypatch, rounding, platform, queries, u):
    """The last block is not whole, or there is but one; row 1 ends in the first, next to slots that hold anything."""
    monkeypatch.setattr(attention, "platform", lambda: platform)
    monkeypatch.setattr(attention, "BLOCK", 64)
    monkeypatch.setattr(attention, "FITTING", 2**10)
    monkeypatch.setattr(attention, "FILLING", 2**10)
    attend_to_cache = jax.jit(partial(ops.cached_attention, scale=SCALE))
    q, k, v = (np.asarray(x) for x in arguments(length=u))
    past = np.arange(u)[None] < np.array([[u - 3], [5]])
    keys, values = (np.where(past[..., None, None], x, x.dtype.type(1e30)).swapaxes(1, 2) for x in (k, v))
    slots = np.array([[u - 3], [5]]) + np.arange(queries)
    new = [np.stack([x[row, slots[row]] for row in range(b)]) for x in (q, k, v)]
    out, *_ = attend_to_cache(*new, keys, values, slots, np.ones((b, queries), bool))
    for row in range(b):
        for i, slot in enumerate(slots[row]):
            expected = attend(q[row, slot], k[row, : slot + 1], v[row, : slot + 1])
            assert_close(np.asarray(out)[row, i], expected, rounding)


def test_a_cache_may_hold_the_bits_of_bfloat16():
    q, k, v = (x.astype(jnp.bfloat16) for x in arguments(length=70))
    keys, values = (x.swapaxes(1, 2) for x in (k, v))
    bits = [jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (keys, values)]
    new = v[:, :3], k[:, :3]  # other numbers than are there
    slots, real = jnp.array([[40, 41, 42], [66, 67, 68]]), jnp.ones((b, 3), bool)
    expected = cached_attention(q[:, :3], *new, keys, values, slots, real, SCALE)
    out, *held = cached_attention(q[:, :3], *new, *bits, slots, real, SCALE)
    assert [x.dtype for x in held] == [jnp.uint16] * 2
    held = [jax.lax.bitcast_convert_type(x, jnp.bfloat16) for x in held]
    for got, wanted in zip((out, *held), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(wanted, np.float32))


@pytest.mark.parametrize(("dtype", "queries"), [("float32", 1), ("bfloat16", 1), ("bfloat16", 16)])
def test_attending_to_a_cache_takes_no_memory_that_grows_with_it(dtype, queries):
    """Nor, which follows, time to convert it."""

    def memory(capacity):
        shapes = [(1, queries, 4, 32)] * 3 + [(1, 4, capacity, 32)] * 2
        dtypes = [jnp.dtype(dtype)] * 3 + [attention.stored_dtype(dtype)] * 2
        arrays = [jax.ShapeDtypeStruct(*each) for each in zip(shapes, dtypes, strict=True)]
        slots, real = (jax.ShapeDtypeStruct((1, queries), kind) for kind in (jnp.int32, bool))
        run = jax.jit(partial(ops.cached_attention, scale=1.0), donate_argnums=(3, 4))
        return run.lower(*arrays, slots, real).compile().memory_analysis().temp_size_in_bytes

    assert memory(16384) == memory(4096)


def test_slots_past_the_end_are_not_written():
    q, k, v = arguments(length=3)
    empty = jnp.zeros((b, kv, 2, p))
    slots = jnp.array([[0, 1, 2], [1, 2, 3]])
    _, keys, _ = cached_attention(q, k, v, empty, empty, slots, jnp.ones((b, 3), bool), SCALE)
    keys, k = np.asarray(keys), np.asarray(k)
    np.testing.assert_array_equal(keys[0].swapaxes(0, 1), k[0, :2])
    np.testing.assert_array_equal(keys[1].swapaxes(0, 1), [np.zeros((kv, p)), k[1, 0]])


def test_bfloat16_has_its_softmax_in_float32():
    """Scores 256 and 257 are one bfloat16 number; their softmax is not 1/2."""
    q = jnp.array([1.0, 16.0], jnp.bfloat16)[None, None, None]
    k = jnp.array([[0.0, 16.0], [1.0, 16.0]], jnp.bfloat16)[None, :, None]
    v = jnp.array([[0.0, 0.0], [1.0, 1.0]], jnp.bfloat16)[None, :, None]
    out = causal_attention(jnp.repeat(q, 2, axis=1), k, v, 1.0)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out[0, 1]), 1 / (1 + np.exp(-1)), rtol=2**-8)


def rows_of(length):
    """Documents that end where blocks of 4 do, and elsewhere, with padding before, between and after."""
    time = np.arange(length)
    return np.stack([time // 8 + 1, np.where(time % 13 < 3, 0, time // 13 + 1), np.zeros(length, int)])


def at_once(q, k, v, segment_ids, scale=SCALE, window=None):
    """All scores at once, written another way than the op: k and v repeated, a mask for all pairs."""
    length, repeats = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    index = ops.segments.document_index(segment_ids)
    visible = jnp.tril(jnp.ones((length, length), bool)) & (index[:, :, None] == index[:, None])
    visible &= (segment_ids != 0)[:, :, None] == (segment_ids != 0)[:, None]
    visible &= jnp.arange(length)[:, None] - jnp.arange(length) < (window or length)
    scores = jnp.where(visible[:, None], jnp.einsum("bthp,buhp->bhtu", q, k) * scale, -jnp.inf)
    return jnp.einsum("bhtu,buhp->bthp", jax.nn.softmax(scores), v)


def with_gradients(function, weights, *arguments):
    out, pull = jax.vjp(function, *arguments)
    return out, *pull(weights)


@pytest.mark.parametrize(
    ("length", "packed", "window"),
    [
        *((length, packed, None) for length, packed in ((4, True), (11, True), (30, True), (30, False))),
        *((length, True, window) for length, window in ((11, 4), (30, 1), (30, 6))),
    ],
)
def test_blocks_equal_all_at_once(monkeypatch, rounding, length, packed, window):
    """Values and gradients of two, and of four blocks that are written out, and of three spans with a rest."""
    monkeypatch.setattr(attention_xla, "BLOCK", 4)
    monkeypatch.setattr(attention_xla, "SMALLEST", 2)
    monkeypatch.setattr(attention_xla, "SPANS", 3)
    ids = jnp.asarray(rows_of(length)) if packed else None

    def blocks(q, k, v, implementation="xla"):
        return ops.causal_attention(q, k, v, SCALE, ids, implementation=implementation, window=window)

    def expected(q, k, v):
        return at_once(q, k, v, ids if packed else jnp.ones((3, length), int), window=window)

    inputs = normal(3, length, 4, p, seed=3), *arguments(3, length, 4, 2)
    got, right = (jax.jit(lambda *a, f=f: with_gradients(f, *a))(*inputs) for f in (blocks, expected))
    assert_close(got, right, 4 * rounding)
    if window is not None:
        plain = jax.jit(partial(blocks, implementation="plain"))
        assert_close(plain(*inputs[1:]), right[0], 4 * rounding)


@pytest.mark.parametrize(("length", "first"), [(16, 8), (33, 20)])
def test_no_block_reads_keys_out_of_its_window(monkeypatch, length, first):
    """Written out, and in a loop with a rest: what is read counts in a product, if with weight 0."""
    monkeypatch.setattr(attention_xla, "BLOCK", 4)
    monkeypatch.setattr(attention_xla, "SMALLEST", 2)
    q, k, v = arguments(length=length)
    k, v = (x.at[:, : first - 2].set(jnp.nan) for x in (k, v))
    attend = jax.jit(partial(ops.causal_attention, scale=SCALE, implementation="xla", window=3))
    assert_finite(attend(q, k, v)[:, first:])


def test_memory_is_linear_in_the_length(monkeypatch):
    """Twice the tokens take twice the memory, of a gradient too; scores of all pairs would take four times it."""
    monkeypatch.setattr(attention_xla, "SPANS", 2)

    def memory(length):
        q = jax.ShapeDtypeStruct((1, length, 4, 32), jnp.float32)
        total = jax.grad(lambda *qkv: ops.causal_attention(*qkv, 1.0, implementation="xla").sum(), argnums=(0, 1, 2))
        return jax.jit(total).lower(q, q, q).compile().memory_analysis().temp_size_in_bytes

    assert memory(8192) < 2.2 * memory(4096)


@pytest.mark.parametrize(("length", "kv_heads", "window"), [(20, 4, None), (600, 2, None), (600, 2, 70)])
def test_splash_equals_all_at_once(length, kv_heads, window):
    q, k, v = arguments(3, length, 4, kv_heads)
    weights, ids = normal(3, length, 4, p, seed=3), jnp.asarray(rows_of(length))
    tags = 2 * ops.segments.document_index(ids) + (ids != 0)

    def splash(q, k, v):
        return attention_splash.attention_splash(q, k, v, tags, SCALE, window, interpret=True)

    got = jax.jit(lambda *a: with_gradients(splash, *a))(weights, q, k, v)
    expected = jax.jit(lambda *a: with_gradients(lambda *a: at_once(*a, ids, window=window), *a))(weights, q, k, v)
    assert_close(got, expected, 4e-6)


@pytest.mark.parametrize("p", [128, 160, 224])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_splash_compiles_for_a_tpu(tpu_sharding, p, dtype):
    """Values and gradients at the head dims of the released models, by the real compiler, without t x t scores."""
    q = jax.ShapeDtypeStruct((1, 2048, 32, p), dtype, sharding=tpu_sharding)
    ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32, sharding=tpu_sharding)

    def attend(ids, weights, *qkv):
        return with_gradients(lambda *qkv: ops.causal_attention(*qkv, 0.1, ids, implementation="splash"), weights, *qkv)

    program = jax.jit(attend).lower(ids, q, q, q, q).compile()
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 3
    assert program.memory_analysis().temp_size_in_bytes < 2048**2 * 32 * 4


@pytest.mark.parametrize(
    ("implementation", "shape", "dtype", "ids", "message"),
    [
        ("pallas", (1, 8, 2, 16), jnp.float32, None, "implementation='pallas': expected one of xla, splash, cudnn"),
        ("splash", (1, 8, 2, 16), jnp.float16, None, "q has dtype float16, expected bfloat16 or float32"),
        ("cudnn", (1, 8, 2, 16), jnp.float32, None, "q has dtype float32, cuDNN takes float16 and bfloat16"),
        ("cudnn", (1, 8, 2, 20), jnp.bfloat16, None, "the head dim is 20, cuDNN takes multiples of 8 up to 256"),
        ("cudnn", (1, 8, 2, 264), jnp.bfloat16, None, "the head dim is 264, cuDNN"),
    ],
)
def test_what_an_implementation_does_not_do_is_refused(unchecked, implementation, shape, dtype, ids, message):
    x = jnp.zeros(shape, dtype)
    with pytest.raises(ValueError, match=message):
        ops.causal_attention(x, x, x, 1.0, ids, implementation=implementation)


def test_windows_that_are_refused():
    x = jnp.zeros((1, 8, 2, 16), jnp.bfloat16)
    with pytest.raises(ValueError, match="window=0: expected at least 1"):
        ops.causal_attention(x, x, x, 1.0, window=0)
    with pytest.raises(ValueError, match="window=3 with implementation='cudnn': expected one of xla, splash, plain"):
        ops.causal_attention(x, x, x, 1.0, implementation="cudnn", window=3)
    with for_a_gpu("NVIDIA H200"):
        assert not attention.fits_cudnn(x, None, 3)


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        ("splash", "implementation='splash': expected one of xla, cudnn"),
        ("cudnn", "q has dtype float32, cuDNN takes"),
    ],
)
def test_what_attends_to_no_cache_is_refused(unchecked, implementation, message):
    x, cache, one = jnp.zeros((1, 3, 2, 16)), jnp.zeros((1, 2, 8, 16)), jnp.arange(3)[None]
    with pytest.raises(ValueError, match=message):
        ops.cached_attention(x, x, x, cache, cache, one, one >= 0, 1.0, implementation=implementation)


@pytest.mark.parametrize(
    ("backend", "devices", "expected"),
    [("cpu", 1, "xla"), ("tpu", 1, "splash"), ("tpu", 4, "xla")],
)
def test_default_implementation(monkeypatch, backend, devices, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert default_implementation(jnp.zeros((1, 8, 2, 16)), None) == expected


@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "documents", "expected"),
    [
        ("NVIDIA H200", (1, 2**15, 2, 224), jnp.bfloat16, False, "cudnn"),
        ("NVIDIA H200", (1, 2**14, 2, 224), jnp.bfloat16, True, "cudnn"),
        ("NVIDIA H200", (1, 2**15, 2, 224), jnp.bfloat16, True, "xla"),  # its mask would take 2 GB
        ("NVIDIA H200", (1, 63, 2, 224), jnp.bfloat16, False, "cudnn"),
        ("NVIDIA H200", (1, 63, 2, 224), jnp.bfloat16, True, "xla"),  # cuDNN would refuse the gradient
        ("NVIDIA H200", (1, 64, 2, 20), jnp.bfloat16, False, "xla"),
        ("NVIDIA H200", (1, 64, 2, 224), jnp.float32, False, "xla"),
        ("NVIDIA A100-SXM4-80GB", (1, 64, 2, 128), jnp.bfloat16, False, "xla"),
    ],
)
def test_default_implementation_by_gpu(monkeypatch, kind, shape, dtype, documents, expected):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    q, ids = jnp.zeros(shape, dtype), jnp.zeros(shape[:2], jnp.int32)
    with for_a_gpu(kind):
        assert default_implementation(q, ids if documents else None) == expected


@pytest.fixture
def cudnn(monkeypatch):
    """There is no cuDNN here: its calls, computed by JAX in plain XLA, and how many there were."""
    in_xla, calls = jax.nn.dot_product_attention, []

    def instead(*arrays, implementation, **options):
        calls.append(implementation)
        return in_xla(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    return calls


def test_documents_reach_cudnn_as_a_mask(cudnn):
    q, k, v = (normal(3, 70, heads, 16, dtype=jnp.bfloat16) for heads in (6, 2, 2))
    ids = np.broadcast_to(np.arange(70) // 20, (3, 70)).copy()
    ids[1, 30:35] = 0
    ids = jnp.asarray(ids)
    got, expected = (ops.causal_attention(q, k, v, 0.3, ids, implementation=name) for name in ("cudnn", "xla"))
    assert cudnn == ["cudnn"]
    assert_close(got.astype(jnp.float32), expected.astype(jnp.float32), 2**-7)


def test_a_cache_reaches_cudnn_with_a_mask(monkeypatch, cudnn):
    """By default for more than one new token on a Hopper GPU; next to slots that hold anything."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    q, k, v = (normal(3, 9, heads, 16, dtype=jnp.bfloat16) for heads in (6, 2, 2))
    keys = jnp.full((3, 2, 40, 16), 1e30, jnp.bfloat16).at[:, :, :21].set(normal(3, 2, 21, 16, dtype=jnp.bfloat16))
    slots, real = jnp.array([[21], [4], [0]]) + jnp.arange(9), jnp.arange(9) < jnp.array([[9], [5], [1]])
    arguments = q, k, v, keys, keys / 2, slots, real, 0.3
    expected = ops.cached_attention(*arguments)
    with for_a_gpu("NVIDIA H200"):
        got = ops.cached_attention(*arguments)
        ops.cached_attention(q[:, :1], k[:, :1], v[:, :1], *arguments[3:5], slots[:, :1], real[:, :1], 0.3)
    assert cudnn == ["cudnn"]
    for x, wanted in zip(got, expected, strict=True):
        x, wanted = (np.asarray(y, np.float32) for y in (x, wanted))
        if x.shape == q.shape:
            x, wanted = x[real], wanted[real]
        assert_close(x, wanted, 2**-7)

"""What the tests share: comparisons, random models, and the batches they run on."""

import dataclasses
import sys
from contextlib import contextmanager
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from zamba2_jax import init_model, preset

COMMAND = [
    sys.executable,
    "-c",
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from zamba2_jax.cli.main import main; sys.exit(main())",
]
"""`zamba2` as a process, which Ctrl-C interrupts even if the tests run in the background."""

TINY = preset("zamba2-tiny")

# Three layers, one of them plain, and one block called twice: what compiles fast and has all there is to go wrong.
SMALL = dataclasses.replace(TINY, num_layers=3, hybrid_layer_ids=(0, 2), num_shared_blocks=1, vocab_size=32)


def assert_close(actual, expected, rtol, message=""):
    """Every array of `actual` differs from that of `expected` by at most rtol times the largest value in the latter."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected), message
    for (path, a), e in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        bound = rtol * np.max(np.abs(e), initial=0)
        assert np.isfinite(bound), f"{message}{jax.tree_util.keystr(path)} is expected to be {e}"
        np.testing.assert_allclose(a, e, rtol=0, atol=bound, err_msg=f"{message}{jax.tree_util.keystr(path)}")


def assert_finite(tree):
    for path, array in jax.tree.leaves_with_path(tree):
        assert np.isfinite(np.asarray(array, np.float64)).all(), jax.tree_util.keystr(path)


def normal(*shape, seed=0, dtype=None):
    """Standard normal values, in float64 where it is enabled."""
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def random_tokens(config, *shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, shape), jnp.int32)


@cache
def abstract_model(config, dtype=jnp.float32):
    return jax.eval_shape(lambda: init_model(config, rngs=nnx.Rngs(0), dtype=dtype))


def random_model(config=TINY, dtype=jnp.float32, seed=0):
    """A model with no parameter at a neutral value, and signals of about 1 everywhere, unlike at initialisation."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, noise = jax.tree_util.keystr(path), rng.standard_normal(leaf.shape)
        if leaf.ndim > 1:
            noise /= 1 if "embed" in name else np.sqrt(leaf.shape[0 if "conv" in name else 1])
            noise /= 3 if "mamba.out" in name else 1  # else the layers amplify rounding, in one token in a hundred
        elif "norm" in name:
            noise = 1 + noise / 4
        elif "dt_bias" in name:
            noise -= 2  # dt of about 0.1, so that the state remembers about ten tokens
        return jnp.asarray(noise, leaf.dtype)

    return jax.tree.map_with_path(draw, abstract_model(config, dtype))


def as_dtype(tree, dtype):
    """The tree with all its floating-point arrays in `dtype`."""
    return jax.tree.map(
        lambda a: jnp.asarray(a, dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, jax.device_get(tree)
    )


@partial(jax.jit, static_argnames=("backend", "tap"))
def forward(model, tokens=None, segment_ids=None, positions=None, **kwargs):
    return model(tokens, segment_ids, positions, **kwargs)


def pad_rows(rows, length, lead=None):
    """Rows of tokens as one array [b, length], row i after lead[i] zeros, and its segment ids: 1, and 0 for padding."""
    tokens, segment_ids = np.zeros((2, len(rows), length), np.int32)
    for i, row in enumerate(rows):
        start = 0 if lead is None else lead[i]
        tokens[i, start : start + len(row)] = row
        segment_ids[i, start : start + len(row)] = 1
    return jnp.asarray(tokens), jnp.asarray(segment_ids)


def for_a_gpu(kind="NVIDIA H200"):
    """A context in which programs are lowered for a GPU that is not there."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


@contextmanager
def compiled_anew(directory):
    """In it no program is one of an earlier run, for tests of what the compiler makes of it.

    Args:
        directory: new; where programs are kept meanwhile.
    """
    before = jax.config.jax_compilation_cache_dir
    try:
        _keep_programs_in(directory)
        yield
    finally:
        _keep_programs_in(before)


def _keep_programs_in(directory):
    jax.config.update("jax_compilation_cache_dir", str(directory))
    compilation_cache.reset_cache()  # it asks for the directory once
    jax.clear_caches()

"""The cases of accelerators: through the real TPU compiler, and what is checked at a model's sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zamba2_jax import preset
from zamba2_jax.check.compare import on_host, with_gradients
from zamba2_jax.check.ops import (
    AttentionSizes,
    ScanSizes,
    attention_case,
    model_cases,
    scan_case,
    selective_scan_case,
    small_cases,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scan in float32", "scan in bfloat16", "attention in float32"])
def test_small_cases_compile_for_a_tpu(tpu_sharding, name):
    case = small_cases("tpu")[name]()
    assert len(case.implementations) == 2
    for implementation in case.implementations.values():
        assert not implementation.interpreted
        run = with_gradients(implementation.function)
        weights = jax.eval_shape(implementation.function, case.inputs)
        arguments = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=tpu_sharding), (case.inputs, weights)
        )
        assert jax.jit(run).lower(*arguments).compile().memory_analysis()


@pytest.mark.parametrize("make", [scan_case, selective_scan_case])
def test_the_oracle_in_pieces_is_that_of_the_row(make):
    """Three pieces, with gradients, against plain XLA in float64: nothing is left but the order of sums."""
    sizes = ScanSizes(2, 192, 2, 3, 2, 5)
    options = {} if make is selective_scan_case else {"platform": "cpu"}
    case = make(sizes, "float32", real=True, **options)
    weights = jax.tree.map(jnp.ones_like, jax.eval_shape(case.oracle, case.inputs))
    pieces = on_host(with_gradients(case.oracle), case.inputs, weights)
    plain = on_host(with_gradients(case.implementations["xla"].function), case.inputs, weights)
    for name, array in pieces.items():
        scale = np.abs(array).max()
        np.testing.assert_allclose(plain[name], array, rtol=0, atol=1e-12 * scale, err_msg=name)


def test_a_model_is_checked_in_what_it_calls():
    kinds = {
        "zamba2-7b": {"scan", "step", "attention", "cached attention"},
        "mamba2-2.7b": {"scan", "step"},
        "zamba-7b-v1": {"selective scan", "attention", "cached attention"},
        "mistral-7b-v0.1": {"attention", "cached attention"},
    }
    for name, expected in kinds.items():
        assert set(model_cases(preset(name), "tpu")) == expected
    assert model_cases(preset("zamba2-7b"), "tpu")["scan"].args == (ScanSizes(1, 2048, 112, 64, 2, 64),)
    window = model_cases(preset("mistral-7b-v0.1"), "gpu")["attention"].args
    assert window == (AttentionSizes(1, 2048, 32, 8, 128, 4096),)


@pytest.mark.parametrize(
    ("platform", "dtype", "real", "expected"),
    [
        ("cpu", "float32", False, {"xla", "splash"}),
        ("cpu", "bfloat16", True, {"xla"}),
        ("gpu", "bfloat16", False, {"xla", "cudnn"}),
        ("gpu", "float32", False, {"xla"}),
        ("tpu", "bfloat16", True, {"xla", "splash"}),
    ],
)
def test_the_kernels_of_the_platform_are_run(platform, dtype, real, expected):
    sizes = AttentionSizes(1, 12, 2, 1, 8)
    assert set(attention_case(sizes, dtype, platform, real=real).implementations) == expected

import math
import re

import numpy as np
import pytest

from zamba2_jax.parity.check import Limits, report
from zamba2_jax.parity.evidence import Evidence, Row, compare, summarize

LIMITS = Limits(logits=1e-5, gradient=1e-4, apart=1e-2, ratio=1.2, exact=1e-7, loss=1e-6, greedy=True)


def row(group, relative=0.0, our_error=0.0, torch_error=0.0, size=1.0):
    return Row(group, group, relative, relative, our_error, torch_error, size)


def test_compare_is_the_norm_of_the_difference_over_any_number_of_slabs():
    rng = np.random.default_rng(0)
    ours, torch, oracle = rng.normal(size=(3, 3000, 2048))
    result = compare("x", "layer", ours, torch, oracle)
    assert result.max_error == np.abs(ours - torch).max()
    assert result.relative == pytest.approx(np.linalg.norm(ours - torch) / np.linalg.norm(torch), rel=1e-12)
    assert result.our_error == pytest.approx(np.linalg.norm(ours - oracle) / np.linalg.norm(oracle), rel=1e-12)
    assert result.torch_error == pytest.approx(np.linalg.norm(torch - oracle) / np.linalg.norm(oracle), rel=1e-12)


def test_compare_of_scalars_zeros_and_nan():
    one, zero = np.array(1.0), np.zeros(3)
    assert compare("loss", "loss", one * 1.5, one, one).relative == 0.5
    assert compare("x", "layer", zero, zero, zero).relative == 0.0
    assert compare("x", "layer", zero + 1, zero, zero).our_error == math.inf
    assert math.isnan(compare("x", "layer", zero * math.nan, zero, zero).relative)
    with pytest.raises(ValueError, match="shape"):
        compare("x", "layer", zero, zero, np.zeros(4))


def test_summary_is_the_error_of_the_arrays_as_one():
    rng = np.random.default_rng(1)
    arrays = [rng.normal(size=(3, n)) for n in (5, 70)]
    whole = compare("all", "gradient", *np.concatenate(arrays, axis=1))
    parts = [compare(str(i), "gradient", *array) for i, array in enumerate(arrays)]
    summary = summarize([*parts, row("logits", 1.0)], "gradient")
    assert summary.our_error == pytest.approx(whole.our_error, rel=1e-12)
    assert summary.torch_error == pytest.approx(whole.torch_error, rel=1e-12)
    assert summary.max_error == whole.max_error


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (row("logits", relative=2e-5), "logits"),
        (row("gradient", relative=2e-4), "gradient"),
        (row("greedy", relative=0.1), "greedy"),
        (row("layer", our_error=1.3e-6, torch_error=1e-6), "1.2 times"),
        (row("layer", our_error=1.4, torch_error=1.4), "1.4e\\+00 against float64"),
        (row("layer", relative=1.4, torch_error=1.4), "1.4e\\+00 against PyTorch"),
        (row("layer", relative=math.nan, our_error=math.nan, torch_error=math.nan), "layer"),
    ],
)
def test_verdict_names_what_is_beyond_its_limit(bad, word):
    good = [
        row("logits", relative=1e-6),
        row("ssm_state", our_error=1e-8),
        row("loss", our_error=1e-6, torch_error=1e-6),
    ]
    assert report("case", good, LIMITS).failures == ()
    failures = report("case", [*good, bad], LIMITS).failures
    assert failures
    assert all(re.search(word, failure) for failure in failures)


def test_evidence_comes_back_from_disk(tmp_path):
    evidence = Evidence(tmp_path / "side")
    evidence.add({"a": np.arange(6.0).reshape(2, 3), "b": np.float32(2.5)})
    assert "a" in evidence
    assert "c" not in evidence
    np.testing.assert_array_equal(evidence["a"], np.arange(6.0).reshape(2, 3))
    assert evidence["b"] == 2.5

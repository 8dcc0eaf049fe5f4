import math

import jax
import numpy as np
import pytest

from zamba2_jax.train.schedule import Phase, boundaries, learning_rate


def phase(**kwargs):
    return Phase(**{"name": "p", "steps": 14, "shares": {"a": 1.0}, "warmup_steps": 4, **kwargs})


@pytest.mark.parametrize(
    ("decay", "at_start", "at_middle", "near_end"),
    [
        ("constant", 2.0, 2.0, 2.0),
        ("linear", 2.0, 1.1, 0.2 + 1.8 * 0.1),
        ("cosine", 2.0, 1.1, 0.2 + 1.8 * (1 + math.cos(0.9 * math.pi)) / 2),
        ("exponential", 2.0, 2 * math.sqrt(0.1), 2 * 0.1**0.9),
        ("1-sqrt", 2.0, 2 - 1.8 * math.sqrt(0.5), 2 - 1.8 * math.sqrt(0.9)),
    ],
)
def test_one_phase(decay, at_start, at_middle, near_end):
    rate = learning_rate([phase(decay=decay, final_fraction=0.1)], peak=2.0)
    by_step = {0: 0.0, 1: 0.5, 3: 1.5, 4: at_start, 9: at_middle, 13: near_end, 14: at_start * (decay == "constant")}
    if decay != "constant":
        by_step |= {14: 0.2, 1000: 0.2}
    for step, expected in by_step.items():
        np.testing.assert_allclose(rate(step), expected, rtol=1e-6, err_msg=f"step {step}")


def test_annealing_warms_up_again_to_a_fraction_of_the_first_peak():
    phases = [
        phase(decay="cosine", final_fraction=0.1),
        phase(name="annealing", steps=10, warmup_steps=5, peak_fraction=0.75, decay="linear"),
    ]
    assert boundaries(phases) == [14, 24]
    rate = learning_rate(phases, peak=2.0)
    expected = [0.0, 0.3, 0.6, 0.9, 1.2, 1.5, 1.2, 0.9, 0.6, 0.3, 0.0]
    np.testing.assert_allclose([rate(14 + step) for step in range(11)], expected, atol=1e-6)
    np.testing.assert_allclose(rate(4), 2.0)


def test_three_phases_and_no_warm_up():
    phases = [
        phase(name=str(steps), warmup_steps=0, steps=steps, decay="constant", peak_fraction=fraction)
        for steps, fraction in ((2, 1), (3, 0.5), (1, 3))
    ]
    rate = learning_rate(phases, peak=1.0)
    np.testing.assert_allclose([rate(step) for step in range(7)], [1, 1, 0.5, 0.5, 0.5, 3, 3])


def test_is_pure_and_traceable():
    rate = learning_rate([phase(), phase(name="q", peak_fraction=0.75)], peak=2.0)
    steps = np.arange(30)
    np.testing.assert_allclose(jax.jit(jax.vmap(rate))(steps), [rate(step) for step in steps], atol=1e-6)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"steps": 0, "warmup_steps": 0}, "steps=0: expected an integer >= 1"),
        ({"steps": 14.5}, "steps=14.5: expected an integer >= 1"),
        ({"warmup_steps": 14}, r"warmup_steps=14: expected an integer in \[0, steps=14\)"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"warmup_steps": 1.5}, "warmup_steps=1.5"),
        ({"peak_fraction": 0.0}, "peak_fraction=0.0: expected a finite number > 0"),
        ({"peak_fraction": math.nan}, "peak_fraction=nan"),
        ({"decay": "square"}, "decay='square': expected one of constant, linear, cosine, exponential, 1-sqrt"),
        ({"final_fraction": 1.5}, r"final_fraction=1.5: expected a number in \[0, 1\]"),
        ({"decay": "exponential"}, "final_fraction=0.0: expected more than 0 with exponential decay"),
        ({"shares": {}}, "shares={}"),
        ({"shares": {"a": 1.5, "b": -0.5}}, "none negative"),
        ({"shares": {"a": 0.5, "b": 0.4}}, "a sum of 1, not 0.9"),
    ],
)
def test_bad_phase(bad, message):
    with pytest.raises(ValueError, match=f"phase 'p': .*{message}"):
        phase(**bad)


@pytest.mark.parametrize(
    ("phases", "peak", "message"),
    [
        ([], 1.0, "phases is empty"),
        ([phase()], 0.0, "rate=0.0: expected a finite number > 0"),
        ([phase(), phase()], 1.0, r"named \['p', 'p'\]: expected distinct names"),
    ],
)
def test_bad_run(phases, peak, message):
    with pytest.raises(ValueError, match=message):
        learning_rate(phases, peak)

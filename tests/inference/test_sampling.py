import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zamba2_jax import Sampling
from zamba2_jax.inference.sampling import SamplingRows, log_probability, penalize, sample, scale, truncate

V = 24
sample_jit = jax.jit(sample)


def random_logits(rows, *, ties=False, seed=0):
    logits = 2 * np.random.default_rng(seed).standard_normal((rows, V))
    return np.float32(np.round(logits) if ties else logits)


def choose(logits, samplings, seen=None, positions=None):
    b = len(logits)
    seen = np.zeros((b, V), bool) if seen is None else seen
    positions = np.zeros(b, np.int32) if positions is None else positions
    return np.asarray(sample_jit(logits, SamplingRows.stack(samplings), seen, positions))


def kept_by_oracle(logits, how):
    """What a cut leaves of one row, by its definition: in float64, one token after the other."""
    order = sorted(range(V), key=lambda i: -logits[i])
    wide = np.float64(logits)
    kept = set(range(V))
    if how.top_k is not None:
        kept = {i for i in kept if wide[i] >= wide[order[min(how.top_k, V) - 1]]}
    if how.top_p < 1:
        share = {i: np.exp(wide[i]) / sum(np.exp(wide[j]) for j in kept) for i in kept}
        taken = 0.0
        for last in (i for i in order if i in kept):
            taken += share[last]
            if taken >= how.top_p:
                break
        kept = {i for i in kept if wide[i] >= wide[last]}
    return {i for i in kept if np.exp(wide[i]) >= how.min_p * np.exp(wide.max()) * (1 - 1e-6)}


CUTS = [
    Sampling(),
    Sampling(top_k=1),
    Sampling(top_k=5),
    Sampling(top_k=V),
    Sampling(top_k=10**12),
    Sampling(top_p=0.01),
    Sampling(top_p=0.5),
    Sampling(top_p=0.93),
    Sampling(min_p=0.05),
    Sampling(min_p=1.0),
    Sampling(top_k=7, top_p=0.8),
    Sampling(top_k=9, top_p=0.95, min_p=0.1),
]


@pytest.mark.parametrize("ties", [False, True])
def test_cuts_keep_what_their_definition_keeps(ties):
    """Every cut on 20 rows, all in one batch; with ties, equal logits stay or go together."""
    hows = CUTS * 20
    logits, rows = random_logits(len(hows), ties=ties), SamplingRows.stack(hows)
    cut = np.asarray(truncate(logits, rows.top_k, rows.top_p, rows.min_p))
    for row, before, how in zip(cut, logits, hows, strict=True):
        kept = set(np.flatnonzero(row > -np.inf))
        assert kept == kept_by_oracle(before, how), how
        np.testing.assert_array_equal(row[list(kept)], before[list(kept)])
        assert before.argmax() in kept


def test_equal_logits_are_cut_together():
    logits = jnp.array([[1.0, 3.0, 3.0, 3.0, 0.0]] * 3)
    cut = truncate(logits, jnp.array([1, 5, 5]), jnp.array([1.0, 0.2, 1.0]), jnp.array([0.0, 0.0, 1.0]))
    assert (cut > -jnp.inf).tolist() == [[False, True, True, True, False]] * 3


def test_repetition_penalty_makes_seen_tokens_less_likely():
    logits, seen = random_logits(3), np.random.default_rng(1).random((3, V)) < 0.5
    penalty = np.float32([1.0, 1.5, 0.5])
    expected = logits.copy()
    for row, token in zip(*np.nonzero(seen), strict=True):
        expected[row, token] *= penalty[row] if logits[row, token] < 0 else 1 / penalty[row]
    np.testing.assert_allclose(penalize(logits, seen, penalty), expected, rtol=1e-6)
    greedy = choose(logits, [Sampling(repetition_penalty=float(p)) for p in penalty], seen)
    assert greedy.tolist() == expected.argmax(axis=-1).tolist()


def chi_square(counts, p):
    """Pearson's statistic, in standard deviations above its mean, over cells that expect 10 or more."""
    expected = p * counts.sum()
    assert counts[p == 0].sum() == 0
    cells = expected >= 10
    statistic = np.sum((counts[cells] - expected[cells]) ** 2 / expected[cells])
    freedom = cells.sum() - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


DRAWS = 20_000


@pytest.mark.parametrize("along", ["seeds", "positions"])
def test_draws_follow_the_distribution(along):
    """Four settings. With 5 degrees of freedom or more a right sampler is beyond 6 deviations once in 4000 seeds."""
    hows = [
        Sampling(temperature=1.0),
        Sampling(temperature=2.5),
        Sampling(temperature=1.5, top_k=6, top_p=0.9),
        Sampling(temperature=0.8, min_p=0.05),
    ]
    (logits,), i = random_logits(1), np.arange(DRAWS, dtype=np.uint32)
    for how in hows:
        rows = jax.tree.map(lambda value: np.repeat(value, DRAWS, axis=0), SamplingRows.stack([how]))
        positions = np.zeros(DRAWS, np.int32)
        if along == "seeds":
            rows = rows.replace(seed=np.stack([np.zeros_like(i), i], axis=-1))
        else:
            positions = i.astype(np.int32)
        tokens = sample_jit(np.tile(logits, (DRAWS, 1)), rows, np.zeros((DRAWS, V), bool), positions)
        counts = np.bincount(tokens, minlength=V)

        def expected(temperature, how=how):
            kept = kept_by_oracle(logits / how.temperature, how)
            p = np.where(np.isin(np.arange(V), list(kept)), np.exp(np.float64(logits) / temperature), 0)
            return p / p.sum()

        assert chi_square(counts, expected(how.temperature)) < 6, how
        for wrong in (1.2, 1 / 1.2):
            assert chi_square(counts, expected(how.temperature * wrong)) > 12, how


@pytest.mark.parametrize("along", ["seeds", "positions"])
def test_neighbouring_draws_are_independent(along):
    """Pairs of draws with seeds, or positions, i and i + 1: 16 equally likely outcomes."""
    i = np.arange(DRAWS, dtype=np.uint32)
    rows = jax.tree.map(lambda value: np.repeat(value, DRAWS, axis=0), SamplingRows.stack([Sampling(temperature=1.0)]))
    if along == "seeds":
        rows = rows.replace(seed=np.stack([np.zeros_like(i), i], axis=-1))
    positions = np.zeros(DRAWS, np.int32) if along == "seeds" else i.astype(np.int32)
    logits = np.full((DRAWS, V), -np.inf, np.float32)
    logits[:, :4] = 0
    tokens = np.asarray(sample_jit(logits, rows, np.zeros((DRAWS, V), bool), positions)).reshape(-1, 2)
    assert chi_square(np.bincount(4 * tokens[:, 0] + tokens[:, 1], minlength=16), np.full(16, 1 / 16)) < 6


def test_a_row_is_chosen_as_if_it_were_alone():
    """Every setting in one batch, in another order, and one by one."""
    hows = [
        Sampling(temperature=t, top_k=k, top_p=p, repetition_penalty=r, seed=seed)
        for seed, (t, k, p, r) in enumerate(
            [(0, None, 1, 1), (1, None, 1, 1.2), (2, 5, 1, 1), (1, 9, 0.8, 1), (3, None, 1, 1)]
        )
    ]
    n = len(hows)
    logits, seen, positions = random_logits(n), np.eye(n, V, dtype=bool), np.arange(n, dtype=np.int32) + 7
    together = choose(logits, hows, seen, positions)
    order = np.array([3, 0, 4, 2, 1])
    assert (
        choose(logits[order], [hows[i] for i in order], seen[order], positions[order]).tolist()
        == together[order].tolist()
    )
    for i in range(n):
        row = slice(i, i + 1)
        assert choose(logits[row], hows[row], seen[row], positions[row]) == together[row]


def test_other_parameters_compile_nothing():
    logits = random_logits(4)
    choose(logits, [Sampling()] * 4)
    compiled = sample_jit._cache_size()
    choose(logits, [Sampling(temperature=1.0), Sampling(top_k=3), Sampling(top_p=0.5), Sampling(min_p=0.1, seed=5)])
    assert sample_jit._cache_size() == compiled


def test_a_very_low_temperature_is_greedy():
    logits = random_logits(4)
    low = choose(logits, [Sampling(temperature=t, seed=3) for t in (1e-300, 1e-38, 1e-6, 1e-3)])
    assert low.tolist() == logits.argmax(axis=-1).tolist()
    assert choose(np.zeros((1, V), np.float32), [Sampling()]).tolist() == [0]  # the first of equals
    assert np.isfinite(np.asarray(scale(logits * 1e30, np.float32([1e-6] * 4)))[:, logits[0].argmax()][0])


def test_log_probability_is_that_of_the_softmax():
    logits, tokens = random_logits(5).astype(jnp.bfloat16), jnp.arange(5)
    p = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    np.testing.assert_allclose(np.exp(log_probability(logits, tokens)), p[np.arange(5), np.arange(5)], rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.5}, "temperature=-0.5: expected a finite number, 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan: expected a finite number, 0 or more"),
        ({"top_k": -2}, "top_k=-2: expected None, or an integer from -1"),
        ({"top_k": 2.0}, "top_k=2.0: expected None, or an integer from -1"),
        ({"top_p": 0.0}, "top_p=0.0: expected a number in (0, 1]"),
        ({"top_p": 1.01}, "top_p=1.01: expected a number in (0, 1]"),
        ({"min_p": -0.1}, "min_p=-0.1: expected a number in [0, 1]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: expected a finite number above 0"),
        ({"seed": -1}, "seed=-1: expected an integer in [0, 2^64)"),
        ({"seed": 2**64}, "seed=18446744073709551616: expected an integer in [0, 2^64)"),
    ],
)
def test_a_wrong_parameter_is_named(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampling(**values)


def test_zero_and_minus_one_as_top_k_keep_all():
    logits = random_logits(3)
    every = choose(logits, [Sampling(temperature=1.0, seed=i) for i in range(3)])
    for k in (0, -1):
        np.testing.assert_array_equal(
            choose(logits, [Sampling(temperature=1.0, top_k=k, seed=i) for i in range(3)]), every
        )


def test_seeds_have_64_bits():
    """The lower half counts as JAX's own seeds do, and the upper half is not lost."""
    logits = np.zeros((40, V), np.float32)
    low, high = (choose(logits, [Sampling(temperature=1.0, seed=at + i) for i in range(40)]) for at in (0, 2**32))
    for seed, drawn in enumerate(low):
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), 0)
        assert drawn == jax.random.categorical(key, logits[0])
    assert (low != high).sum() > 20
    assert Sampling(seed=2**64 - 1).for_prompt(1).seed == 0

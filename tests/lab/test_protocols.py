import dataclasses

import numpy as np
import pytest

from zamba2_jax import preset
from zamba2_jax.data.batches import held_out
from zamba2_jax.data.corpus import embedded_tokenizer
from zamba2_jax.data.synthetic import open_synthetic
from zamba2_jax.lab.protocols import lookup_run, passkey_run, text_run
from zamba2_jax.train.schedule import learning_rate

MODEL = preset("zamba2-nano", vocab_size=512)


@pytest.mark.parametrize("run", [lookup_run, passkey_run, text_run])
def test_runs_differ_by_their_rate_alone_and_warm_up_and_decay(run):
    one, other = (run(MODEL, steps=40, learning_rate=rate) for rate in (1e-2, 3e-3))
    assert dataclasses.replace(one, learning_rate=3e-3) == other
    (phase,) = one.phases
    assert set(phase.shares) == set(one.sources)
    rates = np.array([learning_rate(one.phases, one.learning_rate)(step) for step in range(41)])
    assert rates.argmax() == 4
    np.testing.assert_allclose(rates[[0, 4, 22, 40]], [0, 1e-2, 0.505e-2, 1e-4], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("run", "length"), [(lookup_run, 32), (lookup_run, 64), (passkey_run, 100)])
def test_all_that_is_held_out_is_asked_for_in_rows_of_the_length(run, length):
    config = run(MODEL, steps=40, learning_rate=1e-2, length=length)
    for name, task in config.evaluation.sources.items():
        source = open_synthetic(task, embedded_tokenizer(512), vocab_size=512)
        (batch,) = held_out(source, batch_size=64, length=length)
        answers = np.asarray(batch.weights).sum(axis=1)
        if name.startswith("recall-"):
            pairs = int(name.removeprefix("recall-"))
            assert set(answers) <= set(range(pairs, length, pairs))
        assert answers.min() >= 1


@pytest.mark.parametrize(("run", "length"), [(lookup_run, 31), (passkey_run, 60)])
def test_rows_that_are_too_short_are_refused(run, length):
    with pytest.raises(ValueError, match="length"):
        run(MODEL, steps=40, learning_rate=1e-2, length=length)

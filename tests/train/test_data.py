import itertools

import numpy as np
import pytest

from zamba2_jax.train.data import Mixture, Source, batches, pack


def make_documents(sizes, first=1):
    """Documents whose tokens are all different, so that each can be traced."""
    ends = np.cumsum([0, *sizes]) + first
    return [np.arange(begin, end, dtype=np.int32) for begin, end in itertools.pairwise(ends)]


def rows_of(batch):
    return list(zip(batch.tokens, batch.segment_ids, strict=True))


@pytest.mark.parametrize("sizes", [[1], [5], [3, 2], [7, 1, 1, 11, 4], [5, 5], [2, 0, 3], [1] * 9])
def test_pack_keeps_every_token_and_document(sizes):
    documents = make_documents(sizes)
    packed = pack(documents, 5)
    assert packed.tokens.shape == packed.segment_ids.shape == (-(-sum(sizes) // 5), 5)
    assert packed.tokens.dtype == packed.segment_ids.dtype == np.int32
    real = packed.segment_ids != 0
    np.testing.assert_array_equal(packed.tokens[real], np.concatenate(documents))
    assert (packed.tokens[~real] == 0).all()
    owner = {token: i for i, document in enumerate(documents) for token in document.tolist()}
    for tokens, segment_ids in rows_of(packed):
        owners = [owner[token] for token in tokens[segment_ids != 0].tolist()]
        numbers = {document: i + 1 for i, document in enumerate(dict.fromkeys(owners))}
        assert segment_ids[segment_ids != 0].tolist() == [numbers[document] for document in owners]


def test_pack_by_hand():
    packed = pack(make_documents([3, 4, 1]), 5)
    assert packed.tokens.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]]
    assert packed.segment_ids.tolist() == [[1, 1, 1, 2, 2], [1, 1, 2, 0, 0]]


@pytest.mark.parametrize(
    ("documents", "length", "message"),
    [([], 4, "no tokens"), ([np.array([], np.int32)], 4, "no tokens"), (make_documents([3]), 1, "length=1")],
)
def test_pack_refuses(documents, length, message):
    with pytest.raises(ValueError, match=message):
        pack(documents, length)


def test_batches_fill_up_with_empty_rows():
    cut = batches(pack(make_documents([13]), 5), 2)
    assert [batch.tokens.shape for batch in cut] == [(2, 5)] * 2
    assert cut[0].tokens.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert cut[1].segment_ids.tolist() == [[1, 1, 1, 0, 0], [0] * 5]


def test_source_gives_every_token_once_per_epoch_in_an_order_of_its_own():
    source = Source(make_documents([7, 3, 12, 5, 9, 8]), 4, seed=3)
    assert source.rows_per_epoch == 11
    epochs = [source.rows(np.arange(first, first + 11)) for first in (0, 11, 22)]
    for epoch in epochs:
        assert sorted(epoch.tokens[epoch.segment_ids != 0]) == list(range(1, 45))
    assert len({epoch.tokens.tobytes() for epoch in epochs}) == 3


def test_source_is_a_function_of_seed_and_index():
    documents = make_documents([7, 3, 12, 5, 9, 8])
    source, again, other = (Source(documents, 4, seed=seed) for seed in (3, 3, 4))
    across = source.rows(np.arange(8, 15))
    for place, index in enumerate(range(14, 7, -1)):
        row = again.rows(np.array([index]))
        np.testing.assert_array_equal(row.tokens[0], across.tokens[-1 - place])
        np.testing.assert_array_equal(row.segment_ids[0], across.segment_ids[-1 - place])
    assert not np.array_equal(other.rows(np.arange(8, 15)).tokens, across.tokens)


@pytest.mark.parametrize(
    "shares", [{"a": 0.7, "b": 0.3}, {"a": 1.0}, {"b": 0.45, "a": 0.45, "c": 0.1}, {"a": 0, "b": 1}]
)
def test_mixture_keeps_the_shares_at_every_step(shares):
    sources = {name: Source(make_documents([50], first=1000 * i), 5, seed=0) for i, name in enumerate("abc", start=1)}
    mixture = Mixture(sources, shares, batch_size=4, steps=30)
    owners = np.concatenate([mixture.batch(step).tokens[:, 0] // 1000 for step in range(30)])
    for i, name in enumerate("abc", start=1):
        for rows in range(4, 121, 4):
            assert abs((owners[:rows] == i).sum() - shares.get(name, 0) * rows) <= 1


def test_mixture_goes_through_each_source_in_order():
    sources = {name: Source(make_documents([60], first=1000 * i), 5, seed=i) for i, name in enumerate("ab", start=1)}
    mixture = Mixture(sources, {"a": 0.75, "b": 0.25}, batch_size=3, steps=8)
    rows = np.concatenate([mixture.batch(step).tokens for step in range(8)])
    for i, name in enumerate("ab", start=1):
        own = rows[rows[:, 0] // 1000 == i]
        np.testing.assert_array_equal(own, sources[name].rows(np.arange(len(own))).tokens)


def test_a_batch_does_not_depend_on_those_before():
    def mixture():
        sources = {name: Source(make_documents([9, 8, 13]), 5, seed=i) for i, name in enumerate("ab")}
        return Mixture(sources, {"a": 0.6, "b": 0.4}, batch_size=3, steps=12)

    in_order = mixture()
    expected = [in_order.batch(step) for step in range(12)]
    backward = mixture()
    for step in reversed(range(12)):
        np.testing.assert_array_equal(backward.batch(step).tokens, expected[step].tokens)


@pytest.mark.parametrize(
    ("shares", "batch_size", "steps", "message"),
    [
        ({"a": 0.5, "z": 0.5}, 1, 1, r"\['z'\].*\['a'\]"),
        ({"a": 1.0}, 0, 1, "batch_size=0"),
        ({"a": 1.0}, 1, 0, "steps=0"),
    ],
)
def test_mixture_refuses(shares, batch_size, steps, message):
    sources = {"a": Source(make_documents([9]), 5, seed=0)}
    with pytest.raises(ValueError, match=message):
        Mixture(sources, shares, batch_size, steps)

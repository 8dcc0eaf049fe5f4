import itertools
import json

import grain
import numpy as np
import pytest

from zamba2_jax.data import batches as data
from zamba2_jax.data.batches import PackedRows, Shares, batches, held_out
from zamba2_jax.data.documents import Documents, in_memory

SIZES = [7, 3, 12, 5, 9, 8]  # 44 tokens: 11 rows of 4


def make_documents(sizes, first=1):
    """Documents whose tokens are all different, so that each can be traced."""
    ends = np.cumsum([0, *sizes]) + first
    return [np.arange(begin, end, dtype=np.int32) for begin, end in itertools.pairwise(ends)]


def take(stream, count, state=None):
    iterator = iter(stream)
    if state is not None:
        iterator.set_state(state)
    taken = list(itertools.islice(iterator, count))
    iterator.close()
    return taken


def real_tokens(rows):
    return np.concatenate([row.tokens[row.segment_ids != 0] for row in rows])


def assert_equal(batch, other):
    np.testing.assert_array_equal(batch.tokens, other.tokens)
    np.testing.assert_array_equal(batch.segment_ids, other.segment_ids)
    np.testing.assert_array_equal(batch.weights, other.weights)


@pytest.mark.parametrize("sizes", [[1], [5], [3, 2], [7, 1, 1, 11, 4], [5, 5], [2, 0, 3], [1] * 9])
@pytest.mark.parametrize("window", [1, 2, 100])
@pytest.mark.parametrize("seed", [None, 3])
def test_rows_hold_every_document_whole_and_number_them(monkeypatch, sizes, window, seed):
    monkeypatch.setattr(data, "WINDOW", window)
    documents = make_documents(sizes)
    packed = PackedRows(in_memory(documents), 5, seed=seed)
    assert len(packed) == -(-sum(sizes) // 5)
    owner = {token: i for i, document in enumerate(documents) for token in document.tolist()}
    for epoch in (0, 2):
        rows = [packed[epoch * len(packed) + i] for i in range(len(packed))]
        tokens = real_tokens(rows).tolist()
        order = list(dict.fromkeys(owner[token] for token in tokens))
        np.testing.assert_array_equal(tokens, np.concatenate([documents[i] for i in order]))
        assert sorted(order) == [i for i, size in enumerate(sizes) if size]
        windows = [i // window for i in order]
        assert windows == sorted(windows)
        for row in rows:
            assert row.tokens.dtype == row.segment_ids.dtype == np.int32
            assert row.weights.dtype == np.float32
            np.testing.assert_array_equal(row.weights, row.segment_ids != 0)
            assert (row.tokens[row.segment_ids == 0] == 0).all()
            owners = [owner[token] for token in row.tokens[row.segment_ids != 0].tolist()]
            numbers = {document: i + 1 for i, document in enumerate(dict.fromkeys(owners))}
            assert row.segment_ids.tolist() == [numbers[i] for i in owners] + [0] * (5 - len(owners))


def test_rows_by_hand():
    packed = PackedRows(in_memory(make_documents([3, 4, 1])), 5, seed=None)
    assert [row.tokens.tolist() for row in packed] == [[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]]
    assert [row.segment_ids.tolist() for row in packed] == [[1, 1, 1, 2, 2], [1, 1, 2, 0, 0]]


def test_documents_and_rows_are_shuffled_anew_in_every_epoch():
    packed = PackedRows(in_memory(make_documents(SIZES)), 4, seed=3)
    orders = {real_tokens([packed[epoch * 11 + i] for i in range(11)]).tobytes() for epoch in range(4)}
    assert len(orders) == 4
    long = in_memory(make_documents([44]))  # all that can change is the order of the rows
    epochs = take(batches({"a": long}, {"a": 1.0}, batch_size=11, length=4, seed=0), 3)
    assert len({batch.tokens.tobytes() for batch in epochs}) == 3
    assert not any((np.diff(batch.tokens[:, 0]) > 0).all() for batch in epochs)


def test_an_epoch_holds_every_token_once():
    stream = batches({"a": in_memory(make_documents(SIZES))}, {"a": 1.0}, batch_size=11, length=4, seed=3)
    for epoch in take(stream, 4):
        assert sorted(real_tokens([epoch])) == list(range(1, 45))


def test_a_row_takes_the_lengths_of_its_window_alone(monkeypatch):
    monkeypatch.setattr(data, "WINDOW", 2)
    documents = in_memory(make_documents([5, 5] * 20))
    packed, expected = (PackedRows(documents, 10, seed=1) for _ in range(2))
    offsets = documents.offsets.copy()
    offsets[1::2] = 10**6  # of every window but its begin
    offsets[9] = documents.offsets[9]
    packed._documents = Documents(offsets, documents.read)
    assert_equal(packed[4], expected[4])


def test_seeds_and_names_fix_the_order():
    sources = dict.fromkeys("ab", in_memory(make_documents(SIZES)))

    def tokens(name, seed):
        (batch,) = take(batches(sources, {name: 1.0}, batch_size=11, length=4, seed=seed), 1)
        return batch.tokens.tobytes()

    assert tokens("a", 3) == tokens("a", 3)
    assert len({tokens("a", 3), tokens("a", 4), tokens("a", (3, 1)), tokens("b", 3)}) == 4


@pytest.mark.parametrize(
    "shares", [[0.7, 0.3], [1.0], [0.45, 0.45, 0.1], [0.1, 0.5005, 0.3995], [0.001, 0.999], [1 / 3] * 3]
)
def test_a_mixture_keeps_the_shares_at_every_row(shares):
    given = np.zeros(len(shares), int)
    for row, (source, index) in enumerate(map(Shares(shares).__getitem__, range(3000))):
        assert index == given[source]
        given[source] += 1
        assert np.abs(given - np.array(shares) * (row + 1)).max() <= 1


def test_a_mixture_goes_through_each_source_as_it_goes_alone():
    sources = {name: in_memory(make_documents([60], 1000 * i)) for i, name in enumerate("abc", start=1)}
    mixture = take(batches(sources, {"a": 0.75, "b": 0.25, "c": 0.0}, batch_size=4, length=5, seed=3), 30)
    rows = np.concatenate([batch.tokens for batch in mixture])
    for i, (name, share) in enumerate({"a": 0.75, "b": 0.25, "c": 0.0}.items(), start=1):
        own = rows[rows[:, 0] // 1000 == i]
        assert len(own) == share * len(rows)
        if share:
            alone = take(batches(sources, {name: 1.0}, batch_size=1, length=5, seed=3), len(own))
            np.testing.assert_array_equal(own, np.concatenate([batch.tokens for batch in alone]))


@pytest.fixture
def mixture():
    sources = {name: in_memory(make_documents(SIZES, 1000 * i)) for i, name in enumerate("ab", start=1)}

    def stream(**hosts):
        return batches(sources, {"a": 0.6, "b": 0.4}, batch_size=6, length=4, seed=1, **hosts)

    return stream


@pytest.mark.parametrize("hosts", [2, 3, 6])
def test_batches_of_the_hosts_make_up_the_batch_of_one(mixture, hosts):
    by_host = [take(mixture(host_index=host, host_count=hosts), 9) for host in range(hosts)]
    for step, expected in enumerate(take(mixture(), 9)):
        shares = [stream[step] for stream in by_host]
        assert {share.tokens.shape for share in shares} == {(6 // hosts, 4)}
        np.testing.assert_array_equal(np.concatenate([share.tokens for share in shares]), expected.tokens)
        np.testing.assert_array_equal(np.concatenate([share.segment_ids for share in shares]), expected.segment_ids)


def test_a_host_reads_its_share_alone(monkeypatch):
    monkeypatch.setattr(data, "READ", grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    whole = in_memory(make_documents([4] * 30))
    reads = []
    documents = Documents(whole.offsets, lambda start, stop: reads.append(stop - start) or whole.read(start, stop))
    stream = batches({"a": documents}, {"a": 1.0}, batch_size=6, length=4, seed=0, host_index=1, host_count=3)
    take(stream, 5, state={"next_index": 2})
    assert sum(reads) == 5 * 2 * 4


def test_a_stream_goes_on_from_its_state_on_any_number_of_hosts(mixture):
    expected = take(mixture(), 12)
    iterator = iter(mixture())
    for stop in range(7):
        state = json.loads(json.dumps(iterator.get_state()))
        for batch, other in zip(take(mixture(), 5, state), expected[stop:], strict=False):
            assert_equal(batch, other)
        halves = [take(mixture(host_index=host, host_count=2), 1, state)[0].tokens for host in range(2)]
        np.testing.assert_array_equal(np.concatenate(halves), expected[stop].tokens)
        assert_equal(next(iterator), expected[stop])
    iterator.set_state({"next_index": 3})
    assert_equal(next(iterator), expected[3])
    iterator.close()


def test_held_out_batches_fill_up_with_empty_rows():
    cut = held_out(in_memory(make_documents([13])), batch_size=2, length=5)
    assert [batch.tokens.shape for batch in cut] == [(2, 5)] * 2
    assert cut[0].tokens.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert cut[1].segment_ids.tolist() == [[1, 1, 1, 0, 0], [0] * 5]


@pytest.mark.parametrize(("id_", "expected"), [(-100, "ids that are not negative"), (50, r"ids in \[0, 50\)")])
def test_ids_outside_the_vocabulary_are_found_when_their_row_is_made(id_, expected):
    documents = make_documents([5, 9])
    documents[1][3] = id_
    source, options = in_memory(documents), {"length": 4, "batch_size": 1, "vocab_size": 50 if id_ > 0 else None}
    message = f"source 'web', row 2, position 0: token id {id_}: expected {expected}"
    with pytest.raises(ValueError, match=message):
        held_out(source, name="web", **options)
    stream = batches({"web": source}, {"web": 1.0}, seed=0, **options)
    with pytest.raises(ValueError, match=f"source 'web', row [0-3], position [0-3]: token id {id_}"):
        take(stream, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shares": {"a": 0.5, "z": 0.5}}, r"\['z'\].*\['a'\]"),
        ({"shares": {"a": 0.0}}, r"shares=\{'a': 0.0\}: expected at least one above 0"),
        ({"shares": {}}, r"shares=\{\}"),
        ({"shares": {"a": -1.0}}, "none negative"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 3, "host_count": 2}, "batch_size=3: expected a multiple of the 2 hosts"),
        ({"host_index": 1}, "host_index=1 of host_count=1"),
        ({"seed": (0, -1)}, r"seed=\(0, -1\)"),
        ({"length": 1}, "length=1"),
        ({"sources": {"a": in_memory([])}}, "no tokens"),
    ],
)
def test_batches_refuse(changes, message):
    arguments = {"sources": {"a": in_memory(make_documents([9]))}, "shares": {"a": 1.0}, "batch_size": 1, "length": 4}
    with pytest.raises(ValueError, match=message):
        batches(**{**arguments, "seed": 0, **changes})
    if "batch_size" in changes and "host_count" not in changes:
        with pytest.raises(ValueError, match=message):
            held_out(arguments["sources"]["a"], length=4, **changes)

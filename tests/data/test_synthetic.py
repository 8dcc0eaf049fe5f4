import itertools
import json

import numpy as np
import pytest
from tokenizers import AddedToken

from zamba2_jax.data.batches import batches, held_out
from zamba2_jax.data.documents import in_memory
from zamba2_jax.data.synthetic import (
    Copying,
    Induction,
    Passkey,
    Recall,
    SelectiveCopying,
    open_source,
    open_synthetic,
)
from zamba2_jax.text.vocabulary import BOS, EOS, train_tokenizer

LENGTH, VOCABULARY = 160, 330
TASKS = [
    Copying(symbols=5, lengths=(2, 7)),
    Induction(symbols=6, lengths=(2, 9)),
    Recall(keys=9, values=4, pairs=(2, 6)),
    Recall(keys=9, values=4, pairs=(3, 6), queries=4, gaps=(0, 3)),
    SelectiveCopying(symbols=4, noise=3, counts=(2, 3), lengths=(5, 9)),
    Passkey(digits=3, lengths=(90, 140)),
]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(["the pass key is grass remember sky sun " * 3], 280)
    tokenizer.backend.add_special_tokens([AddedToken("<tool>", special=True)])
    return tokenizer


@pytest.fixture(params=TASKS, ids=lambda task: task.kind)
def task(request):
    return request.param


def examples(rows):
    """Tokens and weights of every example, without BOS and EOS."""
    for row in rows:
        for number in range(1, row.segment_ids.max() + 1):
            own = row.segment_ids == number
            tokens, weights = row.tokens[own], row.weights[own]
            assert (tokens[0], tokens[-1]) == (BOS, EOS)
            assert weights[0] == weights[-1] == 0
            yield tokens[1:-1].tolist(), weights[1:-1].tolist()
        assert not row.tokens[row.segment_ids == 0].any()
        assert not row.weights[row.segment_ids == 0].any()


def answers(source, tokens, tokenizer):
    """Where the answers of an example are, and what they have to be by what stands before them."""
    task = source.task
    if isinstance(task, Copying):
        size = (len(tokens) - 1) // 2
        return {size + 1 + i: tokens[i] for i in range(size)}
    if isinstance(task, Induction):
        trigger = tokens[-2]
        assert tokens.count(trigger) == 2
        return {len(tokens) - 1: tokens[tokens.index(trigger) + 1]}
    if isinstance(task, Recall):
        keys = set(source.ids.symbols[: task.keys].tolist())
        even = tokens[: 2 * task.pairs[1] : 2]
        pairs = next(n for n in range(len(even) + 1) if n == len(even) or even[n] not in keys - set(even[:n]))
        known, found = dict(zip(tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True)), {}
        for place in range(2 * pairs, len(tokens) - 1):
            if tokens[place] in known:
                found[place + 1] = known.pop(tokens[place])
        assert len(found) == min(pairs, task.queries or pairs)
        return found
    if isinstance(task, SelectiveCopying):
        for size in range(*np.add(task.counts, (0, 1))):
            if (marker := tokens[-size - 1]) not in tokens[: -size - 1] and tokens.count(marker) == 1:
                kept, text = tokens[-size:], iter(tokens[: -size - 1])
                assert all(symbol in text for symbol in kept)  # a subsequence
                assert sum(symbol in set(kept) for symbol in tokens[: -size - 1]) == size
                return dict(enumerate(kept, len(tokens) - size))
    text = tokenizer.decode(tokens)
    begin, question, answer = text.partition(" What is the pass key? The pass key is")
    _, statement, rest = begin.partition("The pass key is")
    assert statement
    assert question
    assert rest.split(".")[0] == answer
    assert answer.strip().isdigit()
    assert len(answer.strip()) == task.digits
    size = len(tokenizer.encode(answer, add_special_tokens=False))
    return dict(enumerate(tokens[-size:], len(tokens) - size))


def test_answers_follow_from_what_stands_before_them_and_carry_the_weights(task, tokenizer):
    source = open_synthetic(task, tokenizer, vocab_size=VOCABULARY)
    rows = source.training_rows(LENGTH, (0, 1))
    special, seen = {*range(3), tokenizer.backend.token_to_id("<tool>")}, set()
    lengths = set()
    for tokens, weights in examples(rows[i] for i in range(40)):
        expected = answers(source, tokens, tokenizer)
        assert [i for i, weight in enumerate(weights) if weight] == list(expected)
        assert set(weights) == {0, 1}
        assert all(tokens[place] == token for place, token in expected.items())
        seen.update(tokens)
        lengths.add(len(tokens))
    assert not seen & special
    assert max(seen) < tokenizer.vocab_size
    assert len(lengths) > 2
    # As many in a row as find room.
    used = [(row.segment_ids != 0).sum() for row in (rows[i] for i in range(40))]
    assert min(used) >= LENGTH - max(lengths) - 2


def take(stream, count, state=None):
    iterator = iter(stream)
    if state is not None:
        iterator.set_state(state)
    taken = list(itertools.islice(iterator, count))
    iterator.close()
    return taken


def assert_equal(batch, other):
    for name in ("tokens", "segment_ids", "weights"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(other, name), err_msg=name)


def test_a_mixture_with_text_goes_on_bit_for_bit_on_any_number_of_hosts(task, tokenizer):
    documents = in_memory(np.random.default_rng(0).integers(3, 300, (9, 50), dtype=np.int32))
    sources = {"task": open_source(task, tokenizer, vocab_size=VOCABULARY), "text": documents}

    def stream(**hosts):
        shares = {"task": 0.5, "text": 0.5}
        return batches(sources, shares, batch_size=4, length=LENGTH, seed=1, vocab_size=VOCABULARY, **hosts)

    expected = take(stream(), 6)
    assert len({row.tobytes() for batch in expected for row in batch.tokens[batch.weights.min(axis=1) == 0]}) > 11
    state = json.loads(json.dumps({"next_index": 3}))
    for batch, other in zip(take(stream(), 3, state), expected[3:], strict=True):
        assert_equal(batch, other)
    halves = [take(stream(host_index=host, host_count=2), 2)[1] for host in range(2)]
    np.testing.assert_array_equal(np.concatenate([half.weights for half in halves]), expected[1].weights)
    np.testing.assert_array_equal(np.concatenate([half.tokens for half in halves]), expected[1].tokens)


def test_what_is_held_out_is_fixed_and_not_trained_on(tokenizer):
    source = open_synthetic(Recall(held_out_rows=3), tokenizer, vocab_size=VOCABULARY)
    first, second = (held_out(source, batch_size=2, length=LENGTH) for _ in range(2))
    assert [batch.tokens.shape for batch in first] == [(2, LENGTH)] * 2
    assert not first[1].segment_ids[1].any()
    for batch, other in zip(first, second, strict=True):
        assert_equal(batch, other)
    trained = {source.training_rows(LENGTH, (0, 0, seed))[i].tokens.tobytes() for seed in range(3) for i in range(3)}
    assert not trained & {row.tobytes() for batch in first for row in batch.tokens}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Copying(symbols=1), "source of kind 'copying': symbols=1: expected at least 2"),
        (lambda: Copying(lengths=(5, 4)), r"lengths=\(5, 4\): expected two integers, the first at least 1"),
        (lambda: Recall(keys=3, pairs=(2, 4)), "source of kind 'recall': keys=3: expected at least the pairs, 4"),
        (lambda: SelectiveCopying(counts=(2, 9), lengths=(8, 9)), r"lengths=\(8, 9\)"),
        (lambda: Passkey(digits=0), "digits=0: expected 1 to 18"),
        (lambda: Induction(held_out_rows=0), "held_out_rows=0: expected at least 1"),
    ],
)
def test_sizes_that_are_wrong_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_does_not_fit_is_named(tokenizer):
    long = open_synthetic(Copying(lengths=(1, 80)), tokenizer, vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match=r"kind 'copying': its examples take up to 163 tokens .* length of a row, 160"):
        batches({"a": long}, {"a": 1.0}, batch_size=1, length=LENGTH, seed=0)
    short = open_synthetic(Passkey(lengths=(5, 90)), tokenizer, vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match=r"lengths=\(5, 90\): expected at least the \d+ tokens of statement"):
        held_out(short, batch_size=1, length=LENGTH)
    with pytest.raises(ValueError, match="takes 400 ids: the tokenizer has 277 that are no special tokens"):
        open_synthetic(Recall(keys=200, values=200), tokenizer, vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match="a source of kind 'recall' takes a tokenizer"):
        open_synthetic(Recall(), None, vocab_size=VOCABULARY)

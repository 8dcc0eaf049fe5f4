import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import random_model, random_tokens
from tests.inference.models import UNTIED, VARIANTS, greedy, log_probabilities
from zamba2_jax import Completion, Engine, Request, Sampling, Token, cache_bytes
from zamba2_jax.inference import engine as module
from zamba2_jax.inference.decode import prefill_donated

V, CAPACITY, CHUNK = UNTIED.vocab_size, 48, 16


@pytest.fixture(scope="module")
def model():
    return random_model(UNTIED)


def spell(tokens):
    """Token i as a letter and, for every third, a space."""
    return "".join(chr(ord("A") + token) + " " * (token % 3 == 0) for token in tokens)


SPELLING = SimpleNamespace(decode=spell)


def engine_of(model, slots=3, **options):
    return Engine(model, **{"slots": slots, "capacity": CAPACITY, "chunk": CHUNK, **options})


def prompt_of(length, seed=0):
    return np.asarray(random_tokens(UNTIED, length, seed=seed)).tolist()


def run(engine, requests, *, streaming=False):
    """Completions in the order of the requests; what was streamed must be what is in them."""
    numbers = [engine.submit(request) for request in requests]
    streamed, done = {number: [] for number in numbers}, {}
    for event in engine.events(streaming=streaming):
        assert event.request not in done
        if isinstance(event, Token):
            streamed[event.request].append(event)
        else:
            done[event.request] = event
    for number, completion in done.items():
        assert tuple(event.token for event in streamed[number]) == completion.tokens
        assert tuple(event.logprob for event in streamed[number]) == completion.logprobs
        assert "".join(event.text for event in streamed[number]) == completion.text
    return [done[number] for number in numbers]


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_tokens_are_the_likeliest_of_full_passes(x64, name):
    """Ragged prompts, one of three chunks, in fewer slots than there are prompts; log-probabilities too."""
    model = random_model(VARIANTS[name], jnp.float64)
    prompts = [prompt_of(length, seed=length) for length in (5, 35, 1, 16, 17)]
    done = run(engine_of(model), [Request(prompt, 12) for prompt in prompts])
    for prompt, completion in zip(prompts, done, strict=True):
        assert list(completion.tokens) == greedy(model, prompt, 12)
        assert completion.finish == "length"
        after = log_probabilities(model, prompt + list(completion.tokens))[len(prompt) - 1 : -1]
        np.testing.assert_allclose(completion.logprobs, after[range(12), completion.tokens], rtol=1e-10)
    assert len({token for completion in done for token in completion.tokens}) > 5


@pytest.mark.parametrize("chunk", [1, 3])
def test_every_chunk_length_gives_what_the_full_pass_gives(model, chunk):
    prompt = prompt_of(7)
    (completion,) = run(engine_of(model, 1, chunk=chunk), [Request(prompt, 1)])
    after = log_probabilities(model, prompt)[-1]
    assert completion.tokens == (after.argmax(),)
    np.testing.assert_allclose(completion.logprobs, [after.max()], atol=2e-5)


MIXED = [
    Request(prompt_of(4, 1), 9),
    Request(prompt_of(20, 2), 3, Sampling(temperature=1.0, seed=1)),
    Request(prompt_of(4, 1), 14, Sampling(temperature=1.5, top_k=9, seed=2)),
    Request(prompt_of(11, 3), 1, Sampling(temperature=1.0, top_p=0.8, seed=3)),
    Request(prompt_of(4, 1), 14, Sampling(temperature=1.5, top_k=9, seed=5)),
    Request(prompt_of(2, 4), 17, Sampling(temperature=2.0, min_p=0.02, repetition_penalty=1.3, seed=2**32 - 1)),
    Request(prompt_of(30, 5), 8, Sampling(temperature=0.7, seed=6)),
]


def test_a_request_gives_the_same_tokens_whatever_runs_beside_it(model):
    """Alone; in a full engine, in either order, so in other slots and refilled late; in one slot; streamed."""
    alone = [run(engine_of(model), [request])[0].tokens for request in MIXED]
    assert alone[2] != alone[4]  # they differ in their seeds alone
    full = engine_of(model)
    assert [done.tokens for done in run(full, MIXED)] == alone
    assert [done.tokens for done in run(full, MIXED[::-1])] == alone[::-1]
    assert [done.tokens for done in run(full, MIXED, streaming=True)] == alone
    assert [done.tokens for done in run(engine_of(model, 1), MIXED)] == alone


def test_going_on_from_a_continuation_gives_the_rest_of_it(model):
    """A draw depends on how many tokens stand before it, wherever prompt and continuation meet."""
    how = Sampling(temperature=1.5, repetition_penalty=1.2, seed=4)
    prompt = prompt_of(5)
    (whole,) = run(engine_of(model), [Request(prompt, 10, how)])
    (rest,) = run(engine_of(model), [Request(prompt + list(whole.tokens[:6]), 4, how)])
    assert rest.tokens == whole.tokens[6:]


def test_requests_of_all_kinds_run_in_the_same_programs(model):
    """A few prefill lengths, and one program for all decoding, streamed or not."""
    run(engine_of(model), [Request(prompt_of(3), 4)])
    before = module._run._cache_size(), module._insert._cache_size(), prefill_donated._cache_size()
    run(engine_of(model), MIXED)
    run(
        engine_of(model),
        [Request(prompt_of(length), 2, stop_tokens=[length]) for length in range(1, 31)],
        streaming=True,
    )
    assert (module._run._cache_size(), module._insert._cache_size(), prefill_donated._cache_size()) == before


def test_bfloat16_streams_what_it_gives_at_once():
    """On CPU it has a program without a loop, out of which no copies of the weights are carried."""
    model = random_model(UNTIED, dtype=jnp.bfloat16)
    requests = [Request(prompt_of(length), 7, Sampling(temperature=1.3, seed=length)) for length in (5, 21)]
    once, streamed = (run(engine_of(model), requests, streaming=streaming) for streaming in (False, True))
    assert once == streamed


@pytest.mark.parametrize(("platform", "length", "visits"), [("cpu", 512, 19), ("gpu", 1024, 3)])
def test_an_accelerator_takes_longer_pieces_and_streams_several_steps_at_a_time(
    monkeypatch, model, platform, length, visits
):
    monkeypatch.setattr(module, "platform", lambda: platform)
    calls, decode = [], module._run
    monkeypatch.setattr(module, "_run", lambda *arguments: calls.append(None) or decode(*arguments))
    (done,) = run(Engine(model, slots=1, capacity=CAPACITY), [Request(prompt_of(5), 20)], streaming=True)
    assert list(done.tokens) == greedy(model, prompt_of(5), 20)
    assert len(calls) == visits

    def see(model, tokens, *others, **how):
        raise InterruptedError(tokens.shape)

    monkeypatch.setattr(module, "prefill_donated", see)
    with pytest.raises(InterruptedError, match=re.escape(str((1, length)))):
        run(Engine(model, slots=1, capacity=640), [Request(prompt_of(600), 1)])


def test_a_stop_token_ends_its_request_alone(model):
    prompts = [prompt_of(length, seed=length) for length in (5, 3)]
    free = run(engine_of(model), [Request(prompt, 20) for prompt in prompts])
    stop = free[0].tokens[4]
    at, never = free[0].tokens.index(stop), next(token for token in range(V) if token not in free[0].tokens)
    for streaming in (False, True):
        stopped, other = run(
            engine_of(model, tokenizer=SPELLING),
            [Request(prompts[0], 20, stop_tokens=[stop, never]), Request(prompts[1], 20)],
            streaming=streaming,
        )
        assert (stopped.tokens, stopped.finish) == (free[0].tokens[: at + 1], "stop")
        assert stopped.text == spell(stopped.tokens[:-1])
        assert (other.tokens, other.finish) == (free[1].tokens, "length")
        assert other.text == spell(other.tokens)


def test_a_stop_string_ends_its_request_and_frees_its_slot(model):
    """The string is across two tokens; what a block holds behind it is dropped. The slot's next request is right."""
    how = Sampling(temperature=1.5, seed=8)
    (free,) = run(engine_of(model, 1, tokenizer=SPELLING), [Request(prompt_of(5), 20, how)])
    stop = spell(free.tokens[6:8])
    for streaming in (False, True):
        engine = engine_of(model, 1, tokenizer=SPELLING)
        stopped, after = run(
            engine,
            [Request(prompt_of(5), 20, how, stop_strings=["never", stop]), Request(prompt_of(5), 20, how)],
            streaming=streaming,
        )
        assert (stopped.tokens, stopped.finish) == (free.tokens[:8], "stop")
        assert stopped.text == free.text[: free.text.index(stop)]
        assert after == Completion(1, free.tokens, free.logprobs, free.text, "length")


def test_completions_come_as_requests_end_and_slots_are_refilled(model):
    engine = engine_of(model)
    lengths = [14, 12, 2, 3, 4]
    for i, length in enumerate(lengths):
        engine.submit(Request(prompt_of(3, i), length))
    order = [event.request for event in engine.events() if isinstance(event, Completion)]
    assert order == [2, 3, 4, 1, 0]


def test_cancelling_frees_the_slot_and_changes_no_other(model):
    request = Request(prompt_of(4), 12, Sampling(temperature=1.0))
    (alone,) = run(engine_of(model), [request])
    engine = engine_of(model, 1)
    running, queued, last = (engine.submit(request) for _ in range(3))
    events = engine.events(streaming=False)
    assert next(events).request == running
    assert next(events).request == running  # more of its tokens wait to be read
    assert engine.cancel(running)
    assert engine.cancel(queued)
    assert not engine.cancel(running)
    rest = list(events)
    assert {event.request for event in rest} == {last}
    assert rest[-1].tokens == alone.tokens


def test_reading_may_stop_and_requests_may_come_at_any_time(model):
    request = Request(prompt_of(4), 5)
    (alone,) = run(engine_of(model), [request])
    engine = engine_of(model)
    engine.submit(request)
    first = [event for _, event in zip(range(3), engine.events(streaming=False), strict=False)]
    engine.submit(request)
    rest = list(engine.events())
    tokens = [event for event in first + rest if isinstance(event, Token)]
    for number in range(2):
        assert tuple(event.token for event in tokens if event.request == number) == alone.tokens
    assert list(engine.events()) == []


def test_an_engine_whose_step_was_broken_off_says_so(monkeypatch, model):
    engine, step = engine_of(model), module._run
    engine.submit(Request(prompt_of(5), 3))

    def broken_off(*arguments):
        step(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_run", broken_off)
    with pytest.raises(KeyboardInterrupt):
        list(engine.events())
    with pytest.raises(RuntimeError, match="expected a new engine"):
        next(engine.events())


@pytest.mark.parametrize("slots", [1, 2])
def test_a_row_is_used_again_and_nothing_stays_in_it(model, slots):
    """Long before short, with and without a prefix, and after a prompt that was broken off."""
    prompts = [prompt_of(length, seed=length) for length in (30, 9, 21, 1)]
    (*expected, last) = (run(engine_of(model), [Request(prompt, 6)])[0].tokens for prompt in prompts)
    engine = engine_of(model, slots=slots)
    prefix = engine.prefix(prompts[2][:8])
    requests = [Request(prompts[0], 6), Request(prompts[1], 6), Request(prompts[2][8:], 6, prefix=prefix)]
    for _ in range(2):
        assert [done.tokens for done in run(engine, requests)] == expected

    def broken_off(*arguments, **how):
        prefill_donated(*arguments, **how)
        raise KeyboardInterrupt

    engine.submit(requests[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "prefill_donated", broken_off)
        with pytest.raises(KeyboardInterrupt):
            list(engine.events())
    assert run(engine, [Request(prompts[3], 6)])[0].tokens == last


def test_a_prefix_gives_the_tokens_of_the_whole_prompt(model):
    """Twice from one prefix, and from a prefix of two parts: the penalty knows its tokens, the seed its length."""
    prompt, how = prompt_of(30), Sampling(temperature=1.2, repetition_penalty=1.4, seed=3)
    whole = [Request(prompt, 8, how), Request([*prompt[:20], 5], 8)]
    expected = [done.tokens for done in run(engine_of(model), whole)]
    engine = engine_of(model)
    short = engine.prefix(prompt[:20])
    long = engine.prefix(prompt[20:29], after=short)
    requests = [
        Request(prompt[20:], 8, how, prefix=short),
        Request([5], 8, prefix=short),
        Request(prompt[29:], 8, how, prefix=long),
    ]
    assert [done.tokens for done in run(engine, requests)] == [*expected, expected[0]]


def test_one_prompt_many_continuations(model):
    prompt = prompt_of(20)
    ways = [Sampling(temperature=1.5, seed=seed) for seed in range(5)]
    expected = [done.tokens for done in run(engine_of(model), [Request(prompt, 6, how) for how in ways])]
    engine = engine_of(model)
    taken = engine.prefix(prompt[:-1])
    forked = run(engine, [Request(prompt[-1:], 6, how, prefix=taken) for how in ways])
    assert [done.tokens for done in forked] == expected
    assert len(set(expected)) == 5


def test_a_request_may_fill_the_capacity(model):
    (done,) = run(engine_of(model), [Request(prompt_of(CAPACITY - 4), 4)])
    assert len(done.tokens) == 4
    assert np.isfinite(done.logprobs).all()


@pytest.mark.parametrize(("slots", "rows"), [(3, 4), (1, 1)])
def test_an_engine_holds_the_caches_that_were_promised(model, slots, rows):
    """One more than its slots, where they are several."""
    engine = engine_of(model, slots=slots)
    run(engine, [Request(prompt_of(5), 3)])
    held = jax.tree.leaves((engine._rows.cache, engine._row))
    assert sum(array.nbytes for array in held) == rows * cache_bytes(UNTIED, 1, CAPACITY).total


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": []}, "prompt is empty, expected at least one token"),
        ({"prompt": [V]}, f"prompt holds token {V}, expected ids in [0, {V})"),
        ({"prompt": [-1]}, f"prompt holds token -1, expected ids in [0, {V})"),
        ({"prompt": [1.5]}, "prompt is float64 of shape (1,), expected integers in one row"),
        ({"prompt": "text"}, "expected integers in one row"),
        ({"prompt": [1] * 40}, "40 tokens and 9 new ones: expected at most the capacity, 48"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected an integer, at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5: expected an integer, at least 1"),
        ({"stop_tokens": [V]}, f"stop_tokens holds token {V}, expected ids in [0, {V})"),
        ({"stop_tokens": ["</s>"]}, "stop_tokens is <U4 of shape (1,), expected integers in one row"),
        ({"stop_strings": "\n"}, "stop_strings='\\n': expected a sequence of strings, none empty"),
        ({"stop_strings": [""]}, "stop_strings=['']: expected a sequence of strings, none empty"),
        ({"stop_strings": [7]}, "stop_strings=[7]: expected a sequence of strings, none empty"),
        ({"stop_strings": ["x"]}, "stop_strings=['x']: expected an engine with a tokenizer"),
    ],
)
def test_a_wrong_request_is_named_when_it_is_made_or_submitted(unchecked, model, values, message):
    engine = engine_of(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        engine.submit(Request(**{"prompt": [1], "max_new_tokens": 9, **values}))
    assert list(engine.events()) == []


@pytest.mark.parametrize("option", ["slots", "capacity", "chunk"])
def test_a_wrong_size_is_named(model, option):
    with pytest.raises(ValueError, match=f"{option}=0: expected an integer, at least 1"):
        engine_of(model, **{option: 0})


def test_a_prefix_that_does_not_fit_is_named(model):
    engine = engine_of(model)
    prefix = engine.prefix([1, 2, 3])
    with pytest.raises(ValueError, match="prefix is for capacity 48, expected 32"):
        engine_of(model, capacity=32).submit(Request([1], 2, prefix=prefix))
    with pytest.raises(ValueError, match="49 tokens and 0 new ones"):
        engine.prefix([1] * 46, after=prefix)
    with pytest.raises(ValueError, match="42 tokens and 8 new ones"):
        engine.submit(Request([1] * 39, 8, prefix=prefix))

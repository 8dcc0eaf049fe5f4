import re

import numpy as np
import pytest

from tests.helpers import random_model, random_tokens
from tests.inference.models import UNTIED, Letters, greedy
from zamba2_jax import Completion, Sampling, Token, generate, stream


class ListLetters(Letters):
    """Encodes to a list, as `transformers` does."""

    def encode(self, text):
        return super().encode(text).ids


@pytest.fixture(scope="module")
def model():
    return random_model(UNTIED)


PROMPTS = [random_tokens(UNTIED, length, seed=length).tolist() for length in (5, 1, 17)]


def test_lists_are_continued_by_lists_and_strings_by_strings(model):
    """Of unlike lengths, in fewer slots than prompts; the order is that of the prompts."""
    lists = generate(model, PROMPTS, 6, slots=2)
    assert lists == [greedy(model, prompt, 6) for prompt in PROMPTS]
    assert len({tuple(row) for row in lists}) == 3
    assert generate(model, [np.array(prompt) for prompt in PROMPTS], 6, slots=2) == lists
    letters = Letters()
    texts = [letters.decode(prompt) for prompt in PROMPTS]
    for tokenizer in (letters, ListLetters()):
        assert generate(model, texts, 6, tokenizer=tokenizer, slots=2) == [letters.decode(row) for row in lists]
    stop = letters.decode(lists[0][2:4])
    (stopped, *_) = generate(model, texts, 6, tokenizer=letters, slots=2, stop_strings=[stop])
    assert stopped == letters.decode(lists[0]).split(stop)[0]


def test_seeds_follow_the_prompts(model):
    """One seed for all: prompt i has the i-th after it. A list of samplings is taken as it is."""
    how = Sampling(temperature=2.0, seed=2**64 - 1)
    first, second = generate(model, [PROMPTS[2]] * 2, 6, how, slots=2)
    assert first != second
    assert generate(model, [PROMPTS[2]] * 2, 6, [Sampling(temperature=2.0, seed=0), how], slots=2) == [second, first]


def test_a_prefix_stands_before_every_prompt(model):
    whole = [PROMPTS[2] + prompt for prompt in PROMPTS[:2]]
    assert generate(model, PROMPTS[:2], 6, prefix=PROMPTS[2], slots=2) == generate(model, whole, 6, slots=2)


def test_a_stream_gives_every_token_as_it_comes(model):
    events = list(stream(model, PROMPTS, 6, tokenizer=Letters(), slots=2))
    done = {event.request: event for event in events if isinstance(event, Completion)}
    assert [list(done[i].tokens) for i in range(3)] == generate(model, PROMPTS, 6, slots=2)
    for i in range(3):
        tokens = [event for event in events if isinstance(event, Token) and event.request == i]
        assert tuple(event.token for event in tokens) == done[i].tokens
        assert "".join(event.text for event in tokens) == done[i].text == Letters().decode(done[i].tokens)
    first, second = (
        next(n for n, e in enumerate(events) if e.request == i and isinstance(e, Completion)) for i in (0, 2)
    )
    assert first < second  # the third prompt waited for a slot


@pytest.mark.parametrize("call", [generate, stream])
@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts is empty: expected at least one"),
        ("text", {}, "prompts='text': expected a list of them"),
        (["text"], {}, "prompts are strings: expected a tokenizer"),
        (["A", [1]], {"tokenizer": Letters()}, "prompts are strings and token ids: expected one of the two"),
        ([""], {"tokenizer": Letters()}, "prompt 0 is empty, expected text"),
        ([[1], []], {}, "prompt 1 is empty, expected at least one token"),
        ([[1], [2, 32]], {}, "prompt 1 holds token 32, expected ids in [0, 32)"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0: expected an integer, at least 1"),
        ([[1]], {"sampling": [Sampling()] * 2}, "sampling has 2 entries: expected one, or 1, as prompts"),
        ([[1]], {"stop_strings": ["x"]}, "expected an engine with a tokenizer"),
        ([[1]], {"stop_strings": ["x"], "prefix": [2]}, "expected an engine with a tokenizer"),
        ([[1]], {"stop_strings": 5}, "stop_strings=5: expected a sequence of strings, none empty"),
        ([[1]], {"stop_tokens": 5}, "stop_tokens=5: expected a sequence of token ids"),
        ([[1]], {"stop_tokens": [-1]}, "stop_tokens holds token -1"),
        ([[1]], {"prefix": [40]}, "prefix holds token 40"),
        ([[1]], {"slots": 0}, "slots=0: expected an integer, at least 1"),
    ],
)
def test_wrong_arguments_are_named_by_the_call_itself(model, call, prompts, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(model, prompts, **{"max_new_tokens": 3, **options})

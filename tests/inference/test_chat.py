import re
from contextlib import closing

import pytest

from tests.inference.checkpoints import TEMPLATE, write_checkpoint
from zamba2_jax import Engine, Request, Sampling, load_hf
from zamba2_jax.inference.chat import Conversation
from zamba2_jax.text.tokenizer import load_tokenizer

CAPACITY = 192
HOW = Sampling(temperature=1.0, seed=5)
LAST_ONLY = "{{ messages[-1].content }}<eos>"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_hf(write_checkpoint(tmp_path_factory.mktemp("chat") / "model"))


@pytest.fixture
def tokenizer(tmp_path, request):
    template = getattr(request, "param", TEMPLATE)
    return load_tokenizer(write_checkpoint(tmp_path / "model", template))


def answer_to(model, tokens):
    """By an engine that takes all of them in; of the shape of the conversation's, whose programs it shares."""
    engine = Engine(model, slots=1, capacity=CAPACITY)
    engine.submit(Request(tokens, 9, HOW, (2,)))
    (*_, done) = engine.events()
    return done.tokens


@pytest.mark.parametrize("tokenizer", [TEMPLATE, LAST_ONLY], indirect=True)
def test_every_answer_is_that_to_the_whole_conversation(model, tokenizer):
    """Where a turn begins with the last one, only what is new is taken in; else all of it is."""
    conversation = Conversation(model, tokenizer, stop_tokens=(2,), system="the rat", capacity=CAPACITY)
    before = 0
    for said in ("the cat", "the hat and the bat", "on the mat"):
        messages = [*conversation.messages, {"role": "user", "content": said}]
        tokens = tokenizer.encode_chat(messages)
        expected = answer_to(model, tokens)
        answer = "".join(conversation.ask(said, 9, HOW))
        assert conversation.messages == [*messages, {"role": "assistant", "content": answer}]
        assert tokenizer.decode([*tokens, *expected]) == tokenizer.decode(tokens) + answer
        assert conversation.finish in ("stop", "length")
        grows = tokenizer.chat_template == TEMPLATE
        assert conversation.taken_in == (len(tokens) - before if grows else len(tokens))
        before = len(tokens) - 1


def test_an_answer_that_is_broken_off_stays_as_far_as_it_was_given(model, tokenizer):
    conversation = Conversation(model, tokenizer, capacity=CAPACITY)
    with closing(conversation.ask("the cat", 40)) as pieces:
        given = [next(pieces) for _ in range(5)]
    assert conversation.finish is None
    assert conversation.messages[-1] == {"role": "assistant", "content": "".join(given)}
    assert "".join(conversation.ask("the cat", 4)) is not None
    assert conversation.finish == "length"


def test_a_full_conversation_says_so_and_stays_as_it_was(model, tokenizer):
    conversation = Conversation(model, tokenizer, capacity=CAPACITY)
    for _ in conversation.ask("the cat", 1000):
        pass
    before = list(conversation.messages)
    with pytest.raises(ValueError, match=re.escape("tokens: expected fewer than 192")):
        next(conversation.ask("the hat " * 120, 5))
    assert conversation.messages == before
    conversation.restart()
    assert conversation.messages == []

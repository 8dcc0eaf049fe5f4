"""Small models whose greedy continuations are not one token again and again."""

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from tests.helpers import SMALL, forward

UNTIED = dataclasses.replace(SMALL, tie_embeddings=False)

VARIANTS = {
    "one-block": UNTIED,
    "two-blocks-without-rope": dataclasses.replace(UNTIED, num_shared_blocks=2, use_rope=False, ngroups=1),
}
LENGTH = 48
"""Tokens of a row in a full pass: one program for all rows, since padding at the end changes nothing before it."""


def log_probabilities(model, tokens):
    """ln softmax of the logits after every token, by a full pass, [t, v]."""
    row = np.zeros((1, LENGTH), np.int32)
    row[0, : len(tokens)] = tokens
    logits = np.asarray(forward(model, jnp.asarray(row))[0, : len(tokens)], np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def greedy(model, prompt, new_tokens):
    """The likeliest continuation, by a full pass for every token."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(int(log_probabilities(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


class Letters:
    """A tokenizer: token i is the character 64 + i. Encodes to an object with `ids`, as `tokenizers` does."""

    def encode(self, text):
        return SimpleNamespace(ids=[ord(letter) - 64 for letter in text])

    def decode(self, tokens):
        return "".join(chr(64 + token) for token in tokens)

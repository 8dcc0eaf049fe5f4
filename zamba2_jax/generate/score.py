"""How likely a model finds given tokens."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from zamba2_jax.generate.decode import check_tokens, next_power_of_two, padded_length, rounded_capacity
from zamba2_jax.generate.sampling import is_int
from zamba2_jax.model.cache import Cache, init_cache
from zamba2_jax.model.divided import token_log_probabilities
from zamba2_jax.model.zamba2 import Zamba2
from zamba2_jax.typing import Array

POSITIONS = 32
"""Positions of every row whose logits exist at a time."""


def score(model: Zamba2, rows: Sequence[Sequence[int]], *, batch: int = 8, chunk: int = 256) -> list[np.ndarray]:
    """The natural log-probability of every token but the first of each row, given those before it.

    Rows of like lengths run together, in pieces, with a cache between them: beside the cache, memory does not grow with
    the length of a row.

    Args:
        model: the model.
        rows: token ids, each row of any length t from 1.
        batch: rows at a time.
        chunk: most tokens of a row at a time.

    Returns:
        For each row an array [t - 1], in at least float32.

    Raises:
        ValueError: a row is empty or holds an id outside the vocabulary, or batch or chunk is below 1.
    """
    if not is_int(batch, 1) or not is_int(chunk, 1):
        raise ValueError(f"batch={batch!r}, chunk={chunk!r}: expected integers, at least 1")
    checked = [check_tokens(row, model.config.vocab_size, f"row {i}") for i, row in enumerate(rows)]
    b = min(batch, next_power_of_two(max(len(rows), 1)))
    order = sorted(range(len(checked)), key=lambda i: len(checked[i]))
    scores: dict[int, np.ndarray] = {}
    for start in range(0, len(order), b):
        members = order[start : start + b]
        scores |= zip(members, _score_batch(model, [checked[i] for i in members], b, chunk), strict=True)
    return [scores[i] for i in range(len(checked))]


def _score_batch(model: Zamba2, rows: Sequence[np.ndarray], b: int, chunk: int) -> list[np.ndarray]:
    """Scores of at most `b` rows, in pieces of one length."""
    lengths = np.array([len(row) for row in rows] + [0] * (b - len(rows)), np.int32)
    size = padded_length(int(lengths.max()), chunk)
    pieces = -(-int(lengths.max()) // size)
    tokens = np.zeros((b, pieces * size + 1), np.int32)
    for line, row in zip(tokens, rows, strict=False):
        line[: len(row)] = row
    cache, found = init_cache(model.config, b, rounded_capacity(pieces * size), model.dtype), []
    for start in range(0, pieces * size, size):
        window = tokens[:, start : start + size + 1]
        real = np.clip(lengths - start, 0, size)
        piece, cache = _score_piece(model, window[:, :-1], window[:, 1:], real, cache)
        found.append(np.asarray(piece))
    return [line[: len(row) - 1] for line, row in zip(np.concatenate(found, axis=1), rows, strict=False)]


@partial(jax.jit, donate_argnames="cache")
def _score_piece(model: Zamba2, tokens: Array, targets: Array, real: Array, cache: Cache) -> tuple[Array, Cache]:
    padding = (jnp.arange(tokens.shape[1]) < real[:, None]).astype(jnp.int32)
    h, after = model.hidden_states(tokens, padding, cache=cache)
    assert after is not None
    return token_log_probabilities(h, model.output_matrix, targets, chunk_size=POSITIONS, cached=True), after

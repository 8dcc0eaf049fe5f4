"""How likely a model finds given tokens."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from zamba2_jax.inference.decode import check_tokens, next_power_of_two, padded_length, rounded_capacity
from zamba2_jax.inference.sampling import is_int, log_probability
from zamba2_jax.models.base import LanguageModel
from zamba2_jax.models.cache import init_cache
from zamba2_jax.nn.cache import Cache
from zamba2_jax.ops.cross_entropy import map_positions
from zamba2_jax.text.stream import TokenizerLike, token_lists
from zamba2_jax.typing import Array, at_least_fp32

POSITIONS = 32
"""Positions of every row whose logits exist at a time."""


def score(
    model: LanguageModel,
    texts: Sequence[str] | Sequence[Sequence[int]],
    *,
    tokenizer: TokenizerLike | None = None,
    batch: int = 8,
    chunk: int = 256,
) -> list[np.ndarray]:
    """The natural log-probability of every token but the first of each text, given those before it.

    Texts of like lengths run together as rows, in pieces, with a cache between them: beside the cache, memory does not
    grow with the length of a row.

    Args:
        model: the model.
        texts: token ids, of any lengths t from 1; or strings, with a tokenizer.
        tokenizer: for strings. What it adds to a text by itself, it adds.
        batch: rows at a time.
        chunk: most tokens of a row at a time.

    Returns:
        For each text an array [t - 1], in at least float32.

    Raises:
        ValueError: a text is empty or holds an id outside the vocabulary, strings come without a tokenizer, or batch or
            chunk is below 1.
    """
    return [log_p for log_p, _ in score_tokens(model, token_lists(texts, tokenizer, "text"), batch=batch, chunk=chunk)]


def score_tokens(
    model: LanguageModel, rows: Sequence[Sequence[int]], *, batch: int = 8, chunk: int = 256
) -> list[tuple[np.ndarray, np.ndarray]]:
    """As `score`, and for each token also whether it is the likeliest: two arrays [t - 1] per row."""
    if not is_int(batch, 1) or not is_int(chunk, 1):
        raise ValueError(f"batch={batch!r}, chunk={chunk!r}: expected integers, at least 1")
    checked = [check_tokens(row, model.config.vocab_size, f"text {i}") for i, row in enumerate(rows)]
    b = min(batch, next_power_of_two(max(len(rows), 1)))
    order = sorted(range(len(checked)), key=lambda i: len(checked[i]))
    scores: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for start in range(0, len(order), b):
        members = order[start : start + b]
        scores |= zip(members, _score_batch(model, [checked[i] for i in members], b, chunk), strict=True)
    return [scores[i] for i in range(len(checked))]


def _score_batch(
    model: LanguageModel, rows: Sequence[np.ndarray], b: int, chunk: int
) -> list[tuple[np.ndarray, np.ndarray]]:
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
        found.append(jax.device_get(piece))
    log_p, likeliest = (np.concatenate(pieces, axis=1) for pieces in zip(*found, strict=True))
    return [(log_p[i, : len(row) - 1], likeliest[i, : len(row) - 1]) for i, row in enumerate(rows)]


@partial(jax.jit, donate_argnames="cache")
def _score_piece(
    model: LanguageModel, tokens: Array, targets: Array, real: Array, cache: Cache
) -> tuple[tuple[Array, Array], Cache]:
    padding = (jnp.arange(tokens.shape[1]) < real[:, None]).astype(jnp.int32)
    h, after, *_ = model.run(tokens, padding, cache=cache)
    assert after is not None

    def of_positions(h: Array, targets: Array) -> tuple[Array, Array]:
        logits = model.logits(h, dtype=at_least_fp32(h.dtype))
        return log_probability(logits, targets), jnp.argmax(logits, axis=-1) == targets

    return map_positions(of_positions, h, targets, POSITIONS), after

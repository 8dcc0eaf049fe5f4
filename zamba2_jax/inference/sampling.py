"""Choosing tokens: every row of a batch by its own parameters, which are data, so that changing them compiles nothing.

In this order: the repetition penalty, the temperature, then top-k, top-p and min-p cut the distribution. All cuts are
thresholds on the logits: tokens of equal logits are kept or dropped together, so that a cut may keep more tokens than
its number says, and never depends on the tokens' ids. A row's draw depends on its seed, its position and its logits,
on nothing else in the batch.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zamba2_jax.typing import Array, Bool, Float, Int, at_least_fp32

_ALL = 2**31 - 1
"""As top_k: more tokens than any vocabulary has."""


def is_int(value: object, least: int) -> bool:
    """Whether a value is an integer, of Python or numpy, and at least `least`."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= least)


def is_number(value: object) -> bool:
    """Whether a value is a real number, of Python or numpy."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are chosen. The default is greedy.

    Attributes:
        temperature: tokens are drawn from softmax(logits / temperature); 0 takes the likeliest, the first of equals.
        top_k: keeps the k likeliest tokens; None, 0 or -1 keeps all.
        top_p: then keeps the fewest of the likeliest tokens that have this share of what is left (nucleus sampling,
            arXiv:1904.09751); 1 keeps all.
        min_p: keeps tokens at least this share as likely as the likeliest (arXiv:2407.01082); 0 keeps all.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that the prompt or the
            continuation holds already (arXiv:1909.05858, section 4.1); 1 changes nothing.
        seed: of the draws.

    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "temperature": (
                is_number(self.temperature) and 0 <= self.temperature < math.inf,
                "a finite number, 0 or more",
            ),
            "top_k": (self.top_k is None or is_int(self.top_k, -1), "None, or an integer from -1"),
            "top_p": (is_number(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]"),
            "min_p": (is_number(self.min_p) and 0 <= self.min_p <= 1, "a number in [0, 1]"),
            "repetition_penalty": (
                is_number(self.repetition_penalty) and 0 < self.repetition_penalty < math.inf,
                "a finite number above 0",
            ),
            "seed": (is_int(self.seed, 0) and self.seed < 2**64, "an integer in [0, 2^64)"),
        }
        for field, (valid, rule) in rules.items():
            if not valid:
                raise ValueError(f"{field}={getattr(self, field)!r}: expected {rule}")

    def for_prompt(self, i: int) -> "Sampling":
        """The same with the seed after it by i: for prompt i of many, so that one given twice goes on in two ways."""
        return dataclasses.replace(self, seed=(self.seed + i) % 2**64)


GREEDY = Sampling()


@struct.dataclass
class SamplingRows:
    """The parameters of `b` rows; fields as in `Sampling`, seeds as their upper and lower half."""

    temperature: Float[Array, " b"]
    top_k: Int[Array, " b"]
    top_p: Float[Array, " b"]
    min_p: Float[Array, " b"]
    repetition_penalty: Float[Array, " b"]
    seed: Int[Array, "b 2"]

    @classmethod
    def stack(cls, rows: Sequence[Sampling]) -> "SamplingRows":
        """One row each, on the host: floats in float32, top_k in int32, halves of seeds in uint32."""

        def column(name: str, dtype: type) -> Array:
            return cast(Array, np.array([getattr(row, name) for row in rows], dtype))

        top_k = [min(row.top_k, _ALL) if row.top_k is not None and row.top_k > 0 else _ALL for row in rows]
        seeds = [divmod(int(row.seed), 2**32) for row in rows]
        return cls(
            temperature=column("temperature", np.float32),
            top_k=cast(Array, np.array(top_k, np.int32)),
            top_p=column("top_p", np.float32),
            min_p=column("min_p", np.float32),
            repetition_penalty=column("repetition_penalty", np.float32),
            seed=cast(Array, np.array(seeds, np.uint32)),
        )


def sample(
    logits: Float[Array, "b v"], rows: SamplingRows, seen: Bool[Array, "b v"], positions: Int[Array, " b"]
) -> Int[Array, " b"]:
    """One token per row, int32.

    Args:
        logits: of the model.
        rows: how to choose.
        seen: tokens that the row holds already, for the repetition penalty.
        positions: how many tokens stand before the one to choose: the draw's key is the seed's, folded with it.
    """
    logits = penalize(logits.astype(at_least_fp32(logits.dtype)), seen, rows.repetition_penalty)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Array:
        scaled = scale(logits, rows.temperature)
        neutral = (rows.top_k == _ALL) & (rows.top_p == 1) & (rows.min_p == 0)
        # Cuts are what costs: batches in which nothing is cut go without.
        kept = jax.lax.cond(neutral.all(), lambda: scaled, lambda: truncate(scaled, rows.top_k, rows.top_p, rows.min_p))
        drawn = jax.vmap(_draw)(rows.seed, positions, kept)
        return jnp.where(rows.temperature == 0, greedy, drawn)

    return jax.lax.cond((rows.temperature == 0).all(), lambda: greedy, draw)


def penalize(logits: Float[Array, "b v"], seen: Bool[Array, "b v"], penalty: Float[Array, " b"]) -> Float[Array, "b v"]:
    """The logits of seen tokens made less likely by `penalty` (more, below 1)."""
    penalty = penalty.astype(logits.dtype)[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def scale(logits: Float[Array, "b v"], temperature: Float[Array, " b"]) -> Float[Array, "b v"]:
    """(logits - max) / temperature, which does not overflow, however low the temperature. One of 0 counts as 1."""
    temperature = jnp.where(temperature == 0, 1, temperature).astype(logits.dtype)
    return (logits - logits.max(axis=-1, keepdims=True)) / temperature[:, None]


def truncate(
    logits: Float[Array, "b v"], top_k: Int[Array, " b"], top_p: Float[Array, " b"], min_p: Float[Array, " b"]
) -> Float[Array, "b v"]:
    """The logits with -inf at what is cut off: top-k, then top-p of what is left, and min-p.

    Shares are sums in float32, rounded by about 1e-6: so near to top_p a token more or less may be kept.
    """
    below = (logits.max(axis=-1, keepdims=True) - logits).astype(jnp.float32)
    wanted = jnp.minimum(top_k, logits.shape[-1])
    limit = _least_limit(below, lambda kept: kept.sum(axis=-1) >= wanted)
    weights = jnp.where(below <= limit, jnp.exp(-below), 0)
    share = top_p * weights.sum(axis=-1)
    nucleus = _least_limit(below, lambda kept: jnp.sum(weights, axis=-1, where=kept) >= share)
    limit = jnp.where(top_p[:, None] < 1, jnp.minimum(limit, nucleus), limit)
    return jnp.where(below <= jnp.minimum(limit, -jnp.log(min_p)[:, None]), logits, -jnp.inf)


def _least_limit(below: Float[Array, "b v"], enough: Callable[[Array], Array]) -> Float[Array, "b 1"]:
    """The least number x for which `enough` says True of `below <= x`, for each row.

    Floats that are not negative are ordered as their bits are as integers: 31 halvings find x exactly, in a fraction of
    the time of a sort.
    """

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low) // 2
        good = enough(below <= jax.lax.bitcast_convert_type(middle, jnp.float32))[:, None]
        return jnp.where(good, low, middle + 1), jnp.where(good, middle, high)

    infinity = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
    low = jnp.zeros((below.shape[0], 1), jnp.int32)
    found = jax.lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, infinity)))[1]
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def log_probability(logits: Float[Array, "*batch v"], tokens: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """ln softmax(logits)[token], in at least float32."""
    logits = logits.astype(at_least_fp32(logits.dtype))
    return jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)


def _draw(seed: Array, position: Array, logits: Array) -> Array:
    # Threefry by name: its draws under vmap are those of the row alone, which not every generator promises.
    # The two halves of a seed are its key.
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
    return jax.random.categorical(key, logits).astype(jnp.int32)

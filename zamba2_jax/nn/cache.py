"""What a model carries from one token to the next: immutable values, returned anew by every call."""

from typing import Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct

from zamba2_jax.ops.attention import stored_dtype
from zamba2_jax.parallel.mesh import constrain
from zamba2_jax.parallel.sharded_ops import row_axes
from zamba2_jax.typing import Array, DTypeLike, Float, Int, Shaped, at_least_fp32

NO_LIMIT = 2**31 - 1
"""Tokens that a row can hold whose cache does not grow."""


@runtime_checkable
class State(Protocol):
    """What one layer, or one call of a shared block, carries: a pytree of arrays with the rows in front."""

    def placed(self, rows: str | None) -> Self:
        """The state, divided over the mesh that is set, its rows by that logical axis."""


class MambaState(struct.PyTreeNode):
    """The state of one Mamba2 block.

    Attributes:
        conv_x, conv_bc: the last d_conv - 1 inputs of the convolutions over x and over (B, C), oldest first.
        ssm: the state S of the recurrence, in at least float32.
    """

    conv_x: Float[Array, "b past e"]
    conv_bc: Float[Array, "b past bc"]
    ssm: Float[Array, "b h p n"]

    @classmethod
    def zeros(cls, b: int, past: int, bc: int, heads: tuple[int, int, int], dtype: DTypeLike) -> Self:
        """Of `b` rows in compute dtype `dtype`, `heads` being (h, p, n)."""
        h, p, n = heads
        return cls(
            conv_x=jnp.zeros((b, past, h * p), dtype),
            conv_bc=jnp.zeros((b, past, bc), dtype),
            ssm=jnp.zeros((b, h, p, n), at_least_fp32(dtype)),
        )

    def placed(self, rows: str | None) -> Self:
        """Its heads and channels are divided, too."""
        return self.replace(
            conv_x=constrain(self.conv_x, rows, None, "inner"),
            conv_bc=constrain(self.conv_bc, rows, None, None),
            ssm=constrain(self.ssm, rows, "heads", None, None),
        )


class Mamba1State(struct.PyTreeNode):
    """The state of one Mamba1 block.

    Attributes:
        conv_x: the last d_conv - 1 inputs of the convolution, oldest first.
        ssm: the state of the recurrence, of the channels of all heads, in at least float32.
    """

    conv_x: Float[Array, "b past e"]
    ssm: Float[Array, "b e n"]

    @classmethod
    def zeros(cls, b: int, past: int, e: int, n: int, dtype: DTypeLike) -> Self:
        """Of `b` rows in compute dtype `dtype`."""
        return cls(conv_x=jnp.zeros((b, past, e), dtype), ssm=jnp.zeros((b, e, n), at_least_fp32(dtype)))

    def placed(self, rows: str | None) -> Self:
        """Its channels are divided, too."""
        return self.replace(
            conv_x=constrain(self.conv_x, rows, None, "inner"), ssm=constrain(self.ssm, rows, "inner", None)
        )


class KVCache(struct.PyTreeNode):
    """Keys (already rotated) and values of one attention; slot i holds token i of the row.

    Attributes:
        k, v: in the compute dtype; on CPU bfloat16 as its bits, in uint16. See `ops.attention.stored_dtype`.
        window: slots of a ring, in which slot i % window holds token i, for the last `window` tokens of the row; None
            where there is one for each token that the row can hold.
    """

    k: Shaped[Array, "b kv u p"]
    v: Shaped[Array, "b kv u p"]
    window: int | None = struct.field(pytree_node=False, default=None)

    @classmethod
    def zeros(cls, b: int, kv: int, capacity: int, p: int, dtype: DTypeLike, window: int | None = None) -> Self:
        """Of `b` rows of at most `capacity` tokens, in compute dtype `dtype`.

        Of more tokens than a `window`, which is all that a token sees, the last ones are kept.
        """
        window = None if window is None or capacity <= window else window
        slots = capacity if window is None else window
        k, v = (jnp.zeros((b, kv, slots, p), stored_dtype(dtype)) for _ in range(2))
        return cls(k=k, v=v, window=window)

    def placed(self, rows: str | None) -> Self:
        """Its heads are divided, too."""
        return jax.tree.map(lambda array: constrain(array, rows, "attention_heads", None, None), self)


class Cache(struct.PyTreeNode):
    """All a model needs to go on with `b` rows.

    Attributes:
        layers: the state of each layer.
        calls: of each call of a shared block.
        lengths: tokens each row has taken in so far.
    """

    layers: tuple[State, ...]
    calls: tuple[State, ...]
    lengths: Int[Array, " b"]

    @property
    def capacity(self) -> int:
        """Tokens a row can hold; `NO_LIMIT` in a model without attention, or with rings for all of it."""
        kept = [of for of in (*self.layers, *self.calls) if isinstance(of, KVCache) and of.window is None]
        return min((of.k.shape[2] for of in kept), default=NO_LIMIT)


def placed(cache: Cache) -> Cache:
    """The cache, divided over the mesh that is set, its rows as in `sharded_ops.row_axes`."""
    rows, _ = row_axes(len(cache.lengths), cached=True)
    return Cache(
        layers=tuple(of.placed(rows) for of in cache.layers),
        calls=tuple(of.placed(rows) for of in cache.calls),
        lengths=constrain(cache.lengths, rows),
    )


def fork(cache: Cache, copies: int) -> Cache:
    """A cache in which every row stands `copies` times, one after the other: many ways on from one prompt.

    Raises:
        ValueError: copies is below 1.
    """
    if copies < 1:
        raise ValueError(f"copies={copies}: expected at least 1")
    return jax.tree.map(lambda array: jnp.repeat(array, copies, axis=0), cache)

"""Rounding to bfloat16 that keeps small updates on average."""

import math
import zlib

import jax
import jax.numpy as jnp

from zamba2_jax.train.stacks import Leaf
from zamba2_jax.typing import Array, Float, Int, Shaped


def round_stochastically(x: Float[Array, "..."], bits: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """x in bfloat16: one of its two neighbours there, each the likelier the nearer it is, so that the mean is x.

    Args:
        x: float32. What bfloat16 holds stays as it is, infinities and NaN too.
        bits: uniform, uint16, of x's shape.
    """
    # The lower half of a float32, which bfloat16 lacks, is how far x is from the neighbour nearer to 0, in 2^-16.
    words = jax.lax.bitcast_convert_type(x, jnp.uint32) + bits.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(words & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def stored(x: Float[Array, "..."], like: Float[Array, "..."], leaf: Leaf, step: Int[Array, ""]) -> Float[Array, "..."]:
    """A new value of parameters in the dtype they are held in; see `round_stochastically` for bfloat16.

    The random bits are a function of the step and a parameter's name alone, stacked or not.

    Args:
        x: the new value, in at least float32.
        like: the old one.
        leaf: which parameters these are.
        step: steps taken.
    """
    if like.dtype != jnp.bfloat16:
        return x.astype(like.dtype)
    names = jnp.asarray([zlib.crc32(name.encode()) for name in leaf.names], jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(jax.random.key(0), step), names)
    seeds = jax.vmap(lambda key: jax.random.bits(key, (), jnp.uint32))(keys)
    own = x.shape[leaf.stacked :]
    return round_stochastically(x.astype(jnp.float32), _bits(seeds.reshape(-1, *[1] * len(own)), own).reshape(x.shape))


def _bits(seeds: Int[Array, "..."], shape: tuple[int, ...]) -> Int[Array, "..."]:
    """16 bits for each number in arrays of one shape, by a hash of its place and the seed of its array.

    The hash is lowbias32 (https://github.com/skeeto/hash-prospector).
    """
    # docs/xla-notes.md: random-bits-on-cpu
    places = [jax.lax.broadcasted_iota(jnp.uint32, (1, *shape), axis + 1) for axis in range(len(shape))]
    index = sum(place * jnp.uint32(math.prod(shape[axis + 1 :])) for axis, place in enumerate(places))
    word = (index * jnp.uint32(0x9E3779B9)) ^ seeds
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return (word >> 16).astype(jnp.uint16)

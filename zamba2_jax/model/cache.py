"""What a model carries from one token to the next: immutable values, returned anew by every call."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from zamba2_jax.config import Zamba2Config
from zamba2_jax.model.divided import row_axes
from zamba2_jax.ops.attention import stored_dtype
from zamba2_jax.sharding import constrain
from zamba2_jax.typing import Array, DTypeLike, Float, Int, Shaped, at_least_fp32


@struct.dataclass
class MambaState:
    """The state of one Mamba2 block.

    Attributes:
        conv_x, conv_bc: the last d_conv - 1 inputs of the convolutions over x and over (B, C), oldest first.
        ssm: the state S of the recurrence, in at least float32.
    """

    conv_x: Float[Array, "b past e"]
    conv_bc: Float[Array, "b past bc"]
    ssm: Float[Array, "b h p n"]


@struct.dataclass
class KVCache:
    """Keys (already rotated) and values of one call of a shared block; slot i holds token i of the row.

    In the compute dtype; on CPU bfloat16 as its bits, in uint16. See `ops.attention.stored_dtype`.
    """

    k: Shaped[Array, "b kv u p"]
    v: Shaped[Array, "b kv u p"]


@struct.dataclass
class Cache:
    """All a model needs to go on with `b` rows.

    Attributes:
        mamba: one state per layer.
        attention: one cache per call of a shared block.
        lengths: tokens each row has taken in so far.
    """

    mamba: tuple[MambaState, ...]
    attention: tuple[KVCache, ...]
    lengths: Int[Array, " b"]

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return self.attention[0].k.shape[2]


def init_cache(config: Zamba2Config, batch: int, capacity: int, dtype: DTypeLike = jnp.float32) -> Cache:
    """An empty cache for `batch` rows of at most `capacity` tokens, in compute dtype `dtype`."""

    def zeros(*shape: int, dtype: DTypeLike = dtype) -> Array:
        return jnp.zeros((batch, *shape), dtype)

    def state() -> MambaState:
        ssm = zeros(config.mamba_heads, config.mamba_head_dim, config.d_state, dtype=at_least_fp32(dtype))
        past = config.d_conv - 1
        return MambaState(conv_x=zeros(past, config.inner_size), conv_bc=zeros(past, config.bc_size), ssm=ssm)

    def keys() -> Array:
        return zeros(config.kv_heads, capacity, config.attention_head_dim, dtype=stored_dtype(dtype))

    cache = Cache(
        mamba=tuple(state() for _ in range(config.num_layers)),
        attention=tuple(KVCache(k=keys(), v=keys()) for _ in range(config.num_calls)),
        lengths=jnp.zeros(batch, jnp.int32),
    )
    return placed(cache)


def placed(cache: Cache) -> Cache:
    """The cache, its heads divided over the mesh that is set, and its rows as in `divided.row_axes`."""
    rows, _ = row_axes(len(cache.lengths), cached=True)

    def state(of: MambaState) -> MambaState:
        return MambaState(
            conv_x=constrain(of.conv_x, rows, None, "inner"),
            conv_bc=constrain(of.conv_bc, rows, None, None),
            ssm=constrain(of.ssm, rows, "heads", None, None),
        )

    def keys(array: Array) -> Array:
        return constrain(array, rows, "attention_heads", None, None)

    return Cache(
        mamba=tuple(map(state, cache.mamba)),
        attention=tuple(KVCache(k=keys(of.k), v=keys(of.v)) for of in cache.attention),
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


class CacheBytes(NamedTuple):
    """The size of a cache.

    Attributes:
        constant: bytes of the convolution and SSM states and the lengths, however many tokens the rows hold.
        per_token: bytes of the keys and values of one token in every row.
        total: constant + capacity * per_token.
    """

    constant: int
    per_token: int
    total: int


def cache_bytes(config: Zamba2Config, batch: int, capacity: int, dtype: DTypeLike = jnp.float32) -> CacheBytes:
    """The bytes that `init_cache` takes with the same arguments, without taking them.

    Per row, with w bytes in `dtype` and s in the SSM state (4, or 8 in float64):
    layers * ((d_conv - 1) * (e + 2 g n) * w + h * p * n * s) + 4, and calls * 2 * kv * p' * w for each token of the
    capacity, where p' is the head size of attention. A transformer of the same depth has a term per token for each of
    its layers; here it is one for each call of a shared block.
    """
    size = jnp.dtype(dtype).itemsize
    conv = (config.d_conv - 1) * (config.inner_size + config.bc_size) * size
    ssm = config.mamba_heads * config.mamba_head_dim * config.d_state * at_least_fp32(dtype).itemsize
    constant = batch * (config.num_layers * (conv + ssm) + jnp.dtype(jnp.int32).itemsize)
    per_token = batch * config.num_calls * 2 * config.kv_size * size
    return CacheBytes(constant, per_token, constant + capacity * per_token)

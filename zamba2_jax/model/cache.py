"""What a model carries from one token to the next: immutable values, returned anew by every call."""

import jax.numpy as jnp
from flax import struct

from zamba2_jax.config import Zamba2Config
from zamba2_jax.typing import Array, DTypeLike, Float, Int, at_least_fp32


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
    """Keys (already rotated) and values of one call of a shared block; slot i holds token i of the row."""

    k: Float[Array, "b u kv p"]
    v: Float[Array, "b u kv p"]


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
        return self.attention[0].k.shape[1]


def init_cache(config: Zamba2Config, batch: int, capacity: int, dtype: DTypeLike = jnp.float32) -> Cache:
    """An empty cache for `batch` rows of at most `capacity` tokens, in compute dtype `dtype`."""

    def zeros(*shape: int) -> Array:
        return jnp.zeros((batch, *shape), dtype)

    state = MambaState(
        conv_x=zeros(config.d_conv - 1, config.inner_size),
        conv_bc=zeros(config.d_conv - 1, config.bc_size),
        ssm=zeros(config.mamba_heads, config.mamba_head_dim, config.d_state).astype(at_least_fp32(dtype)),
    )
    kv_shape = (capacity, config.kv_heads, config.attention_head_dim)
    return Cache(
        mamba=(state,) * config.num_layers,
        attention=(KVCache(k=zeros(*kv_shape), v=zeros(*kv_shape)),) * config.num_calls,
        lengths=jnp.zeros(batch, jnp.int32),
    )

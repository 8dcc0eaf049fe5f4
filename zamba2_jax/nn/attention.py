"""Causal attention with grouped KV heads (arXiv:2305.13245), rotated, perhaps in a sliding window."""

from functools import partial

import jax.numpy as jnp
from flax import nnx

from zamba2_jax.nn.cache import KVCache
from zamba2_jax.nn.config import AttentionConfig
from zamba2_jax.nn.context import Context
from zamba2_jax.nn.linear import linear
from zamba2_jax.nn.parameter import Rngs, bias, normal, param
from zamba2_jax.parallel.sharded_ops import cached_attention, causal_attention, window_attention
from zamba2_jax.typing import Array, DTypeLike, Float


class Attention(nnx.Module):
    """Project to q, k and v, rotate q and k, attend, project back."""

    def __init__(self, config: AttentionConfig, *, rngs: Rngs, dtype: DTypeLike = jnp.float32):
        d, size, kv_size = config.hidden_size, config.attention_size, config.kv_size
        matrix, heads = normal(config.initializer_range), "attention_heads"

        def optional_bias(size: int, axis: str | None) -> nnx.Param[Array] | None:
            return bias(rngs, size, dtype, axis) if config.attention_bias else None

        self.config = config
        self.q = param(rngs, matrix, (size, d), (heads, "d_model"), dtype)
        self.k = param(rngs, matrix, (kv_size, d), (heads, "d_model"), dtype)
        self.v = param(rngs, matrix, (kv_size, d), (heads, "d_model"), dtype)
        self.o = param(rngs, matrix, (d, size), ("d_model", heads), dtype)
        self.q_bias, self.o_bias = optional_bias(size, heads), optional_bias(d, None)
        self.k_bias, self.v_bias = optional_bias(kv_size, heads), optional_bias(kv_size, heads)

    def __call__(
        self, x: Float[Array, "b t d"], cache: KVCache | None, context: Context
    ) -> tuple[Float[Array, "b t d"], KVCache | None]:
        """Attention within the rows, or, with a cache, to what it holds and the rows add to it; and the cache after."""
        c, tap, backend = self.config, context.tap, context.backend
        project = partial(linear, backend=backend)
        qkv = (project(x, self.q, self.q_bias), project(x, self.k, self.k_bias), project(x, self.v, self.v_bias))
        q, k, v = (y.reshape(*y.shape[:-1], -1, c.attention_head_dim) for y in qkv)
        q, k = (backend.rotate(y, context.positions, c.rope_frequencies) for y in (q, k))
        y, cache = _attend(tap("q", q), tap("k", k), tap("v", v), cache, c, context)
        return tap("output", project(y.reshape(*x.shape[:2], -1), self.o, self.o_bias)), cache


def _attend(
    q: Float[Array, "b t h p"],
    k: Float[Array, "b t kv p"],
    v: Float[Array, "b t kv p"],
    cache: KVCache | None,
    config: AttentionConfig,
    context: Context,
) -> tuple[Float[Array, "b t h p"], KVCache | None]:
    """What the heads give, and the cache with the new keys and values."""
    ids, scale, backend = context.segment_ids, config.attention_scale, context.backend
    if cache is None:
        return causal_attention(q, k, v, scale, ids, backend, config.sliding_window), None
    real = jnp.ones(context.positions.shape, bool) if ids is None else ids != 0
    of_tokens = q, k, v, cache.k, cache.v, context.positions, real, scale
    y, *kv = cached_attention(*of_tokens, backend) if cache.window is None else window_attention(*of_tokens)
    return y, cache.replace(k=kv[0], v=kv[1])

"""The shared transformer block and what each call of it owns (arXiv:2411.15242, section 2).

Every call of a block reads [residual, embedding], so that half of the input of q, k and v is the same each time but for
the factor of the norm, one number per token. Their matrices are held in two halves, and `SharedBlock.project_embedded`
has the products with the second once for all calls: for 1.2B with its six calls that saves 7 % of a pass.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from zamba2_jax.nn.cache import KVCache
from zamba2_jax.nn.config import HybridConfig
from zamba2_jax.nn.context import Context
from zamba2_jax.nn.linear import linear
from zamba2_jax.nn.parameter import Rngs, bias, norm_scale, normal, param
from zamba2_jax.ops.backend import Backend
from zamba2_jax.ops.norm import inverse_rms
from zamba2_jax.ops.placement import rounded
from zamba2_jax.parallel.sharded_ops import cached_attention, causal_attention
from zamba2_jax.typing import Array, DTypeLike, Float, at_least_fp32


class EmbeddedQKV(NamedTuple):
    """What the embeddings, the second half of a block's input, add to its q, k and v."""

    q: Float[Array, "b t _"]
    k: Float[Array, "b t _"]
    v: Float[Array, "b t _"]


class AttentionAdapters(nnx.Module):
    """Low-rank terms x a.T b.T on q, k and v. There is no scale: these adapters are part of the pretrained model."""

    def __init__(self, config: HybridConfig, *, rngs: Rngs, dtype: DTypeLike = jnp.float32):
        matrix = normal(config.initializer_range)
        into = ((config.adapter_rank, config.attention_size), ("rank", "attention_in"))
        out_of_q = ((config.attention_size, config.adapter_rank), ("adapter_out", "rank"))
        out_of_kv = ((config.kv_size, config.adapter_rank), ("adapter_out", "rank"))
        self.q_a = param(rngs, matrix, *into, dtype)
        self.q_b = param(rngs, matrix, *out_of_q, dtype)
        self.k_a = param(rngs, matrix, *into, dtype)
        self.k_b = param(rngs, matrix, *out_of_kv, dtype)
        self.v_a = param(rngs, matrix, *into, dtype)
        self.v_b = param(rngs, matrix, *out_of_kv, dtype)


class MLPAdapter(nnx.Module):
    """Low-rank terms on gate and up of the MLP, whose first matrix they share."""

    def __init__(self, config: HybridConfig, *, rngs: Rngs, dtype: DTypeLike = jnp.float32):
        d, f, a = config.hidden_size, config.ffn_size, config.adapter_rank
        matrix = normal(config.initializer_range)
        self.a = param(rngs, matrix, (a, d), ("rank", "d_model"), dtype)
        self.gate_b = param(rngs, matrix, (f, a), ("adapter_out", "rank"), dtype)
        self.up_b = param(rngs, matrix, (f, a), ("adapter_out", "rank"), dtype)


class SharedCall(nnx.Module):
    """What one call of a shared block does not share: its adapters and the linear map after it."""

    def __init__(self, config: HybridConfig, *, rngs: Rngs, dtype: DTypeLike = jnp.float32):
        d, matrix = config.hidden_size, normal(config.initializer_range)
        self.attention = AttentionAdapters(config, rngs=rngs, dtype=dtype) if config.attention_adapters else None
        self.mlp = MLPAdapter(config, rngs=rngs, dtype=dtype) if config.adapter_rank else None
        self.linear = param(rngs, matrix, (d, d), (None, "d_model"), dtype)


class SharedAttention(nnx.Module):
    """Causal attention from [residual, embedding], of width 2d, to width d."""

    def __init__(self, config: HybridConfig, *, rngs: Rngs, dtype: DTypeLike = jnp.float32):
        d, size, matrix = config.hidden_size, config.attention_size, normal(config.initializer_range)
        to_q = ((size, d), ("attention_heads", "d_model"))
        to_kv = ((config.kv_size, d), ("attention_heads", "d_model"))
        self.config = config
        self.q_residual = param(rngs, matrix, *to_q, dtype)
        self.k_residual = param(rngs, matrix, *to_kv, dtype)
        self.v_residual = param(rngs, matrix, *to_kv, dtype)
        self.q_embedded = param(rngs, matrix, *to_q, dtype)
        self.k_embedded = param(rngs, matrix, *to_kv, dtype)
        self.v_embedded = param(rngs, matrix, *to_kv, dtype)
        self.o = param(rngs, matrix, (d, size), ("d_model", "attention_heads"), dtype)

    def __call__(
        self,
        x: Float[Array, "b t attention_in"],
        embedded_qkv: EmbeddedQKV,
        adapters: AttentionAdapters | None,
        cache: KVCache | None,
        context: Context,
    ) -> tuple[Float[Array, "b t d"], KVCache | None]:
        """Attention within the rows, or, with a cache, to all that the cache holds and the rows add to it.

        `embedded_qkv` is what `project_embedded` gives for the second half of x.
        """
        c, residual, backend = self.config, x[..., : self.config.hidden_size], context.backend
        project, wide = partial(linear, backend=backend), at_least_fp32(x.dtype)
        q = (project(residual, self.q_residual, dtype=wide) + embedded_qkv.q).astype(x.dtype)
        k = (project(residual, self.k_residual, dtype=wide) + embedded_qkv.k).astype(x.dtype)
        v = (project(residual, self.v_residual, dtype=wide) + embedded_qkv.v).astype(x.dtype)
        if adapters is not None:
            q += project(project(x, adapters.q_a), adapters.q_b)
            k += project(project(x, adapters.k_a), adapters.k_b)
            v += project(project(x, adapters.v_a), adapters.v_b)
        q, k, v = (y.reshape(*y.shape[:-1], -1, c.attention_head_dim) for y in rounded((q, k, v)))
        if c.rotary_base is not None:
            q, k = (backend.rotate(y, context.positions, c.rotary_base) for y in (q, k))
        tap = context.tap
        q, k, v = tap("q", q), tap("k", k), tap("v", v)
        if cache is None:
            y = causal_attention(q, k, v, c.attention_scale, context.segment_ids, backend)
        else:
            ids = context.segment_ids
            real = jnp.ones(context.positions.shape, bool) if ids is None else ids != 0
            y, *kv = cached_attention(q, k, v, cache.k, cache.v, context.positions, real, c.attention_scale, backend)
            cache = KVCache(k=kv[0], v=kv[1])
        return tap("output", project(y.reshape(x.shape), self.o)), cache

    def project_embedded(self, x: Float[Array, "b t d"], backend: Backend) -> EmbeddedQKV:
        """The products of x, the second half of an input, in at least float32."""
        project = partial(linear, x, backend=backend, dtype=at_least_fp32(x.dtype))
        return EmbeddedQKV(q=project(self.q_embedded), k=project(self.k_embedded), v=project(self.v_embedded))


class SharedMLP(nnx.Module):
    """Gated MLP with the exact GELU: down(gelu(gate x) * up x)."""

    def __init__(self, config: HybridConfig, *, rngs: Rngs, dtype: DTypeLike = jnp.float32):
        d, f = config.hidden_size, config.ffn_size
        matrix = normal(config.initializer_range)
        self.gate = param(rngs, matrix, (f, d), ("ffn", "d_model"), dtype)
        self.up = param(rngs, matrix, (f, d), ("ffn", "d_model"), dtype)
        self.down = param(rngs, matrix, (d, f), ("d_model", "ffn"), dtype)
        self.gate_bias = bias(rngs, f, dtype, "ffn") if config.shared_mlp_bias else None
        self.up_bias = bias(rngs, f, dtype, "ffn") if config.shared_mlp_bias else None
        self.down_bias = bias(rngs, d, dtype) if config.shared_mlp_bias else None

    def __call__(self, x: Float[Array, "b t d"], adapter: MLPAdapter | None, context: Context) -> Float[Array, "b t d"]:
        """The MLP with the adapter of a call."""
        project, tap = partial(linear, backend=context.backend), context.tap
        gate, up = project(x, self.gate, self.gate_bias), project(x, self.up, self.up_bias)
        if adapter is not None:
            low = project(x, adapter.a)
            gate, up = gate + project(low, adapter.gate_b), up + project(low, adapter.up_b)
        gate, up = tap("gate", gate), tap("up", up)
        inner = tap("inner", context.backend.geglu(gate, up))
        return tap("output", project(inner, self.down, self.down_bias))


class SharedBlock(nnx.Module):
    """Attention, then a gated MLP, on [residual, embedding]. There is no residual connection inside."""

    def __init__(self, config: HybridConfig, *, rngs: Rngs, dtype: DTypeLike = jnp.float32):
        self.config = config
        self.norm = norm_scale(rngs, config.attention_size, dtype)
        self.attention = SharedAttention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = norm_scale(rngs, config.hidden_size, dtype)
        self.mlp = SharedMLP(config, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        h: Float[Array, "b t d"],
        embedded: Float[Array, "b t d"],
        embedded_qkv: EmbeddedQKV,
        call: SharedCall,
        cache: KVCache | None,
        context: Context,
    ) -> tuple[Float[Array, "b t d"], KVCache | None]:
        """One call of the block: the term it gives to its layer, and the call's cache, if it has one, after it.

        Args:
            h: the residual stream.
            embedded: the model's input embeddings.
            embedded_qkv: what `project_embedded` gives for them.
            call: what this call owns.
            cache: the call's keys and values so far.
            context: what all layers share.
        """
        eps, tap, backend = self.config.rms_norm_eps, context.tap, context.backend
        both = jnp.concatenate([h, embedded], axis=-1)
        normed = backend.rms_norm(both, self.norm[...], eps)
        x = tap("input", normed)
        if x is normed:
            inverse = inverse_rms(both, eps)
            embedded_qkv = EmbeddedQKV(
                q=inverse * embedded_qkv.q, k=inverse * embedded_qkv.k, v=inverse * embedded_qkv.v
            )
        else:  # a tap has put something else in its place
            embedded_qkv = self.attention.project_embedded(x[..., self.config.hidden_size :], backend)
        x, cache = self.attention(x, embedded_qkv, call.attention, cache, context.scoped("attention"))
        x = self.mlp(backend.rms_norm(x, self.mlp_norm[...], eps), call.mlp, context.scoped("mlp"))
        return tap("output", linear(x, call.linear, backend=backend)), cache

    def project_embedded(self, embedded: Float[Array, "b t d"], backend: Backend) -> EmbeddedQKV:
        """What the embeddings add to q, k and v at every call, but for the factor of its norm."""
        scaled = embedded * self.norm[...][self.config.hidden_size :]
        return self.attention.project_embedded(scaled.astype(embedded.dtype), backend)

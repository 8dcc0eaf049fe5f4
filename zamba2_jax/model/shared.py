"""The shared transformer block and what each call of it owns (arXiv:2411.15242, section 2).

Every call of a block reads [residual, embedding], so that half of the input of q, k and v is the same each time but for
the factor of the norm, one number per token. Their matrices are held in two halves, and `SharedBlock.project_embedded`
has the products with the second once for all calls: for 1.2B with its six calls that saves 7 % of a pass.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from zamba2_jax.config import Zamba2Config
from zamba2_jax.model.cache import KVCache
from zamba2_jax.model.divided import cached_attention, causal_attention
from zamba2_jax.model.parameter import Rngs, norm_scale, normal, optional_bias, param, value
from zamba2_jax.model.tap import Tap, no_tap, scoped
from zamba2_jax.ops.geglu import geglu
from zamba2_jax.ops.linear import adapter, linear
from zamba2_jax.ops.norm import inverse_rms, rms_norm
from zamba2_jax.ops.placement import platform
from zamba2_jax.ops.rope import rotate
from zamba2_jax.typing import Array, DTypeLike, Float, Int, at_least_fp32

Projected = Sequence[Float[Array, "b t _"]]
"""What the second half of the input adds to q, k and v."""


class AttentionAdapters(nnx.Module):
    """Low-rank terms on q, k and v."""

    def __init__(self, config: Zamba2Config, *, rngs: Rngs, dtype: DTypeLike = jnp.float32):
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


class SharedCall(nnx.Module):
    """What one call of a shared block does not share: its adapters and the linear map after it."""

    def __init__(self, config: Zamba2Config, *, rngs: Rngs, dtype: DTypeLike = jnp.float32):
        d, f, a = config.hidden_size, config.ffn_size, config.adapter_rank
        matrix = normal(config.initializer_range)
        self.attention = AttentionAdapters(config, rngs=rngs, dtype=dtype) if config.attention_adapters else None
        self.mlp_a = param(rngs, matrix, (a, d), ("rank", "d_model"), dtype)
        self.gate_b = param(rngs, matrix, (f, a), ("adapter_out", "rank"), dtype)
        self.up_b = param(rngs, matrix, (f, a), ("adapter_out", "rank"), dtype)
        self.linear = param(rngs, matrix, (d, d), (None, "d_model"), dtype)


class SharedAttention(nnx.Module):
    """Causal attention from [residual, embedding], of width 2d, to width d."""

    def __init__(self, config: Zamba2Config, *, rngs: Rngs, dtype: DTypeLike = jnp.float32):
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
        projected: Projected,
        adapters: AttentionAdapters | None,
        positions: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"] | None = None,
        cache: KVCache | None = None,
        *,
        tap: Tap = no_tap,
    ) -> tuple[Float[Array, "b t d"], KVCache | None]:
        """Attention within the rows, or, with a cache, to all that the cache holds and the rows add to it.

        `projected` is what `project_embedded` gives for the second half of x.
        """
        c, residual = self.config, x[..., : self.config.hidden_size]
        q, k, v = (
            (linear(residual, w[...], dtype=at_least_fp32(x.dtype)) + added).astype(x.dtype)
            for w, added in zip((self.q_residual, self.k_residual, self.v_residual), projected, strict=True)
        )
        if adapters is not None:
            q += adapter(x, adapters.q_a[...], adapters.q_b[...])
            k += adapter(x, adapters.k_a[...], adapters.k_b[...])
            v += adapter(x, adapters.v_a[...], adapters.v_b[...])
        if platform() == "tpu":  # or XLA rearranges their sums in float32, by heads, before it rounds them
            q, k, v = jax.lax.optimization_barrier((q, k, v))
        q, k, v = (y.reshape(*y.shape[:-1], -1, c.attention_head_dim) for y in (q, k, v))
        if c.use_rope:
            q, k = rotate(q, positions, c.rope_theta), rotate(k, positions, c.rope_theta)
        q, k, v = tap("q", q), tap("k", k), tap("v", v)
        if cache is None:
            y = causal_attention(q, k, v, c.attention_scale, segment_ids)
        else:
            real = jnp.ones(positions.shape, bool) if segment_ids is None else segment_ids != 0
            y, *kv = cached_attention(q, k, v, cache.k, cache.v, positions, real, c.attention_scale)
            cache = KVCache(k=kv[0], v=kv[1])
        return tap("output", linear(y.reshape(x.shape), self.o[...])), cache

    def project_embedded(self, x: Float[Array, "b t d"]) -> Projected:
        """The products of x, the second half of an input, in at least float32."""
        weights = (self.q_embedded, self.k_embedded, self.v_embedded)
        return [linear(x, w[...], dtype=at_least_fp32(x.dtype)) for w in weights]


class SharedMLP(nnx.Module):
    """Gated MLP with the exact GELU: down(gelu(gate x) * up x)."""

    def __init__(self, config: Zamba2Config, *, rngs: Rngs, dtype: DTypeLike = jnp.float32):
        d, f = config.hidden_size, config.ffn_size
        matrix = normal(config.initializer_range)
        self.gate = param(rngs, matrix, (f, d), ("ffn", "d_model"), dtype)
        self.up = param(rngs, matrix, (f, d), ("ffn", "d_model"), dtype)
        self.down = param(rngs, matrix, (d, f), ("d_model", "ffn"), dtype)
        self.gate_bias = optional_bias(config, rngs, f, dtype, "ffn")
        self.up_bias = optional_bias(config, rngs, f, dtype, "ffn")
        self.down_bias = optional_bias(config, rngs, d, dtype)

    def __call__(self, x: Float[Array, "b t d"], call: SharedCall, *, tap: Tap = no_tap) -> Float[Array, "b t d"]:
        """The MLP with the adapters of `call`."""
        low = linear(x, call.mlp_a[...])
        gate = linear(x, self.gate[...], value(self.gate_bias)) + linear(low, call.gate_b[...])
        up = linear(x, self.up[...], value(self.up_bias)) + linear(low, call.up_b[...])
        gate, up = tap("gate", gate), tap("up", up)
        inner = tap("inner", geglu(gate, up))
        return tap("output", linear(inner, self.down[...], value(self.down_bias)))


class SharedBlock(nnx.Module):
    """Attention, then a gated MLP, on [residual, embedding]. There is no residual connection inside."""

    def __init__(self, config: Zamba2Config, *, rngs: Rngs, dtype: DTypeLike = jnp.float32):
        self.config = config
        self.norm = norm_scale(rngs, config.attention_size, dtype)
        self.attention = SharedAttention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = norm_scale(rngs, config.hidden_size, dtype)
        self.mlp = SharedMLP(config, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        h: Float[Array, "b t d"],
        embedded: Float[Array, "b t d"],
        projected: Projected,
        call: SharedCall,
        positions: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"] | None = None,
        cache: KVCache | None = None,
        *,
        tap: Tap = no_tap,
    ) -> tuple[Float[Array, "b t d"], KVCache | None]:
        """One call of the block: the term it gives to its layer, and the call's cache, if it has one, after it.

        Args:
            h: the residual stream.
            embedded: the model's input embeddings.
            projected: what `project_embedded` gives for them.
            call: what this call owns.
            positions: of the tokens in their documents; with a cache also the slots they take.
            segment_ids: documents; with a cache only their padding is read.
            cache: the call's keys and values so far.
        """
        eps = self.config.rms_norm_eps
        both = jnp.concatenate([h, embedded], axis=-1)
        normed = rms_norm(both, self.norm[...], eps)
        x = tap("input", normed)
        if x is normed:
            inverse = inverse_rms(both, eps)
            projected = [inverse * added for added in projected]
        else:  # a tap has put something else in its place
            projected = self.attention.project_embedded(x[..., self.config.hidden_size :])
        attend = scoped(tap, "attention")
        x, cache = self.attention(x, projected, call.attention, positions, segment_ids, cache, tap=attend)
        x = self.mlp(rms_norm(x, self.mlp_norm[...], eps), call, tap=scoped(tap, "mlp"))
        return tap("output", linear(x, call.linear[...])), cache

    def project_embedded(self, embedded: Float[Array, "b t d"]) -> Projected:
        """What the embeddings add to q, k and v at every call, but for the factor of its norm."""
        scaled = embedded * self.norm[...][self.config.hidden_size :]
        return self.attention.project_embedded(scaled.astype(embedded.dtype))

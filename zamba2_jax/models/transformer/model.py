"""Dense transformers: a stack of attention and gated MLPs."""

import jax.numpy as jnp
from flax import nnx

from zamba2_jax.models.base import LanguageModel
from zamba2_jax.models.transformer.config import TransformerConfig
from zamba2_jax.nn.attention import Attention
from zamba2_jax.nn.cache import KVCache
from zamba2_jax.nn.context import Context
from zamba2_jax.nn.mlp import GatedMLP
from zamba2_jax.nn.parameter import Rngs, norm_scale, normal
from zamba2_jax.typing import Array, DTypeLike, Float


class TransformerLayer(nnx.Module):
    """h + attention(norm(h)), and then h + mlp(norm(h)) of that."""

    def __init__(self, config: TransformerConfig, *, rngs: Rngs, dtype: DTypeLike = jnp.float32):
        d, f, matrix = config.hidden_size, config.ffn_size, normal(config.initializer_range)
        self.config = config
        self.norm = norm_scale(rngs, d, dtype)
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = norm_scale(rngs, d, dtype)
        self.mlp = GatedMLP(d, f, biases=config.mlp_bias, matrix=matrix, rngs=rngs, dtype=dtype)

    def __call__(
        self, h: Float[Array, "b t d"], shared_output: None, cache: KVCache | None, context: Context
    ) -> tuple[Float[Array, "b t d"], KVCache | None]:
        """The layer over whole rows, or, with a cache, over what comes next in each, and the cache after it."""
        eps, tap, backend = self.config.rms_norm_eps, context.tap, context.backend
        x = tap("attention.input", backend.rms_norm(h, self.norm[...], eps))
        x, cache = self.attention(x, cache, context.scoped("attention"))
        h += x
        x = tap("mlp.input", backend.rms_norm(h, self.mlp_norm[...], eps))
        return h + self.mlp(x, context.scoped("mlp")), cache


class Transformer(LanguageModel):
    """A dense transformer, such as Llama (arXiv:2302.13971) and Mistral (arXiv:2310.06825)."""

    config: TransformerConfig
    layer = TransformerLayer
    mixer_outputs = ("attention.output",)

    @classmethod
    def layer_state(cls, config: TransformerConfig, layer: int, batch: int, capacity: int, dtype: DTypeLike) -> KVCache:
        """No keys and values yet."""
        sizes = batch, config.kv_heads, capacity, config.attention_head_dim
        return KVCache.zeros(*sizes, dtype, config.sliding_window)

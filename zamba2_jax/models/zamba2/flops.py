"""How much arithmetic Zamba2 asks for, by formula."""

from zamba2_jax.models.flops import ForwardFlops, PartFlops
from zamba2_jax.models.mamba2.flops import mixer_flops
from zamba2_jax.models.zamba2.config import Zamba2Config
from zamba2_jax.nn.config import HybridConfig


def forward_flops(config: Zamba2Config, length: int) -> ForwardFlops:
    """FLOPs that a forward pass takes per token, in rows of `length` tokens; matrix products and the convolution only.

    Two for each multiplication and addition, over layers and calls, letters as in `zamba2_jax.typing`:

        Mamba2 layer      `mixer_flops`
        call of a block   2 d (2d + 2 kv) + 2 (2d) d                     q, k, v and o; kv is the width of k and of v
                        + 4 (2d) t                                       scores and values against all t tokens
                        + 2 (3 d f + d d)                                MLP, and the map after it
                        + 2 (d a + 2 a f)                                adapter of the MLP
                        + 2 (3 (2d) a + a (2d + 2 kv))                   adapters of q, k and v, where there are any
        shared block      2 d (2d + 2 kv)                                q, k and v of the embeddings, for all its calls
        head              2 d v

    Attention is counted as dense, the half that a causal mask hides included (arXiv:2204.02311, appendix B).
    """
    d, f, a, kv = config.hidden_size, config.ffn_size, config.adapter_rank, config.kv_size
    attention_adapters = 2 * (6 * d * a + a * (2 * d + 2 * kv)) if config.attention_adapters else 0
    adapters = PartFlops(config.num_calls * (2 * (d * a + 2 * a * f) + attention_adapters))
    return ForwardFlops(
        layers={"mixers": mixer_flops(config, length), **call_flops(config, length), "adapters": adapters},
        ends={"embedded_qkv": embedded_qkv_flops(config), "head": 2 * d * config.vocab_size},
    )


def call_flops(config: HybridConfig, length: int) -> dict[str, PartFlops]:
    """Of all calls of shared blocks, per token, by part, without adapters."""
    d, calls = config.hidden_size, config.num_calls
    qkv = 2 * d * (2 * d + 2 * config.kv_size)
    return {
        "attention": PartFlops(calls * (qkv + 4 * d * d), calls * 8 * d * length),
        "mlp": PartFlops(calls * 6 * d * config.ffn_size),
        "linears": PartFlops(calls * 2 * d * d),
    }


def embedded_qkv_flops(config: HybridConfig) -> int:
    """Of q, k and v of the embeddings, which each shared block has once for all its calls."""
    return config.num_shared_blocks * 2 * config.hidden_size * (2 * config.hidden_size + 2 * config.kv_size)

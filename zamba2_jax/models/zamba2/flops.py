"""How much arithmetic Zamba2 asks for, by formula."""

from zamba2_jax.models.flops import ForwardFlops, PartFlops
from zamba2_jax.models.zamba2.config import Zamba2Config

SSD_CHUNK = 128
"""Tokens per chunk that the scan is counted with: a plain constant, so that speeds compare across implementations."""


def forward_flops(config: Zamba2Config, length: int) -> ForwardFlops:
    """FLOPs that a forward pass takes per token, in rows of `length` tokens; matrix products and the convolution only.

    Two for each multiplication and addition, over layers and calls, letters as in `zamba2_jax.typing`:

        Mamba2 layer      2 d (2e + 2gn + h) + 2 k (e + 2gn) + 2 e d     projections in, convolution, projection out
                        + 2 (g n + e) s + 4 e n                          scan: within a chunk of s tokens, and states
        call of a block   2 d (2d + 2 kv) + 2 (2d) d                     q, k, v and o; kv is the width of k and of v
                        + 4 (2d) t                                       scores and values against all t tokens
                        + 2 (3 d f + d d)                                MLP, and the map after it
                        + 2 (d a + 2 a f)                                adapter of the MLP
                        + 2 (3 (2d) a + a (2d + 2 kv))                   adapters of q, k and v, where there are any
        shared block      2 d (2d + 2 kv)                                q, k and v of the embeddings, for all its calls
        head              2 d v

    Attention is counted as dense, the half that a causal mask hides included (arXiv:2204.02311, appendix B).
    """
    d, e, f, a, v = config.hidden_size, config.inner_size, config.ffn_size, config.adapter_rank, config.vocab_size
    n, h, g, k, bc = config.d_state, config.mamba_heads, config.ngroups, config.d_conv, config.bc_size
    kv, s = config.kv_size, min(SSD_CHUNK, length)
    attention_adapters = 2 * (6 * d * a + a * (2 * d + 2 * kv)) if config.attention_adapters else 0
    qkv = 2 * d * (2 * d + 2 * kv)
    layers, calls = config.num_layers, config.num_calls
    return ForwardFlops(
        layers={
            "mixers": PartFlops(
                layers * (2 * d * (2 * e + bc + h) + 2 * e * d),
                layers * (2 * k * (e + bc) + 2 * (g * n + e) * s + 4 * e * n),
            ),
            "attention": PartFlops(calls * (qkv + 4 * d * d), calls * 8 * d * length),
            "mlp": PartFlops(calls * 6 * d * f),
            "adapters": PartFlops(calls * (2 * (d * a + 2 * a * f) + attention_adapters)),
            "linears": PartFlops(calls * 2 * d * d),
        },
        ends={"embedded_qkv": config.num_shared_blocks * qkv, "head": 2 * d * v},
    )

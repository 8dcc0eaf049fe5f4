"""How much arithmetic a dense transformer asks for, by formula."""

from zamba2_jax.models.flops import ForwardFlops, PartFlops
from zamba2_jax.models.transformer.config import TransformerConfig


def forward_flops(config: TransformerConfig, length: int) -> ForwardFlops:
    """FLOPs that a forward pass takes per token, in rows of `length` tokens; matrix products only.

    Two for each multiplication and addition, over all layers, letters as in `zamba2_jax.typing`, hp and kv being the
    widths of q and of k and v:

        attention   2 d (hp + 2 kv) + 2 hp d    q, k, v and o
                  + 4 hp t                      scores and values against all t tokens, or those of the sliding window
        MLP         2 (3 d f)
        head        2 d v

    Attention is counted as dense, the half that a causal mask hides included (arXiv:2204.02311, appendix B).
    """
    d, f, v, layers = config.hidden_size, config.ffn_size, config.vocab_size, config.num_layers
    size, kv_size = config.attention_size, config.kv_size
    seen = length if config.sliding_window is None else min(length, config.sliding_window)
    return ForwardFlops(
        layers={
            "attention": PartFlops(layers * (2 * d * (size + 2 * kv_size) + 2 * size * d), layers * 4 * size * seen),
            "mlp": PartFlops(layers * 6 * d * f),
        },
        ends={"head": 2 * d * v},
    )

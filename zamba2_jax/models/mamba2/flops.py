"""How much arithmetic Mamba2 asks for, by formula."""

from zamba2_jax.models.flops import ForwardFlops, PartFlops
from zamba2_jax.models.mamba2.config import Mamba2LMConfig
from zamba2_jax.nn.config import Mamba2Config

SSD_CHUNK = 128
"""Tokens per chunk that the scan is counted with: a plain constant, so that speeds compare across implementations."""


def forward_flops(config: Mamba2LMConfig, length: int) -> ForwardFlops:
    """FLOPs that a forward pass takes per token, in rows of `length` tokens: `mixer_flops` and the head, 2 d v."""
    head = 2 * config.hidden_size * config.vocab_size
    return ForwardFlops(layers={"mixers": mixer_flops(config, length)}, ends={"head": head})


def mixer_flops(config: Mamba2Config, length: int) -> PartFlops:
    """FLOPs of the Mamba2 blocks of all layers, per token, in rows of `length` tokens.

    Two for each multiplication and addition, letters as in `zamba2_jax.typing`. A layer has

        2 d (2e + 2gn + h) + 2 k (e + 2gn) + 2 e d     projections in, convolution, projection out
        2 (g n + e) s + 4 e n                          scan: within a chunk of s tokens, and states
    """
    d, e, n, h = config.hidden_size, config.inner_size, config.d_state, config.mamba_heads
    g, k, bc, s = config.ngroups, config.d_conv, config.bc_size, min(SSD_CHUNK, length)
    weights = 2 * d * (2 * e + bc + h) + 2 * e * d
    mixing = 2 * k * (e + bc) + 2 * (g * n + e) * s + 4 * e * n
    return PartFlops(config.num_layers * weights, config.num_layers * mixing)

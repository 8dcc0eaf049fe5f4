"""How much arithmetic a model asks for, and how much of it a device can do.

By formula: the compiler's own count takes the body of each loop once.
"""

from typing import NamedTuple

import jax

from zamba2_jax.config import Zamba2Config
from zamba2_jax.model.stack import Remat

SSD_CHUNK = 128
"""Tokens per chunk that the scan is counted with: a plain constant, so that speeds compare across implementations."""

# Dense bfloat16 FLOP/s by the makers' data sheets; `device_kind` begins with the key, of several the longest.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


class ForwardFlops(NamedTuple):
    """FLOPs of a forward pass per token.

    Attributes:
        weights: products with weights, in the layers and in every call of a shared block.
        mixing: between tokens: the convolution, the scan, scores and values of attention.
        ends: outside the layers: what shared blocks project of the embeddings, and the output head.
    """

    weights: int
    mixing: int
    ends: int


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
    adapters = 2 * (6 * d * a + a * (2 * d + 2 * kv)) if config.attention_adapters else 0
    mamba = 2 * d * (2 * e + bc + h) + 2 * e * d
    qkv = 2 * d * (2 * d + 2 * kv)
    call = qkv + 4 * d * d + 2 * (3 * d * f + d * d) + 2 * (d * a + 2 * a * f) + adapters
    scan = 2 * k * (e + bc) + 2 * (g * n + e) * s + 4 * e * n
    return ForwardFlops(
        weights=config.num_layers * mamba + config.num_calls * call,
        mixing=config.num_layers * scan + config.num_calls * 8 * d * length,
        ends=config.num_shared_blocks * qkv + 2 * d * v,
    )


def train_flops(config: Zamba2Config, length: int) -> int:
    """FLOPs that a training step takes per token: the backward pass is two forward ones; what is recomputed is not."""
    return 3 * sum(forward_flops(config, length))


def executed_flops(config: Zamba2Config, length: int, remat: Remat) -> int:
    """`train_flops` with what is recomputed: what `remat` does not keep."""
    forward = forward_flops(config, length)
    again = {"none": 0, "matmuls": forward.mixing, "layer": forward.weights + forward.mixing}[remat]
    return 3 * sum(forward) + again


def peak_flops(device: jax.Device) -> float | None:
    """FLOP/s that a device can do at most, in bfloat16; None for one that is not in `PEAK_FLOPS`, such as a CPU."""
    known = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
    return PEAK_FLOPS[max(known, key=len)] if known else None

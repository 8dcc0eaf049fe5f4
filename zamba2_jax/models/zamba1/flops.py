"""How much arithmetic Zamba1 asks for, by formula."""

from zamba2_jax.models.flops import ForwardFlops, PartFlops
from zamba2_jax.models.zamba1.config import Zamba1Config
from zamba2_jax.models.zamba2.flops import call_flops, embedded_qkv_flops


def forward_flops(config: Zamba1Config, length: int) -> ForwardFlops:
    """FLOPs that a forward pass takes per token, in rows of `length` tokens; products and the convolution only.

    Two for each multiplication and addition, over layers and calls, letters as in `zamba2_jax.typing`, R being the rank
    of dt. A Mamba1 layer has

        2 d (2e) + 2 e (R + 2n) + 2 R e + 2 e d     projections in, to dt, B and C, to dt of every channel, and out
        2 k e + 6 e n                               convolution; scan: decay and input of a state, and its output

    calls of the shared block what `zamba2.flops` counts, without adapters, and the head 2 d v.
    """
    d, e, n, rank = config.hidden_size, config.inner_size, config.d_state, config.time_step_rank
    weights = 2 * d * 2 * e + 2 * e * config.x_proj_size + 2 * rank * e + 2 * e * d
    mixing, layers = 2 * config.d_conv * e + 6 * e * n, config.num_layers
    return ForwardFlops(
        layers={"mixers": PartFlops(layers * weights, layers * mixing), **call_flops(config, length)},
        ends={"embedded_qkv": embedded_qkv_flops(config), "head": 2 * d * config.vocab_size},
    )

"""Floating-point operations of a training step, by formula: the compiler's own count takes each loop's body once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from zamba2_jax.config import Zamba2Config
from zamba2_jax.model import Zamba2
from zamba2_jax.model.parameter import named_parameters
from zamba2_jax.model.stack import Remat


class ForwardFlops(NamedTuple):
    """Operations of one token's forward pass, two for each multiplication and addition.

    Attributes:
        matrices: products with weights in the layers and the shared blocks, as often as these are called.
        mixing: products of activations: attention to half of the row, and the recurrence of the scan. Its form by
            chunks does more.
        head: the output head.
    """

    matrices: float
    mixing: float
    head: float


def forward_flops(config: Zamba2Config, length: int) -> ForwardFlops:
    """The operations of a token in a row of `length` tokens."""
    calls = [row.hybrid.block for row in config.layer_plan if row.hybrid is not None]
    uses = {f"shared.{block}": calls.count(block) for block in set(calls)}
    model = jax.eval_shape(lambda: Zamba2(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    matrices = 0
    for name, parameter in named_parameters(model).items():
        matrix = parameter.get_value()
        if matrix.ndim == 2 and not name.startswith(("embed", "head")) and ".conv_" not in name:
            matrices += 2 * matrix.size * uses.get(".".join(name.split(".")[:2]), 1)
    scan = 4 * config.inner_size * config.d_state * config.num_layers
    attention = 2 * length * config.attention_size * config.num_calls
    return ForwardFlops(matrices, scan + attention, 2 * config.hidden_size * config.vocab_size)


def model_flops(config: Zamba2Config, batch: int, length: int) -> float:
    """Of a step without anything recomputed: a backward pass takes twice the operations of the forward pass."""
    return 3 * sum(forward_flops(config, length)) * batch * length


def executed_flops(config: Zamba2Config, batch: int, length: int, remat: Remat) -> float:
    """Of a step with what is recomputed: always the logits, and what `remat` does not keep."""
    forward = forward_flops(config, length)
    again = {"none": 0.0, "matmuls": forward.mixing, "layer": forward.matrices + forward.mixing}[remat]
    return (3 * sum(forward) + forward.head + again) * batch * length

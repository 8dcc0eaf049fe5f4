"""The gated MLP."""

from functools import partial

import jax.numpy as jnp
from flax import nnx

from zamba2_jax.nn.context import Context
from zamba2_jax.nn.linear import linear
from zamba2_jax.nn.parameter import Initializer, Rngs, bias, param
from zamba2_jax.typing import Array, DTypeLike, Float


class GatedMLP(nnx.Module):
    """SwiGLU (arXiv:2002.05202): down(silu(gate x) * up x), of width d outside and f inside."""

    def __init__(
        self, d: int, f: int, *, biases: bool, matrix: Initializer, rngs: Rngs, dtype: DTypeLike = jnp.float32
    ):
        self.gate = param(rngs, matrix, (f, d), ("ffn", "d_model"), dtype)
        self.up = param(rngs, matrix, (f, d), ("ffn", "d_model"), dtype)
        self.down = param(rngs, matrix, (d, f), ("d_model", "ffn"), dtype)
        self.gate_bias = bias(rngs, f, dtype, "ffn") if biases else None
        self.up_bias = bias(rngs, f, dtype, "ffn") if biases else None
        self.down_bias = bias(rngs, d, dtype) if biases else None

    def __call__(self, x: Float[Array, "b t d"], context: Context) -> Float[Array, "b t d"]:
        """The MLP, token by token."""
        project, tap = partial(linear, backend=context.backend), context.tap
        gate = tap("gate", project(x, self.gate, self.gate_bias))
        up = tap("up", project(x, self.up, self.up_bias))
        inner = tap("inner", context.backend.swiglu(gate, up))
        return tap("output", project(inner, self.down, self.down_bias))

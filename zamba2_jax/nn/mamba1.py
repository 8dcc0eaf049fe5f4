"""The Mamba1 block (arXiv:2312.00752) with several independent heads (arXiv:2405.16712), and the layer around it."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import ones

from zamba2_jax.nn.cache import Mamba1State
from zamba2_jax.nn.config import Mamba1Config
from zamba2_jax.nn.context import Context
from zamba2_jax.nn.linear import linear
from zamba2_jax.nn.mamba2 import MambaLayer
from zamba2_jax.nn.parameter import (
    Rngs,
    bias,
    inverse_softplus_log_uniform,
    log_one_to,
    normal,
    param,
    uniform,
)
from zamba2_jax.nn.tap import Tap
from zamba2_jax.ops.conv import causal_conv1d_step
from zamba2_jax.parallel.sharded_ops import (
    causal_conv1d,
    project_heads,
    project_to_heads,
    selective_scan,
    selective_scan_step,
)
from zamba2_jax.typing import Array, DTypeLike, Float, at_least_fp32


class Mamba1(nnx.Module):
    """Gated state-space mixer: project, convolve, project each head to its dt, B and C, scan, gate, project back.

    The published `in_proj` holds x and z in alternating rows; here each is its own. What is per head there has the
    channels of all heads one after the other here: columns of `x_proj` [rank + 2n, e], rows of `dt_proj` [e, rank].
    `A_log` is [e n], a vector, since vectors stay in float32. See `models.zamba1.weights` for the mapping.
    """

    def __init__(self, config: Mamba1Config, *, rngs: Rngs, dtype: DTypeLike = jnp.float32):
        d, e, n, rank = config.hidden_size, config.inner_size, config.d_state, config.time_step_rank
        matrix = normal(config.initializer_range)
        dt_init = inverse_softplus_log_uniform(config.time_step_min, config.time_step_max, config.time_step_floor)
        self.config = config
        self.in_x = param(rngs, matrix, (e, d), ("inner", "d_model"), dtype)
        self.in_z = param(rngs, matrix, (e, d), ("inner", "d_model"), dtype)
        self.in_x_bias = bias(rngs, e, dtype, "inner") if config.use_proj_bias else None
        self.in_z_bias = bias(rngs, e, dtype, "inner") if config.use_proj_bias else None
        self.conv_x = param(rngs, matrix, (config.d_conv, e), (None, "inner"), dtype)
        self.conv_x_bias = bias(rngs, e, dtype, "inner") if config.use_conv_bias else None
        self.x_proj = param(rngs, matrix, (config.x_proj_size, e), (None, "channels"), dtype)
        self.dt_proj = param(rngs, uniform(rank**-0.5), (e, rank), ("channels", None), dtype)
        self.dt_bias = param(rngs, dt_init, (e,), ("inner",), dtype)
        self.A_log = param(rngs, log_one_to(n), (e * n,), ("inner",), dtype)
        self.D = param(rngs, ones, (e,), ("inner",), dtype)
        self.out = param(rngs, matrix, (d, e), ("d_model", "inner"), dtype)
        self.out_bias = bias(rngs, d, dtype) if config.use_proj_bias else None

    def __call__(
        self, u: Float[Array, "b t d"], state: Mamba1State | None, context: Context
    ) -> tuple[Float[Array, "b t d"], Mamba1State]:
        """The block over whole rows, from `state` (zeros by default), and the state after them."""
        before_x, before = (None, None) if state is None else (state.conv_x, state.ssm)
        ids, backend = context.segment_ids, context.backend
        z, x = self._project(u, context)
        convolve = partial(causal_conv1d, activation="silu", segment_ids=ids, backend=backend)
        x, conv_x = convolve(x, self.conv_x[...], self._conv_bias(), "inner", initial_state=before_x)
        inputs = self._scan_inputs(x, context, cached=state is not None)
        y, ssm = selective_scan(*inputs, initial_state=before, segment_ids=ids, backend=backend)
        return self._gate_and_project(y, z, context), self._state(conv_x, ssm, context.tap)

    def step(
        self, u: Float[Array, "b d"], state: Mamba1State, context: Context
    ) -> tuple[Float[Array, "b d"], Mamba1State]:
        """The block for one token of every row."""
        z, x = self._project(u, context)
        convolve = partial(causal_conv1d_step, activation="silu", custom_gradient=context.backend.custom_gradients)
        x, conv_x = convolve(x, self.conv_x[...], self._conv_bias(), state.conv_x)
        x, dt, A, B, C, D = self._scan_inputs(x[:, None], context, cached=True)
        y, ssm = selective_scan_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state=state.ssm)
        return self._gate_and_project(y, z, context), self._state(conv_x, ssm, context.tap)

    def _project(self, u: Array, context: Context) -> tuple[Array, Array]:
        """z and x."""
        project = partial(linear, u, backend=context.backend)
        return context.tap("z", project(self.in_z, self.in_z_bias)), project(self.in_x, self.in_x_bias)

    def _conv_bias(self) -> Array:
        """Zeros where there is none."""
        taps = self.conv_x
        return (
            jnp.zeros(taps.shape[1], at_least_fp32(taps.dtype)) if self.conv_x_bias is None else self.conv_x_bias[...]
        )

    def _scan_inputs(self, x: Float[Array, "b t e"], context: Context, *, cached: bool) -> tuple[Array, ...]:
        """The arguments of the scan; dt after its bias and softplus, in at least float32."""
        c, tap, wide = self.config, context.tap, at_least_fp32(x.dtype)
        x = tap("x", x)
        low = project_heads(x, self.x_proj[...], c.mamba_heads, cached=cached, backend=context.backend)
        low, B, C = jnp.split(low, (c.time_step_rank, c.time_step_rank + c.d_state), axis=-1)
        dt = project_to_heads(low, self.dt_proj[...], cached=cached, dtype=wide, backend=context.backend)
        dt = tap("dt", jax.nn.softplus(dt + self.dt_bias[...]))
        A = -jnp.exp(self.A_log[...].astype(wide)).reshape(-1, c.d_state)
        return x, dt, A, tap("B", B), tap("C", C), self.D[...].astype(wide)

    def _gate_and_project(self, y: Array, z: Array, context: Context) -> Array:
        y = context.backend.swiglu(z, context.tap("y", y))
        return context.tap("output", linear(y, self.out, self.out_bias, backend=context.backend))

    def _state(self, conv_x: Array, ssm: Float[Array, "b e n"], tap: Tap) -> Mamba1State:
        """The state; the tap sees that of the recurrence by heads, [b, h, p, n]."""
        by_heads = ssm.reshape(len(ssm), self.config.mamba_heads, -1, ssm.shape[-1])
        return Mamba1State(conv_x=tap("conv_x_state", conv_x), ssm=tap("ssm_state", by_heads).reshape(ssm.shape))


def mamba1_state(config: Mamba1Config, batch: int, dtype: DTypeLike) -> Mamba1State:
    """The state of a block before the first token of `batch` rows, in compute dtype `dtype`."""
    return Mamba1State.zeros(batch, config.d_conv - 1, config.inner_size, config.d_state, dtype)


class Mamba1Layer(MambaLayer):
    """`MambaLayer` with a Mamba1 block."""

    mixer = Mamba1

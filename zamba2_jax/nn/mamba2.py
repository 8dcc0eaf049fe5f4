"""The Mamba2 block (arXiv:2405.21060, section 7) and the layer around it."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import ones

from zamba2_jax.nn.cache import MambaState
from zamba2_jax.nn.config import Mamba2Config, ModelConfig
from zamba2_jax.nn.context import Context
from zamba2_jax.nn.linear import linear
from zamba2_jax.nn.parameter import (
    Rngs,
    bias,
    inverse_softplus_log_uniform,
    log_one_to_n,
    norm_scale,
    normal,
    optional_bias,
    param,
)
from zamba2_jax.nn.tap import Tap
from zamba2_jax.ops.conv import causal_conv1d_step
from zamba2_jax.ops.ssd import ssd_step
from zamba2_jax.parallel.sharded_ops import causal_conv1d, ssd
from zamba2_jax.typing import Array, DTypeLike, Float, at_least_fp32


class Mamba2(nnx.Module):
    """Gated state-space mixer: project, convolve, scan, gate and norm, project back.

    The published `in_proj` and `conv1d` hold several parameters in one matrix; here each part is its own, (B, C) as
    one. See `models.zamba2.weights` for the mapping.
    """

    def __init__(self, config: Mamba2Config, *, rngs: Rngs, dtype: DTypeLike = jnp.float32):
        d, e, h, bc = config.hidden_size, config.inner_size, config.mamba_heads, config.bc_size
        matrix = normal(config.initializer_range)
        dt_init = inverse_softplus_log_uniform(config.time_step_min, config.time_step_max, config.time_step_floor)
        self.config = config
        self.in_z = param(rngs, matrix, (e, d), ("inner", "d_model"), dtype)
        self.in_x = param(rngs, matrix, (e, d), ("inner", "d_model"), dtype)
        self.in_bc = param(rngs, matrix, (bc, d), (None, "d_model"), dtype)
        self.in_dt = param(rngs, matrix, (h, d), ("heads", "d_model"), dtype)
        self.in_z_bias = optional_bias(config, rngs, e, dtype, "inner")
        self.in_x_bias = optional_bias(config, rngs, e, dtype, "inner")
        self.in_bc_bias = optional_bias(config, rngs, bc, dtype)
        self.in_dt_bias = optional_bias(config, rngs, h, dtype, "heads")
        self.conv_x = param(rngs, matrix, (config.d_conv, e), (None, "inner"), dtype)
        self.conv_bc = param(rngs, matrix, (config.d_conv, bc), (None, None), dtype)
        self.conv_x_bias = bias(rngs, e, dtype, "inner") if config.use_conv_bias else None
        self.conv_bc_bias = bias(rngs, bc, dtype) if config.use_conv_bias else None
        self.dt_bias = param(rngs, dt_init, (h,), ("heads",), dtype)
        self.A_log = param(rngs, log_one_to_n, (h,), ("heads",), dtype)
        self.D = param(rngs, ones, (h,), ("heads",), dtype)
        self.norm = norm_scale(rngs, e, dtype, "inner")
        self.out = param(rngs, matrix, (d, e), ("d_model", "inner"), dtype)
        self.out_bias = optional_bias(config, rngs, d, dtype)

    def __call__(
        self, u: Float[Array, "b t d"], state: MambaState | None, context: Context
    ) -> tuple[Float[Array, "b t d"], MambaState]:
        """The block over whole rows, from `state` (zeros by default), and the state after them."""
        before_x, before_bc, before = (None,) * 3 if state is None else (state.conv_x, state.conv_bc, state.ssm)
        z, x, bc, dt = self._project(u, context)
        convolve = partial(causal_conv1d, activation="silu", segment_ids=context.segment_ids, backend=context.backend)
        x_bias, bc_bias = self._conv_biases()
        x, conv_x = convolve(x, self.conv_x[...], x_bias, "inner", initial_state=before_x)
        bc, conv_bc = convolve(bc, self.conv_bc[...], bc_bias, None, initial_state=before_bc)
        inputs = self._scan_inputs(x, dt, bc, context.tap)
        y, ssm = ssd(*inputs, initial_state=before, segment_ids=context.segment_ids, backend=context.backend)
        return self._gate_and_project(y, z, context), _state(conv_x, conv_bc, ssm, context.tap)

    def step(
        self, u: Float[Array, "b d"], state: MambaState, context: Context
    ) -> tuple[Float[Array, "b d"], MambaState]:
        """The block for one token of every row."""
        if not context.tap.is_active and (stepped := self._step_by_kernels(u, state, context)):
            return stepped
        z, x, bc, dt = self._project(u, context)
        convolve = partial(causal_conv1d_step, activation="silu", custom_gradient=context.backend.custom_gradients)
        x_bias, bc_bias = self._conv_biases()
        x, conv_x = convolve(x, self.conv_x[...], x_bias, state.conv_x)
        bc, conv_bc = convolve(bc, self.conv_bc[...], bc_bias, state.conv_bc)
        y, ssm = ssd_step(*self._scan_inputs(x, dt, bc, context.tap), state=state.ssm)
        return self._gate_and_project(y, z, context), _state(conv_x, conv_bc, ssm, context.tap)

    def _step_by_kernels(self, u: Array, state: MambaState, context: Context) -> tuple[Array, MambaState] | None:
        """`step` where there are kernels for it, else None."""
        if context.backend.step != "pallas_gpu" or self.in_z_bias is not None:
            return None
        # Here for the reason that `ops.ssd` gives.
        from zamba2_jax.ops.mamba_step_pallas_gpu import StepWeights, mamba_step_pallas_gpu, step_fits

        weights = [getattr(self, name) for name in StepWeights._fields]
        if not step_fits(u, state.ssm) or not all(isinstance(weight, nnx.Param) for weight in weights):
            return None
        y, conv_x, conv_bc, ssm = mamba_step_pallas_gpu(
            u,
            StepWeights(*(weight[...] for weight in weights)),
            state.conv_x,
            state.conv_bc,
            state.ssm,
            self.config.time_step_limit,
        )
        groups = len(u), self.config.ngroups, -1
        scale = self.norm[...].reshape(groups[1:])
        y = context.backend.rms_norm(y.reshape(groups), scale, self.config.gated_norm_eps).reshape(y.shape)
        return linear(y, self.out, backend=context.backend), MambaState(conv_x=conv_x, conv_bc=conv_bc, ssm=ssm)

    def _project(self, u: Array, context: Context) -> tuple[Array, Array, Array, Array]:
        """z, x, (B, C) and dt; dt after its bias, softplus and clamp, in at least float32."""
        project = partial(linear, u, backend=context.backend)
        z = context.tap("z", project(self.in_z, self.in_z_bias))
        x = project(self.in_x, self.in_x_bias)
        bc = project(self.in_bc, self.in_bc_bias)
        dt = project(self.in_dt, self.in_dt_bias, dtype=at_least_fp32(u.dtype))
        dt = jnp.clip(jax.nn.softplus(dt + self.dt_bias[...]), *self.config.time_step_limit)
        return z, x, bc, context.tap("dt", dt)

    def _conv_biases(self) -> tuple[Array, Array]:
        """Of the convolutions over x and over (B, C); zeros where there are none."""
        biases = (self.conv_x_bias, self.conv_x), (self.conv_bc_bias, self.conv_bc)
        x, bc = (jnp.zeros(taps.shape[1], at_least_fp32(taps.dtype)) if b is None else b[...] for b, taps in biases)
        return x, bc

    def _scan_inputs(self, x: Array, dt: Array, bc: Array, tap: Tap) -> tuple[Array, ...]:
        """The arguments of the scan, from the convolution's outputs [..., e] and [..., 2gn]."""
        c = self.config
        x = tap("x", x.reshape(*x.shape[:-1], c.mamba_heads, c.mamba_head_dim))
        bc = bc.reshape(*bc.shape[:-1], 2, c.ngroups, c.d_state)
        B, C = tap("B", bc[..., 0, :, :]), tap("C", bc[..., 1, :, :])
        A = -jnp.exp(self.A_log[...].astype(dt.dtype))
        return x, dt, A, B, C, self.D[...].astype(dt.dtype)

    def _gate_and_project(self, y: Array, z: Array, context: Context) -> Array:
        y, groups = context.tap("y", y).reshape(z.shape), self.config.ngroups
        y = context.backend.gated_rms_norm(y, z, self.norm[...], groups, self.config.gated_norm_eps)
        return context.tap("output", linear(y, self.out, self.out_bias, backend=context.backend))


def _state(conv_x: Array, conv_bc: Array, ssm: Array, tap: Tap) -> MambaState:
    return MambaState(
        conv_x=tap("conv_x_state", conv_x), conv_bc=tap("conv_bc_state", conv_bc), ssm=tap("ssm_state", ssm)
    )


def mamba_state(config: Mamba2Config, batch: int, dtype: DTypeLike) -> MambaState:
    """The state of a block before the first token of `batch` rows, in compute dtype `dtype`."""
    heads = config.mamba_heads, config.mamba_head_dim, config.d_state
    return MambaState.zeros(batch, config.d_conv - 1, config.bc_size, heads, dtype)


class MambaLayer(nnx.Module):
    """h + mamba(norm(h + t)): what a shared block gives, t, reaches the mixer but not the residual stream."""

    mixer: ClassVar[Callable[..., Any]] = Mamba2

    def __init__(self, config: ModelConfig, *, rngs: Rngs, dtype: DTypeLike = jnp.float32):
        self.config = config
        self.norm = norm_scale(rngs, config.hidden_size, dtype)
        self.mamba = type(self).mixer(config, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        h: Float[Array, "b t d"],
        shared_output: Float[Array, "b t d"] | None,
        state: Any,
        context: Context,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """The layer over whole rows, or one token of each, from `state` (zeros by default), and the state after."""
        u = h if shared_output is None else h + shared_output
        u = context.backend.rms_norm(u, self.norm[...], self.config.rms_norm_eps)
        if self.config.residual_in_fp32:
            u = u.astype(self.mamba.conv_x.dtype)
        u = context.tap("mamba.input", u)
        inside = context.scoped("mamba")
        if context.is_step:
            assert state is not None
            y, state = self.mamba.step(u[:, 0], state, inside)
            return h + y[:, None], state
        y, state = self.mamba(u, state, inside)
        return h + y, state

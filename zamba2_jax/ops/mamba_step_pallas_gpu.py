"""One token of a few rows through a Mamba2 block on GPUs: Pallas kernels through Triton.

A step reads every weight for a handful of rows. In XLA it is a dozen kernels, most of which run shorter than they wait
for each other, and four products too small to keep the memory busy. Here what comes before the gated norm is two:

- `mamba_project`: z, x, (B, C) and dt as one product, and what is then done to each channel alone: the convolution and
  silu of x and (B, C), the softplus of dt.
- `mamba_state`: the recurrence, the skip connection and the gate.

States are overwritten, and kernels are cut so that no program reads what another one writes: the states of the
convolutions by channels, that of the recurrence by rows, heads and channels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from zamba2_jax.typing import Array, Float

Ref = Any
"""What a kernel reads from and writes to; Pallas has no public name for it."""

ROWS = 16
"""Rows that a program multiplies, the fewest of a product on tensor cores, and the most that a step may have: with 64
XLA was measured to be as fast."""
OUTPUTS, COLUMNS = 16, 128
"""Outputs of a product that a program computes, and columns of the weight that it reads at a time."""
CHANNELS = 16
"""Channels of a head that a program of the recurrence takes."""


class StepWeights(NamedTuple):
    """The parameters of a Mamba2 block up to its gated norm, under their names there."""

    in_z: Float[Array, "e d"]
    in_x: Float[Array, "e d"]
    in_bc: Float[Array, "bc d"]
    in_dt: Float[Array, "h d"]
    conv_x: Float[Array, "k e"]
    conv_x_bias: Float[Array, " e"]
    conv_bc: Float[Array, "k bc"]
    conv_bc_bias: Float[Array, " bc"]
    dt_bias: Float[Array, " h"]
    A_log: Float[Array, " h"]
    D: Float[Array, " h"]


def step_fits(u: Float[Array, "b d"], ssm: Float[Array, "b h p n"]) -> bool:
    """Whether the kernels take an input and a state of these sizes and dtypes."""
    (b, d), (p, n) = u.shape, ssm.shape[2:]
    return (
        u.dtype == jnp.bfloat16
        and b <= ROWS
        and d % COLUMNS == 0
        and all(size >= CHANNELS and size == pl.next_power_of_2(size) for size in (p, n))
    )


def mamba_step_pallas_gpu(
    u: Float[Array, "b d"],
    weights: StepWeights,
    conv_x: Float[Array, "b past e"],
    conv_bc: Float[Array, "b past bc"],
    ssm: Float[Array, "b h p n"],
    dt_limits: tuple[float, float],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "b e"], Float[Array, "b past e"], Float[Array, "b past bc"], Float[Array, "b h p n"]]:
    """A step of a block up to its gated norm: y silu(z), and the states after it.

    Products have bfloat16 operands; sums, decays and the state are float32.

    Args:
        u: input of the block, bfloat16.
        weights: of the block, matrices in bfloat16.
        conv_x, conv_bc: the last inputs of the convolutions over x and over (B, C), oldest first, bfloat16.
        ssm: the state of the recurrence, float32.
        dt_limits: the range dt is clamped to after softplus.
        interpret: run in Python on any device, slowly, for tests.

    Raises:
        ValueError: `step_fits` does not hold.
    """
    if not step_fits(u, ssm):
        raise ValueError(f"u is {u.dtype} {u.shape} and the state {ssm.shape}: expected sizes that `step_fits`")
    (b, _), (heads, p, n), bc = u.shape, ssm.shape[1:], len(weights.in_bc)
    ngroups = bc // (2 * n)

    z, x, projections, dt, conv_x, conv_bc = pl.pallas_call(
        partial(_project_kernel, dt_limits=dt_limits, barrier=not interpret),
        name="mamba_project",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=4),
        grid=(sum(pl.cdiv(len(matrix), OUTPUTS) for matrix in weights[:4]),),
        out_shape=[
            *[jax.ShapeDtypeStruct((b, len(matrix)), u.dtype) for matrix in weights[:3]],
            jax.ShapeDtypeStruct((b, heads), jnp.float32),
            conv_x,
            conv_bc,
        ],
        input_output_aliases={10: 4, 11: 5},
    )(u, *weights[:9], conv_x, conv_bc)

    per_group, blocks = heads // ngroups, p // CHANNELS
    channels = pl.BlockSpec((None, CHANNELS), lambda i, j, block: (i, j * blocks + block))
    B = pl.BlockSpec((None, n), lambda i, j, block: (i, j // per_group))
    C = pl.BlockSpec((None, n), lambda i, j, block: (i, ngroups + j // per_group))
    of_row, of_head = pl.BlockSpec((None, None), lambda i, j, _: (i, j)), pl.BlockSpec((None,), lambda i, j, _: (j,))
    state = pl.BlockSpec((None, None, CHANNELS, n), lambda i, j, block: (i, j, block, 0))
    gated, ssm = pl.pallas_call(
        _state_kernel,
        name="mamba_state",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=2, num_stages=1),
        grid=(b, heads, blocks),
        in_specs=[channels, channels, B, C, of_row, of_head, of_head, state],
        out_specs=[channels, state],
        out_shape=[jax.ShapeDtypeStruct(z.shape, z.dtype), ssm],
        input_output_aliases={7: 1},
    )(x, z, projections, projections, dt, weights.A_log, weights.D, ssm)
    return gated, conv_x, conv_bc, ssm


def _project_kernel(
    u_ref: Ref,
    in_z_ref: Ref,
    in_x_ref: Ref,
    in_bc_ref: Ref,
    in_dt_ref: Ref,
    conv_x_ref: Ref,
    conv_x_bias_ref: Ref,
    conv_bc_ref: Ref,
    conv_bc_bias_ref: Ref,
    dt_bias_ref: Ref,
    past_x_ref: Ref,
    past_bc_ref: Ref,
    z_ref: Ref,
    x_ref: Ref,
    bc_ref: Ref,
    dt_ref: Ref,
    next_x_ref: Ref,
    next_bc_ref: Ref,
    *,
    dt_limits: tuple[float, float],
    barrier: bool,
) -> None:
    row = jnp.arange(ROWS)[None, :]

    def per_output(ref: Ref, *at: Array | int) -> Float[Array, "o 1"]:
        return plgpu.load(ref.at[at], mask=at[-1] < ref.shape[-1], other=0).astype(jnp.float32)

    def convolve(
        w_ref: Ref, bias_ref: Ref, past_ref: Ref, next_ref: Ref, product: Array, output: Array, real: Array
    ) -> Array:
        last = w_ref.shape[0] - 1
        inputs = [plgpu.load(past_ref.at[row, j, output], mask=real, other=0) for j in range(last)]
        inputs.append(product.astype(past_ref.dtype))
        if barrier:  # not before all threads have read what is overwritten now
            plgpu.debug_barrier()
        for j in range(last):
            plgpu.store(next_ref.at[row, j, output], inputs[j + 1], mask=real)
        y = per_output(bias_ref, output)
        for j in range(last + 1):
            y = y + per_output(w_ref, j, output) * inputs[j].astype(jnp.float32)
        return y * jax.nn.sigmoid(y)

    def time_step(product: Array, output: Array, real: Array) -> Array:
        dt = product + per_output(dt_bias_ref, output)
        return jnp.clip(jnp.maximum(dt, 0) + jnp.log1p(jnp.exp(-jnp.abs(dt))), *dt_limits)

    projections: list[tuple[Ref, Ref, Callable[[Array, Array, Array], Array]]] = [
        (in_z_ref, z_ref, lambda product, output, real: product),
        (in_x_ref, x_ref, partial(convolve, conv_x_ref, conv_x_bias_ref, past_x_ref, next_x_ref)),
        (in_bc_ref, bc_ref, partial(convolve, conv_bc_ref, conv_bc_bias_ref, past_bc_ref, next_bc_ref)),
        (in_dt_ref, dt_ref, time_step),
    ]
    program, first = pl.program_id(0), 0
    for w_ref, to_ref, finish in projections:
        count = pl.cdiv(len(w_ref), OUTPUTS)

        @pl.when((program >= first) & (program < first + count))
        def _(w_ref: Ref = w_ref, to_ref: Ref = to_ref, finish: Any = finish, first: int = first) -> None:
            output = (program - first) * OUTPUTS + jnp.arange(OUTPUTS)[:, None]
            real = (row < len(u_ref)) & (output < len(w_ref))
            result = finish(_product(w_ref, u_ref, output), output, real)
            plgpu.store(to_ref.at[row, output], result.astype(to_ref.dtype), mask=real)

        first += count


def _product(w_ref: Ref, u_ref: Ref, output: Array) -> Float[Array, "o b"]:
    """Some outputs of w times all rows of u."""
    row = jnp.arange(ROWS)[:, None]

    def add(i: Array, total: Array) -> Array:
        column = (i * COLUMNS + jnp.arange(COLUMNS))[None, :]
        w = plgpu.load(w_ref.at[output, column], mask=output < len(w_ref), other=0)
        u = plgpu.load(u_ref.at[row, column], mask=row < len(u_ref), other=0)
        return total + jax.lax.dot_general(w, u, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    return jax.lax.fori_loop(0, u_ref.shape[1] // COLUMNS, add, jnp.zeros((OUTPUTS, ROWS), jnp.float32))


def _state_kernel(
    x_ref: Ref,
    z_ref: Ref,
    B_ref: Ref,
    C_ref: Ref,
    dt_ref: Ref,
    A_log_ref: Ref,
    D_ref: Ref,
    state_ref: Ref,
    gated_ref: Ref,
    next_ref: Ref,
) -> None:
    x, z, B, C, A_log, D = (ref[...].astype(jnp.float32) for ref in (x_ref, z_ref, B_ref, C_ref, A_log_ref, D_ref))
    dt = dt_ref[...]
    state = jnp.exp(-dt * jnp.exp(A_log)) * state_ref[...] + (dt * x)[:, None] * B[None, :]
    next_ref[...] = state
    y = jnp.sum(state * C[None, :], axis=1) + D * x
    gated_ref[...] = (y * z * jax.nn.sigmoid(z)).astype(gated_ref.dtype)

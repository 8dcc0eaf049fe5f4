"""The recurrence of Mamba1 in its plainest form: the oracle of `ops.selective_scan.selective_scan`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from zamba2_jax.typing import Array, Bool, Float, at_least_fp32


def selective_scan_sequential(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h p"],
    A: Float[Array, "h p n"],
    B: Float[Array, "b t h n"],
    C: Float[Array, "b t h n"],
    D: Float[Array, "h p"] | None,
    initial_state: Float[Array, "b h p n"] | None,
    restarts: Bool[Array, "b t"] | None,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """The recurrence as a `lax.scan` over time, one token after the other; in float64 when given float64.

    Differentiable in every mode. Arguments and results as in `selective_scan`, but for these:

    Args:
        dt: 0 at padding.
        restarts: where the state begins anew, from 0; nowhere by default.
    """
    (b, t, h, p), n, wide = x.shape, A.shape[-1], at_least_fp32(x.dtype)
    restarts = jnp.zeros((b, t), bool) if restarts is None else restarts
    state = jnp.zeros((b, h, p, n), wide) if initial_state is None else initial_state.astype(wide)

    def step(state: Array, inputs: Sequence[Array]) -> tuple[Array, Array]:
        x, dt, B, C, restart = inputs
        state = jnp.where(restart[:, None, None, None], 0, state) * jnp.exp(dt[..., None] * A)
        state += (dt * x)[..., None] * B[:, :, None]
        return state, jnp.einsum("bhpn,bhn->bhp", state, C, precision="highest")

    arrays = x.astype(wide), dt.astype(wide), B.astype(wide), C.astype(wide), restarts
    state, y = jax.lax.scan(step, state, [jnp.moveaxis(array, 1, 0) for array in arrays])
    y = jnp.moveaxis(y, 0, 1)
    return (y if D is None else y + D * x).astype(x.dtype), state

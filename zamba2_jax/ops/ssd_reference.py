"""The state-space recurrence of Mamba2, written twice in its plainest forms: the oracles of `ops.ssd.ssd`.

Per head, with state S [p, n] (arXiv:2405.21060, eq. 1 and 2, discretised):

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = S_t C_t + D x_t

Both take the arguments of `ssd`, hold one state per token (`ssd_associative`) or one per row (`ssd_sequential`), and
run in float64 when given float64.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from zamba2_jax.ops.segments import document_index
from zamba2_jax.typing import Array, Bool, Float, Int, at_least_fp32


def ssd_sequential(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    A: Float[Array, " h"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    D: Float[Array, " h"] | None = None,
    *,
    initial_state: Float[Array, "b h p n"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """The recurrence as a `lax.scan` over time, one token after the other. Arguments and results as in `ssd`."""
    decay, added, C_of_head, reset, state = _terms(x, dt, A, B, C, initial_state, segment_ids)

    def step(state: Array, inputs: Sequence[Array]) -> tuple[Array, Array]:
        decay, added, C, reset = inputs
        state = jnp.where(reset[:, None, None, None], 0, state) * decay[..., None, None] + added
        return state, jnp.einsum("bhpn,bhn->bhp", state, C, precision="highest")

    by_time = [jnp.moveaxis(array, 1, 0) for array in (decay, added, C_of_head, reset)]
    state, y = jax.lax.scan(step, state, by_time)
    return _skip(jnp.moveaxis(y, 0, 1), x, D), state


def ssd_associative(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    A: Float[Array, " h"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    D: Float[Array, " h"] | None = None,
    *,
    initial_state: Float[Array, "b h p n"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """The recurrence as a `lax.associative_scan` of (decay, state) over time. Arguments and results as in `ssd`."""
    decay, added, C_of_head, reset, state = _terms(x, dt, A, B, C, initial_state, segment_ids)
    decay = jnp.where(reset[..., None], 0, decay)
    added = added.at[:, 0].add(decay[:, 0, :, None, None] * state)
    _, states = jax.lax.associative_scan(join, (decay[..., None, None], added), axis=1)
    y = jnp.einsum("bthpn,bthn->bthp", states, C_of_head, precision="highest")
    return _skip(y, x, D), states[:, -1]


def join(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """Two stretches of time as one: their decays, and the states they end in when they start from 0."""
    (decay1, state1), (decay2, state2) = first, second
    return decay1 * decay2, decay2 * state1 + state2


def _terms(
    x: Array, dt: Array, A: Array, B: Array, C: Array, initial_state: Array | None, segment_ids: Array | None
) -> tuple[Float[Array, "b t h"], Float[Array, "b t h p n"], Float[Array, "b t h n"], Bool[Array, "b t"], Array]:
    """What every token contributes: its decay, dt x B^T, C per head, whether it starts a document; and state 0."""
    (b, t, h, p), n = x.shape, B.shape[-1]
    wide = at_least_fp32(x.dtype)
    x, dt, A, B, C = (array.astype(wide) for array in (x, dt, A, B, C))
    reset = jnp.zeros((b, t), bool)
    if segment_ids is not None:
        reset = jnp.diff(document_index(segment_ids), axis=1, prepend=0) > 0
        dt = jnp.where(segment_ids[..., None] != 0, dt, 0)
    B, C = (jnp.repeat(array, h // array.shape[2], axis=2) for array in (B, C))
    added = (dt[..., None] * x)[..., None] * B[..., None, :]
    state = jnp.zeros((b, h, p, n), wide) if initial_state is None else initial_state.astype(wide)
    return jnp.exp(dt * A), added, C, reset, state


def _skip(y: Array, x: Array, D: Array | None) -> Array:
    return (y if D is None else y + D[:, None] * x).astype(x.dtype)

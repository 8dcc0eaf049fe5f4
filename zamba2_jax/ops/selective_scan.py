"""The selective scan of Mamba1 (arXiv:2312.00752, eq. 2): whole sequences by chunks, and one step.

Every channel of a head has a decay for each of its states, so that no product of matrices stands for a chunk of tokens
as in `ops.ssd`.
"""

from typing import Literal, get_args

import jax.numpy as jnp

from zamba2_jax.ops.placement import platform
from zamba2_jax.ops.segments import document_index
from zamba2_jax.ops.selective_scan_reference import selective_scan_sequential
from zamba2_jax.ops.selective_scan_xla import selective_scan_xla
from zamba2_jax.ops.shapes import check_shapes
from zamba2_jax.typing import Array, Float, Int, at_least_fp32

SelectiveImplementation = Literal["xla", "sequential"]
CHUNK_SIZE, WINDOW = 16, 16
"""Tokens of a chunk, and chunks walked at once where there are more threads than on a CPU. See docs/scan.md."""


def selective_scan(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h p"],
    A: Float[Array, "h p n"],
    B: Float[Array, "b t h n"],
    C: Float[Array, "b t h n"],
    D: Float[Array, "h p"] | None = None,
    *,
    initial_state: Float[Array, "b h p n"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    chunk_size: int | None = None,
    window: int | None = None,
    implementation: SelectiveImplementation = "xla",
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t and y_t = S_t C_t + D x_t, for every channel of every head and all t.

    "xla" is differentiable once, in reverse, in every floating-point argument; "sequential" in every mode. Finite,
    gradients too, for any finite input.

    Args:
        x: input of the scan.
        dt: time step of every channel after softplus, >= 0. Where it is 0 the token leaves the state as it is.
        A: decay rate, not its logarithm, <= 0.
        B, C: input and output projections of the state, of each head.
        D: weight of the skip connection; none by default.
        initial_state: S before the first token; zeros by default. It belongs to the first document.
        segment_ids: documents; the state restarts from 0 at each but the first. Padding leaves the state as it is, and
            its y has no meaning. See `ops.segments`.
        chunk_size: tokens per chunk of "xla"; changes speed and memory, not the result.
        window: chunks that "xla" walks at once; likewise.
        implementation: "xla", by chunks, or the oracle, "sequential".

    Returns:
        y, in the dtype of x, and S after the last token, in at least float32.

    Raises:
        ValueError: a size disagrees, or `chunk_size`, `window` or `implementation` is not valid.
    """
    _check_shapes(x, dt, A, B, C, D, initial_state, segment_ids)
    for name, value in (("chunk_size", chunk_size), ("window", window)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: expected an integer >= 1")
    if implementation not in get_args(SelectiveImplementation):
        names = ", ".join(get_args(SelectiveImplementation))
        raise ValueError(f"implementation={implementation!r}: expected one of {names}")
    wide, restarts = at_least_fp32(x.dtype), None
    dt, A = dt.astype(wide), A.astype(wide)
    if segment_ids is not None:
        dt = jnp.where(segment_ids[..., None, None] != 0, dt, 0)
        restarts = jnp.diff(document_index(segment_ids), axis=1, prepend=0) > 0
    if implementation == "sequential":
        return selective_scan_sequential(x, dt, A, B, C, D, initial_state, restarts)
    length = x.shape[1]
    chunk_size = min(chunk_size or CHUNK_SIZE, length)
    window = min(window or (1 if platform() == "cpu" else WINDOW), -(-length // chunk_size))
    return selective_scan_xla(x, dt, A, B, C, D, initial_state, restarts, chunk_size, window)


def selective_scan_step(
    x: Float[Array, "b h p"],
    dt: Float[Array, "b h p"],
    A: Float[Array, "h p n"],
    B: Float[Array, "b h n"],
    C: Float[Array, "b h n"],
    D: Float[Array, "h p"] | None = None,
    *,
    state: Float[Array, "b h p n"],
) -> tuple[Float[Array, "b h p"], Float[Array, "b h p n"]]:
    """One token of `selective_scan`: its y, and the state after it."""
    wide = state.dtype
    dt, A, B, C = (array.astype(wide) for array in (dt, A, B, C))
    state = jnp.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B[:, :, None]
    y = jnp.einsum("bhpn,bhn->bhp", state, C, precision="highest")
    return (y if D is None else y + D * x).astype(x.dtype), state


def _check_shapes(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    initial_state: Array | None,
    segment_ids: Array | None,
) -> None:
    if x.ndim != 4 or A.ndim != 3:
        raise ValueError(f"x has shape {x.shape} and A {A.shape}, expected [b, t, h, p] and [h, p, n]")
    (b, t, h, p), n = x.shape, A.shape[2]
    expected = {
        "dt": (dt, (b, t, h, p)),
        "A": (A, (h, p, n)),
        "B": (B, (b, t, h, n)),
        "C": (C, (b, t, h, n)),
        "D": (D, (h, p)),
        "initial_state": (initial_state, (b, h, p, n)),
        "segment_ids": (segment_ids, (b, t)),
    }
    check_shapes(x, expected)

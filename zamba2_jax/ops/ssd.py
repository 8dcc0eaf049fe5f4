"""The scan of Mamba2, "state space duality" (arXiv:2405.21060): whole sequences by matrix products, and one step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp

from zamba2_jax.choices import Implementation
from zamba2_jax.ops.decay import MAX_CHUNK, log_decays
from zamba2_jax.ops.placement import kernels, on_one_cpu, platform
from zamba2_jax.ops.shapes import check_shapes
from zamba2_jax.ops.ssd_pallas_tpu import ssd_pallas_tpu
from zamba2_jax.ops.ssd_reference import ssd_associative, ssd_sequential
from zamba2_jax.ops.ssd_xla import ssd_xla
from zamba2_jax.typing import Array, DTypeLike, Float, Int, at_least_fp32


def ssd(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    A: Float[Array, " h"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    D: Float[Array, " h"] | None = None,
    *,
    initial_state: Float[Array, "b h p n"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T and y_t = S_t C_t + D x_t, for every head and all t.

    Differentiable in every floating-point argument, in reverse; the oracles in every mode. Finite, gradients too, for
    any finite input.

    Args:
        x: input of the scan.
        dt: time step after softplus, >= 0. Where it is 0 the token leaves the state as it is.
        A: decay rate per head, not its logarithm, <= 0.
        B, C: input and output projections of the state; head i uses group i // (h / g).
        D: weight of the skip connection; none by default.
        initial_state: S before the first token; zeros by default. It belongs to the first document.
        segment_ids: documents; the state restarts from 0 at each but the first. Padding leaves the state as it is, and
            its y has no meaning. See `ops.segments`.
        chunk_size: tokens per chunk of "xla", which is the only one to read it; changes speed and memory, not the
            result. By default what was measured to be fastest.
        implementation: "xla", chunks by matrix products (section 6 of the paper); "pallas_tpu" and "pallas_gpu", the
            same in kernels for bfloat16 and float32; or one of the oracles, "associative" and "sequential". By default
            what `default_implementation` gives.

    Returns:
        y, in the dtype of x, and S after the last token, in at least float32.

    Raises:
        ValueError: h is not a multiple of g, a size disagrees, or `chunk_size` or `implementation` is not valid.
    """
    _check_shapes(x, dt, A, B, C, D, initial_state, segment_ids)
    if chunk_size is not None and not 1 <= chunk_size <= MAX_CHUNK:
        raise ValueError(f"chunk_size={chunk_size}: expected an integer from 1 to {MAX_CHUNK}")
    oracles: dict[str, Callable[..., tuple[Array, Array]]] = {
        "associative": ssd_associative,
        "sequential": ssd_sequential,
    }
    if implementation in oracles:
        return oracles[implementation](x, dt, A, B, C, D, initial_state=initial_state, segment_ids=segment_ids)

    chunked: dict[str, Callable[..., tuple[Array, Array]]] = {
        "xla": partial(_xla, chunk_size=chunk_size),
        "pallas_tpu": ssd_pallas_tpu,
        "pallas_gpu": _pallas_gpu,
    }
    implementation = implementation or default_implementation(x.dtype)
    if implementation not in chunked:
        raise ValueError(f"implementation={implementation!r}: expected one of {', '.join([*chunked, *oracles])}")
    dt = dt.astype(at_least_fp32(x.dtype))
    if segment_ids is not None:
        dt = jnp.where(segment_ids[..., None] != 0, dt, 0)
    return chunked[implementation](x, dt, log_decays(dt, A, segment_ids), B, C, D, initial_state)


def ssd_step(
    x: Float[Array, "b h p"],
    dt: Float[Array, "b h"],
    A: Float[Array, " h"],
    B: Float[Array, "b g n"],
    C: Float[Array, "b g n"],
    D: Float[Array, " h"] | None = None,
    *,
    state: Float[Array, "b h p n"],
) -> tuple[Float[Array, "b h p"], Float[Array, "b h p n"]]:
    """One token of `ssd`: its y, and the state after it."""
    # docs/xla-notes.md: one-read-of-the-state
    wide, (b, h, p, n) = state.dtype, state.shape
    dt, B, C = dt.astype(wide), B.astype(wide), C.astype(wide)
    r = h // B.shape[1]
    added = (dt[..., None] * x)[..., None] * jnp.repeat(B, r, axis=1)[:, :, None]
    state = jnp.exp(dt * A)[..., None, None] * state + added
    if not on_one_cpu():
        C = jnp.repeat(C, r, axis=1)
    matrices = state.reshape(b, C.shape[1], h * p // C.shape[1], n)
    y = jnp.einsum("bgmn,bgn->bgm", matrices, C, precision="highest").reshape(b, h, p)
    return (y if D is None else y + D[:, None] * x).astype(x.dtype), state


def default_implementation(dtype: DTypeLike, *, on_mesh: bool = False) -> Implementation:
    """What `ssd` uses for x of this dtype unless told; with several devices see `placement`.

    "pallas_tpu" on a TPU; "pallas_gpu" for bfloat16 on a Hopper GPU; else "xla". On other GPUs our kernels have not
    been measured to be faster, and for float32 they were measured to be slower with the gradient.

    Args:
        dtype: of x.
        on_mesh: as for `placement.kernels`.
    """
    if (found := kernels(on_mesh=on_mesh)) == "tpu":
        return "pallas_tpu"
    return "pallas_gpu" if found == "gpu" and jnp.dtype(dtype) == jnp.bfloat16 else "xla"


def _pallas_gpu(*arguments: Any) -> tuple[Array, Array]:
    # docs/xla-notes.md: pallas-through-triton
    from zamba2_jax.ops.ssd_pallas_gpu import ssd_pallas_gpu

    return ssd_pallas_gpu(*arguments)


def _xla(x: Array, *others: Array | None, chunk_size: int | None) -> tuple[Array, Array]:
    """`ssd_xla` at the sizes that are fastest: what stays in the cache on CPU, many chunks at once elsewhere."""
    chunk_size, window = min(chunk_size or 64, x.shape[1]), 1 if platform() == "cpu" else 16
    return ssd_xla(x, *others, chunk_size, min(window, -(-x.shape[1] // chunk_size)))


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
    if x.ndim != 4 or B.ndim != 4:
        raise ValueError(f"x has shape {x.shape} and B {B.shape}, expected [b, t, h, p] and [b, t, g, n]")
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    if h % g:
        raise ValueError(f"{h} heads do not divide into {g} groups")
    expected = {
        "dt": (dt, (b, t, h)),
        "A": (A, (h,)),
        "B": (B, (b, t, g, n)),
        "C": (C, (b, t, g, n)),
        "D": (D, (h,)),
        "initial_state": (initial_state, (b, h, p, n)),
        "segment_ids": (segment_ids, (b, t)),
    }
    check_shapes(x, expected)

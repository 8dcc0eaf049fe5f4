"""The scan of Mamba2, "state space duality" (arXiv:2405.21060): whole sequences by matrix products, and one step."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from zamba2_jax.ops.segments import document_index
from zamba2_jax.ops.ssd_reference import join, ssd_associative, ssd_sequential
from zamba2_jax.typing import Array, Bool, Float, Int, at_least_fp32

Implementation = Literal["xla", "associative", "sequential"]

CHUNK_SIZE = 64


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
    chunk_size: int = CHUNK_SIZE,
    implementation: Implementation = "xla",
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T and y_t = S_t C_t + D x_t, for every head and all t.

    Differentiable in every floating-point argument. Finite, gradients too, for any finite input.

    Args:
        x: input of the scan.
        dt: time step after softplus, >= 0. Where it is 0 the token leaves the state as it is.
        A: decay rate per head, not its logarithm, <= 0.
        B, C: input and output projections of the state; head i uses group i // (h / g).
        D: weight of the skip connection; none by default.
        initial_state: S before the first token; zeros by default. It belongs to the first document.
        segment_ids: documents; the state restarts from 0 at each but the first. Padding leaves the state as it is, and
            its y has no meaning. See `ops.segments`.
        chunk_size: tokens per chunk; changes speed and memory, not the result. Only "xla" reads it.
        implementation: "xla", chunks by matrix products (section 6 of the paper), or one of the oracles,
            "associative" and "sequential".

    Returns:
        y, in the dtype of x, and S after the last token, in at least float32.

    Raises:
        ValueError: h is not a multiple of g, a size disagrees, or `chunk_size` or `implementation` is not valid.
    """
    _check_shapes(x, dt, A, B, C, D, initial_state, segment_ids)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: expected an integer >= 1")
    implementations: dict[str, Callable[..., tuple[Array, Array]]] = {
        "xla": partial(_ssd_chunked, chunk_size=chunk_size),
        "associative": ssd_associative,
        "sequential": ssd_sequential,
    }
    if implementation not in implementations:
        raise ValueError(f"implementation={implementation!r}: expected one of {', '.join(implementations)}")
    return implementations[implementation](x, dt, A, B, C, D, initial_state=initial_state, segment_ids=segment_ids)


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
    (b, h, p), (g, n) = x.shape, B.shape[1:]
    wide = state.dtype
    dt = dt.astype(wide)
    decay = jnp.exp(dt * A)
    dtx = (dt[..., None] * x).reshape(b, g, h // g, p)
    added = jnp.einsum("bgrp,bgn->bgrpn", dtx, B.astype(wide)).reshape(state.shape)
    state = decay[..., None, None] * state + added
    grouped = state.reshape(b, g, h // g, p, n)
    y = jnp.einsum("bgrpn,bgn->bgrp", grouped, C.astype(wide)).reshape(x.shape)
    return (y if D is None else y + D[:, None] * x).astype(x.dtype), state


def _ssd_chunked(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    *,
    initial_state: Array | None,
    segment_ids: Array | None,
    chunk_size: int,
) -> tuple[Array, Array]:
    (b, t, h, p), (g, n), wide = x.shape, B.shape[2:], at_least_fp32(x.dtype)
    size = min(chunk_size, t)
    documents = None if segment_ids is None else document_index(segment_ids)
    if segment_ids is not None:
        dt = jnp.where(segment_ids[..., None] != 0, dt, 0)

    def chunked(array: Array, *shape: int) -> Array:
        """[b, t, ...] -> [b, c, s, *shape], filled with zeros: a token with dt = 0 changes nothing."""
        padded = jnp.pad(array, [(0, 0), (0, -t % size)] + [(0, 0)] * (array.ndim - 2))
        return padded.reshape(b, -1, size, *shape)

    heads = (g, h // g)
    dt = chunked(dt.astype(wide), *heads)
    dtx = dt[..., None] * chunked(x.astype(wide), *heads, p)
    B, C = chunked(B.astype(wide), g, n), chunked(C.astype(wide), g, n)
    log_decay = jnp.moveaxis(dt * A.astype(wide).reshape(heads), 2, -1)  # b c g r s
    same, carries = _document_masks(documents, t, size)

    # 1. Within a chunk: y_l += sum_{s <= l} (C_l . B_s) decay(s -> l) dt_s x_s.
    decay = jnp.exp(jnp.where(same[:, :, None, None], _segment_sums(log_decay), -jnp.inf))  # b c g r l s
    scores = jnp.einsum("bclgn,bcsgn->bcgls", C, B)
    y = jnp.einsum("bcgrls,bcsgrp->bclgrp", scores[:, :, :, None] * decay, dtx)

    # 2. What each chunk adds to the state by its end.
    added = jnp.einsum("bcgrs,bcsgrp,bcsgn->bcgrpn", decay[..., -1, :], dtx, B)

    # 3. The state at the end of each chunk, chunks joined by an associative scan, and so at the start of the next.
    from_start = jnp.exp(jnp.cumsum(log_decay, axis=-1)) * carries[:, :, None, None]  # b c g r l
    state = jnp.zeros((b, h, p, n), wide) if initial_state is None else initial_state.astype(wide)
    state = state.reshape(b, 1, *heads, p, n)
    total_decay, ends = jax.lax.associative_scan(join, (from_start[..., -1], added), axis=1)
    ends = ends + total_decay[..., None, None] * state
    starts = jnp.concatenate([state, ends[:, :-1]], axis=1)

    # 4. What the state at the start of the chunk gives to each of its tokens.
    y += jnp.einsum("bclgn,bcgrpn->bclgrp", C, starts) * jnp.moveaxis(from_start, -1, 2)[..., None]

    y = y.reshape(b, -1, h, p)[:, :t]
    if D is not None:
        y += D[:, None] * x
    return y.astype(x.dtype), ends[:, -1].reshape(b, h, p, n)


def _segment_sums(a: Float[Array, "*batch s"]) -> Float[Array, "*batch l s"]:
    """sum of a_k over s < k <= l, for l >= s; 0 elsewhere.

    A cumulative sum of masked values per column: differences of one cumulative sum would lose the small sums to the
    rounding of the large ones.
    """
    size = a.shape[-1]
    later = jnp.tril(jnp.ones((size, size), bool), -1)  # k > s
    return jnp.cumsum(jnp.where(later, a[..., :, None], 0), axis=-2)


def _document_masks(
    documents: Int[Array, "b t"] | None, length: int, size: int
) -> tuple[Bool[Array, "b c l s"], Bool[Array, "b c l"]]:
    """Which tokens s of a chunk reach token l, and which tokens l the state at the chunk's start reaches."""
    causal = jnp.tril(jnp.ones((size, size), bool))
    if documents is None:
        return causal[None, None], jnp.ones((1, 1, size), bool)
    padded = jnp.pad(documents, ((0, 0), (0, -length % size)), mode="edge").reshape(documents.shape[0], -1, size)
    before = jnp.pad(padded[:, :-1, -1], ((0, 0), (1, 0)))  # the first document of a row has number 0
    return causal & (padded[..., :, None] == padded[..., None, :]), padded == before[..., None]


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
    if t == 0:
        raise ValueError(f"x has shape {x.shape}: expected at least one token")
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
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape} for x of shape {x.shape}")

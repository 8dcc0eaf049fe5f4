"""The gate of the shared blocks' MLP (GEGLU, arXiv:2002.05202)."""

import math

import jax
import jax.numpy as jnp

from zamba2_jax.ops.placement import compiled_apart
from zamba2_jax.typing import Array, Float, at_least_fp32


def geglu(
    gate: Float[Array, "*batch f"], up: Float[Array, "*batch f"], *, custom_gradient: bool = True
) -> Float[Array, "*batch f"]:
    """gelu(gate) * up with the exact gelu, x Phi(x), in at least float32, rounded once to the dtype of `up`.

    With `custom_gradient` differentiable once, in reverse: the backward pass keeps the arguments, and computes the rest
    again. Without, as often as wanted, in any mode.
    """
    return (_geglu if custom_gradient else _product)(gate, up)


def _product(gate: Array, up: Array) -> Array:
    wide_gate, wide_up = _wide(gate, up)
    return (wide_gate * _phi(wide_gate) * wide_up).astype(up.dtype)


_geglu = jax.custom_vjp(_product)


def _forward(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(gate, up), (gate, up)


def _backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    return compiled_apart(_gradients, *saved, cotangent)


_geglu.defvjp(_forward, _backward)


def _gradients(gate: Array, up: Array, cotangent: Array) -> tuple[Array, Array]:
    wide_gate, wide_up, d_y = _wide(gate, up, cotangent)
    phi = _phi(wide_gate)
    density = jnp.exp(-wide_gate * wide_gate / 2) / math.sqrt(2 * math.pi)
    d_gate = d_y * wide_up * (phi + wide_gate * density)
    return d_gate.astype(gate.dtype), (d_y * wide_gate * phi).astype(up.dtype)


def _phi(x: Array) -> Array:
    """The distribution function of the standard normal distribution; by erfc, for 1 + erf cancels where x is low."""
    return jax.lax.erfc(-x * math.sqrt(0.5)) / 2


def _wide(*arrays: Array) -> tuple[Array, ...]:
    return tuple(array.astype(at_least_fp32(array.dtype)) for array in arrays)

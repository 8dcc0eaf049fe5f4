"""The gates of MLPs (arXiv:2002.05202)."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from zamba2_jax.ops.placement import compiled_apart
from zamba2_jax.typing import Array, Float, at_least_fp32

Function = Callable[[Array], Array]
Gated = Callable[[Array, Array], Array]


def geglu(
    gate: Float[Array, "*batch f"], up: Float[Array, "*batch f"], *, custom_gradient: bool = True
) -> Float[Array, "*batch f"]:
    """gelu(gate) * up with the exact gelu, x Phi(x), in at least float32, rounded once to the dtype of `up`.

    With `custom_gradient` differentiable once, in reverse: the backward pass keeps the arguments, and computes the rest
    again. Without, as often as wanted, in any mode.
    """
    return (_geglu if custom_gradient else _gated(_gelu))(gate, up)


def swiglu(
    gate: Float[Array, "*batch f"], up: Float[Array, "*batch f"], *, custom_gradient: bool = True
) -> Float[Array, "*batch f"]:
    """silu(gate) * up, silu being x sigmoid(x); else as `geglu`."""
    return (_swiglu if custom_gradient else _gated(jax.nn.silu))(gate, up)


def _gated(activation: Function) -> Gated:
    def product(gate: Array, up: Array) -> Array:
        wide_gate, wide_up = _wide(gate, up)
        return (activation(wide_gate) * wide_up).astype(up.dtype)

    return product


def _with_gradient(activation: Function, slope: Function) -> Gated:
    """`_gated` with a gradient of our own; `slope` is the derivative of `activation`."""
    product = _gated(activation)

    def gradients(gate: Array, up: Array, cotangent: Array) -> tuple[Array, Array]:
        wide_gate, wide_up, d_y = _wide(gate, up, cotangent)
        d_gate, d_up = d_y * wide_up * slope(wide_gate), d_y * activation(wide_gate)
        return d_gate.astype(gate.dtype), d_up.astype(up.dtype)

    gated = jax.custom_vjp(product)
    gated.defvjp(
        lambda gate, up: (product(gate, up), (gate, up)),
        lambda saved, cotangent: compiled_apart(gradients, *saved, cotangent),
    )
    return gated


def _gelu(x: Array) -> Array:
    return x * _phi(x)


def _gelu_slope(x: Array) -> Array:
    return _phi(x) + x * jnp.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _phi(x: Array) -> Array:
    """The distribution function of the standard normal distribution; by erfc, for 1 + erf cancels where x is low."""
    return jax.lax.erfc(-x * math.sqrt(0.5)) / 2


def _silu_slope(x: Array) -> Array:
    sigmoid = jax.nn.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


_geglu = _with_gradient(_gelu, _gelu_slope)
_swiglu = _with_gradient(jax.nn.silu, _silu_slope)


def _wide(*arrays: Array) -> tuple[Array, ...]:
    return tuple(array.astype(at_least_fp32(array.dtype)) for array in arrays)

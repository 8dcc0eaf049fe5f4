"""What a matrix is: a parameter, or a module that stands in its place and says how it is multiplied with.

So a low-rank sum, say, is a replacement in a model's tree, of which no block knows.
"""

from abc import abstractmethod
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx

from zamba2_jax.ops.backend import Backend
from zamba2_jax.typing import Array, DTypeLike, Float, at_least_fp32


@runtime_checkable
class Matrix(Protocol):
    """A module in place of the parameter of a matrix, [o, i]."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(o, i)."""

    @abstractmethod
    def product(self, x: Float[Array, "*batch i"], backend: Backend, dtype: DTypeLike) -> Float[Array, "*batch o"]:
        """x @ w.T, in `dtype`."""


class LowRankSum(nnx.Module):
    """w + scale * b @ a, never formed (LoRA, arXiv:2106.09685).

    Attributes:
        base: w, [o, i]: a parameter, or another matrix.
        a, b: [r, i] and [o, r].
        scale: of the term; no parameter.
    """

    def __init__(self, base: nnx.Param[Array] | Matrix, a: nnx.Param[Array], b: nnx.Param[Array], scale: float):
        """The sum.

        Raises:
            ValueError: the shapes do not fit.
        """
        (o, i), r = base.shape, a.shape[0]
        if a.shape != (r, i) or b.shape != (o, r):
            raise ValueError(f"a has shape {a.shape} and b {b.shape}, expected (r, {i}) and ({o}, r) for {o} x {i}")
        self.base, self.a, self.b, self.scale = base, a, b, scale

    @property
    def shape(self) -> tuple[int, ...]:
        """(o, i)."""
        return self.base.shape

    def product(self, x: Float[Array, "*batch i"], backend: Backend, dtype: DTypeLike) -> Float[Array, "*batch o"]:
        """x @ w.T + scale * (x @ a.T) @ b.T, in `dtype`; the sum in at least float32."""
        wide = at_least_fp32(x.dtype)
        low = backend.linear(backend.linear(x, self.a[...]), self.b[...], dtype=wide)
        return (linear(x, self.base, backend=backend, dtype=wide) + self.scale * low).astype(dtype)


def linear(
    x: Float[Array, "*batch i"],
    w: nnx.Param[Array] | Matrix,
    bias: nnx.Param[Array] | None = None,
    *,
    backend: Backend,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch o"]:
    """x @ w.T + bias for any kind of matrix; see `ops.linear`.

    Args:
        x: rows.
        w: a parameter or another `Matrix`.
        bias: a parameter, or None for none.
        backend: how it is computed.
        dtype: of the result; that of x by default.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    if isinstance(w, nnx.Param):
        return backend.linear(x, w[...], None if bias is None else bias[...], dtype=dtype)
    if bias is None:
        return w.product(x, backend, dtype)
    return (w.product(x, backend, jnp.promote_types(dtype, bias.dtype)) + bias[...]).astype(dtype)

"""Matrix products with a weight: the dense layer and the low-rank adapter."""

import jax.numpy as jnp

from zamba2_jax.typing import Array, DTypeLike, Float


def linear(
    x: Float[Array, "*batch i"],
    w: Float[Array, "i o"],
    bias: Float[Array, " o"] | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch o"]:
    """x @ w + bias. The result has `dtype`, which is that of x by default, and is rounded to it once."""
    dtype = jnp.dtype(dtype or x.dtype)
    if bias is None:
        return jnp.matmul(x, w, preferred_element_type=dtype)
    wide = jnp.promote_types(dtype, bias.dtype)
    return (jnp.matmul(x, w, preferred_element_type=wide) + bias).astype(dtype)


def adapter(x: Float[Array, "*batch i"], a: Float[Array, "i a"], b: Float[Array, "a o"]) -> Float[Array, "*batch o"]:
    """The low-rank term x a b that one call of a shared block adds to a projection (arXiv:2411.15242, section 2.2).

    There is no scale: these adapters are part of the pretrained model.
    """
    return linear(linear(x, a), b)

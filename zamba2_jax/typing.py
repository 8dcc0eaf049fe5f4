"""The dimension alphabet, array aliases, and the dtype policy.

One letter per dimension, in every signature, einsum and comment of this package:

    b batch          t time, tokens in        q queries        u slots of a KV cache
    c chunk          l, s positions in a chunk (l attends to s)
    d model width    e inner width of Mamba2, h * p
    g group          r heads per group        h head, g * r    p head dim      n SSM state
    f FFN width      v vocabulary             k conv taps      a adapter rank

Dtype policy. Matrices, activations and caches of keys, values and convolution inputs have the compute dtype, which
is the dtype of the weight matrices. Vectors (norm scales, biases, A_log, D, dt_bias) are kept in float32 and are used
in it, as are dt, decays, the SSM state, softmax, norms and losses. Every matrix product accumulates in float32. All of
this reads "at least": a model in float64 computes in float64 throughout, and is its own oracle.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

__all__ = ["Array", "Bool", "DTypeLike", "Float", "Int", "Shaped", "at_least_fp32", "cast_matrices", "param_dtype"]


def at_least_fp32(*dtypes: DTypeLike) -> jnp.dtype:
    """The widest of `dtypes` and float32: what sums, states and norms of such arrays are held in."""
    return jnp.result_type(*dtypes, jnp.float32)


Tree = TypeVar("Tree")


def cast_matrices(tree: Tree, dtype: DTypeLike | None) -> Tree:
    """A pytree of parameters in compute dtype `dtype`, by the dtype policy: vectors in at least float32.

    None leaves every dtype as it is.
    """
    if dtype is None:
        return tree
    return jax.tree.map(lambda leaf: leaf.astype(param_dtype(leaf.ndim, dtype)), tree)


def param_dtype(ndim: int, dtype: DTypeLike) -> jnp.dtype:
    """The dtype of a parameter with `ndim` dimensions in a model of compute dtype `dtype`."""
    return jnp.dtype(dtype) if ndim > 1 else at_least_fp32(dtype)

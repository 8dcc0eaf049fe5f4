"""Looking up tokens in a table."""

import jax
import jax.numpy as jnp

from zamba2_jax.typing import Array, Bool, Float, Int


def embed(
    tokens: Int[Array, "b t"], table: Float[Array, "v d"], vocab_axis: str | None = None
) -> Float[Array, "b t d"]:
    """The row of every token.

    Args:
        tokens: ids.
        table: the rows.
        vocab_axis: inside `jax.shard_map`, the axis of the mesh that the table is divided over, by rows. Each device
            then looks up the tokens whose row it has, and the results are added up.
    """
    if vocab_axis is None:
        return table[tokens]
    index, here = own_index(tokens, table.shape[0], vocab_axis)
    return jax.lax.psum(jnp.where(here[..., None], table[index], 0), vocab_axis)


def own_index(tokens: Int[Array, "b t"], size: int, axis: str) -> tuple[Int[Array, "b t"], Bool[Array, "b t"]]:
    """Where tokens stand in this device's part, of `size` tokens, of a vocabulary divided over `axis`; and if there.

    The index of a token that is not there is 0.
    """
    index = tokens - jax.lax.axis_index(axis) * size
    here = (index >= 0) & (index < size)
    return jnp.where(here, index, 0), here

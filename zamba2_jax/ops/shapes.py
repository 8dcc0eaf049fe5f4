"""Checking the arguments of ops."""

from collections.abc import Mapping

from zamba2_jax.typing import Array


def check_shapes(x: Array, others: Mapping[str, tuple[Array | None, tuple[int, ...]]]) -> None:
    """Finds arguments that do not go with `x`, of shape [b, t, ...].

    Args:
        x: what the shapes of the others follow from.
        others: each with the shape that it is to have, by name; None is well.

    Raises:
        ValueError: x has no token, or a shape is another one.
    """
    if x.shape[1] == 0:
        raise ValueError(f"x has shape {x.shape}: expected at least one token")
    for name, (array, shape) in others.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape} for x of shape {x.shape}")

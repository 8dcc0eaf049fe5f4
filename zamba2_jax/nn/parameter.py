"""How a parameter is declared: once, with its shape, dtype, logical axes and initialiser."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jax.nn.initializers import ones, zeros

from zamba2_jax.nn.config import Mamba2Config
from zamba2_jax.parallel.mesh import Axes, constrain
from zamba2_jax.typing import Array, DTypeLike, param_dtype


class KeyStream:
    """Stands in for `nnx.Rngs` where hundreds of parameters are declared (docs/xla-notes.md: counted-keys)."""

    def __init__(self, key: jax.Array):
        self._key = key
        self._count = 0

    def params(self) -> jax.Array:
        """The next key."""
        self._count += 1
        return jax.random.fold_in(self._key, self._count)


Rngs = nnx.Rngs | KeyStream
ModuleT = TypeVar("ModuleT", bound=nnx.Module)
Initializer = Callable[[jax.Array, Sequence[int], DTypeLike], jax.Array]
"""One object for all parameters that begin alike. docs/xla-notes.md: programs-by-shape"""

normal: Callable[[float], Initializer] = functools.cache(initializers.normal)


def param(rngs: Rngs, init: Initializer, shape: tuple[int, ...], axes: Axes, dtype: DTypeLike) -> nnx.Param[Array]:
    """A parameter for a model of compute dtype `dtype`; `axes` names its dimensions for `zamba2_jax.parallel.mesh`."""
    return nnx.Param(_begin(rngs.params(), init, shape, axes, param_dtype(len(shape), dtype)), axes=axes)


@functools.partial(jax.jit, static_argnames=("init", "shape", "axes", "dtype"))
def _begin(key: jax.Array, init: Initializer, shape: tuple[int, ...], axes: Axes, dtype: DTypeLike) -> jax.Array:
    return constrain(init(key, shape, dtype), *axes)


def norm_scale(rngs: Rngs, size: int, dtype: DTypeLike, axis: str | None = None) -> nnx.Param[Array]:
    """The scale of an RMS norm over `size` channels, 1 at first."""
    return param(rngs, ones, (size,), (axis,), dtype)


def bias(rngs: Rngs, size: int, dtype: DTypeLike, axis: str | None = None) -> nnx.Param[Array]:
    """A bias over `size` channels, 0 at first."""
    return param(rngs, zeros, (size,), (axis,), dtype)


def optional_bias(
    config: Mamba2Config, rngs: Rngs, size: int, dtype: DTypeLike, axis: str | None = None
) -> nnx.Param[Array] | None:
    """A bias where `config.add_bias_linear` asks for one."""
    return bias(rngs, size, dtype, axis) if config.add_bias_linear else None


def log_one_to_n(key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
    """A_log at first: log(1), log(2), ... over the heads (arXiv:2312.00752, section 3.6, S4D-real)."""
    del key
    return jnp.log(jnp.arange(1, shape[0] + 1)).astype(dtype)


@functools.cache
def log_one_to(n: int) -> Initializer:
    """A_log of Mamba1 at first: log(1) to log(n) for every channel, [e n] (arXiv:2312.00752, section 3.6, S4D-real)."""

    def init(key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
        del key
        return jnp.tile(jnp.log(jnp.arange(1, n + 1)), shape[0] // n).astype(dtype)

    return init


@functools.cache
def uniform(bound: float) -> Initializer:
    """Uniform in [-bound, bound]."""

    def init(key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


@functools.cache
def inverse_softplus_log_uniform(low: float, high: float, floor: float) -> Initializer:
    """dt_bias at first: softplus of it is log-uniform in [low, high], at least `floor`."""

    def init(key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
        dt = jnp.exp(jax.random.uniform(key, shape, minval=jnp.log(low), maxval=jnp.log(high)))
        dt = jnp.maximum(dt, floor)
        return (dt + jnp.log(-jnp.expm1(-dt))).astype(dtype)

    return init


def named_parameters(module: nnx.Module) -> dict[str, nnx.Param[Array]]:
    """Every parameter by its path: `model.layers[3].mamba.in_z` is "layers.3.mamba.in_z"."""
    leaves, _ = jax.tree.flatten_with_path(module, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def describe(module: nnx.Module) -> list[str]:
    """A line for each kind of parameter: its path, the numbers of layers and the like put together, count and shape.

    What stands in place of parameters, as in a tree of labels, is shown as it is.
    """
    kinds: dict[tuple[str, str], list[list[str]]] = {}
    for name, leaf in named_parameters(module).items():
        value = leaf.get_value() if isinstance(leaf, nnx.Param) else leaf
        has_shape = hasattr(value, "shape") and hasattr(value, "dtype")
        text = f"{value.dtype}{list(value.shape)}" if has_shape else f"{value!r:.60}"
        path = name.split(".")
        numbers = [part for part in path if part.isdecimal()]
        kinds.setdefault((".".join("#" if part.isdecimal() else part for part in path), text), []).append(numbers)
    lines = []
    for (pattern, text), alike in kinds.items():
        for column in zip(*alike, strict=True):
            pattern = pattern.replace("#", _span([int(number) for number in column]), 1)
        lines.append(f"{pattern}: {f'{len(alike)} x ' if len(alike) > 1 else ''}{text}")
    return lines


def _span(numbers: Sequence[int]) -> str:
    first, last = numbers[0], numbers[-1]
    if first == last:
        return str(first)
    whole = list(numbers) == list(range(first, last + 1))
    return f"[{first}-{last}]" if whole else f"[{','.join(map(str, numbers))}]"


def with_values(module: ModuleT, values: Mapping[str, jax.Array]) -> ModuleT:
    """The module with the array at each parameter's path, as `named_parameters` names it, for its value."""
    leaves, structure = jax.tree.flatten(module, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    replaced = [leaf.replace(values[name]) for leaf, name in zip(leaves, named_parameters(module), strict=True)]
    return jax.tree.unflatten(structure, replaced)

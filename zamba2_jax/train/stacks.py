"""The small parameters of a model stacked up by name, for what is done to each parameter alike.

A step on fewer arrays compiles faster on a TPU (docs/xla-notes.md: stacked-parameters). Of the 1,212 parameters of 7B,
734 are vectors and taps of convolutions, which cost nothing to stack; the larger matrices would have to be copied.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.tree_util import SequenceKey

SMALL = 2**16
"""Numbers in a parameter up to which it is stacked."""

Tree = TypeVar("Tree")


class Names(NamedTuple):
    """What is in `Stacks`, as `nn.parameter.named_parameters` names it.

    Attributes:
        stacked: the parameters of each stack, in order, by its key.
        large: those that are not stacked.
    """

    stacked: tuple[tuple[str, tuple[str, ...]], ...]
    large: tuple[str, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacks:
    """Parameters, or their like.

    Attributes:
        vectors, matrices: small ones by their paths without the numbers of layers; the first axis counts them.
        large: the others, as they are.
        names: of all of them.
    """

    vectors: dict[str, Any]
    matrices: dict[str, Any]
    large: list[Any]
    names: Names = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What an array in a tree of parameters is.

    Attributes:
        names: of the parameters in it.
        stacked: whether its first axis counts them; else there is one.
    """

    names: tuple[str, ...]
    stacked: bool


def leaves_of(parameters: Any) -> Any:
    """A tree like that of the parameters, or of their `Stacks`, with a `Leaf` in place of every array."""
    if isinstance(parameters, Stacks):
        names = dict(parameters.names.stacked)
        vectors, matrices = (
            {key: Leaf(names[key], stacked=True) for key in part} for part in (parameters.vectors, parameters.matrices)
        )
        large = [Leaf((name,), stacked=False) for name in parameters.names.large]
        return Stacks(vectors, matrices, large, parameters.names)
    leaves = [Leaf((name,), stacked=False) for name in parameter_names(parameters)]
    return jax.tree.unflatten(jax.tree.structure(parameters), leaves)


def parameter_names(parameters: Any) -> list[str]:
    """The name of every parameter in a tree, in the order of its arrays."""
    paths, _ = jax.tree.flatten_with_path(parameters, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


class Stacking:
    """Trees that hold things of the structure of `model`, such as the state of an optimizer, to stacks and back.

    In place of a parameter there may be an `optax.MaskedNode`, if there is one for all that would be stacked with it.
    """

    def __init__(self, model: Any):
        paths, _ = jax.tree_util.tree_flatten_with_path(model)
        self._structure: Any = jax.tree.structure(model)
        self._keys = [
            jax.tree_util.keystr(tuple(key for key in path if not isinstance(key, SequenceKey)))
            if leaf.size <= SMALL
            else ""
            for path, leaf in paths
        ]
        self._vectors = {key for key, (_, leaf) in zip(self._keys, paths, strict=True) if leaf.ndim == 1}
        names = self._by_key(parameter_names(model))
        self._names = Names(large=tuple(names.pop("", ())), stacked=tuple((key, tuple(names[key])) for key in names))

    def stack(self, tree: Tree) -> Tree:
        """The tree with `Stacks` in place of what has the structure of the model."""
        return jax.tree.map(lambda part: self._stack(part) if self._has_it(part) else part, tree, is_leaf=self._has_it)

    def split(self, tree: Tree) -> Tree:
        """The tree that became this one."""
        return jax.tree.map(lambda part: self._split(part) if _stacked(part) else part, tree, is_leaf=_stacked)

    def _has_it(self, part: Any) -> bool:
        return jax.tree.structure(part, is_leaf=_masked) == self._structure

    def _by_key(self, leaves: list[Any]) -> dict[str, list[Any]]:
        alike: dict[str, list[Any]] = defaultdict(list)
        for key, leaf in zip(self._keys, leaves, strict=True):
            alike[key].append(leaf)
        return alike

    def _stack(self, part: Any) -> Stacks:
        alike = self._by_key(jax.tree.leaves(part, is_leaf=_masked))
        large = alike.pop("", [])
        stacks = {key: leaves[0] if _masked(leaves[0]) else jnp.stack(leaves) for key, leaves in alike.items()}
        vectors = {key: stack for key, stack in stacks.items() if key in self._vectors}
        matrices = {key: stack for key, stack in stacks.items() if key not in self._vectors}
        return Stacks(vectors, matrices, large, self._names)

    def _split(self, stacks: Stacks) -> Any:
        counts = {key: len(names) for key, names in self._names.stacked}
        parts: dict[str, Iterator[Any]] = {
            key: iter([stack] * counts[key] if _masked(stack) else jnp.unstack(stack))
            for key, stack in (stacks.vectors | stacks.matrices).items()
        }
        parts[""] = iter(stacks.large)
        return jax.tree.unflatten(self._structure, [next(parts[key]) for key in self._keys])


def _stacked(part: Any) -> bool:
    return isinstance(part, Stacks)


def _masked(part: Any) -> bool:
    return isinstance(part, optax.MaskedNode)

"""The small parameters of a model stacked up by name, for what is done to each parameter alike.

An optimizer is some twenty operations on every parameter, of which 7B has 1,212: half of what the TPU compiler has to
do for a training step. Of these 734 are vectors and taps of convolutions, which cost nothing to stack; the larger
matrices would have to be copied.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.tree_util import SequenceKey

SMALL = 2**16
"""Numbers in a parameter up to which it is stacked."""

Tree = TypeVar("Tree")


class Stacks(NamedTuple):
    """Parameters, or their like.

    Attributes:
        vectors, matrices: small ones by their paths without the numbers of layers; the first axis counts them.
        large: the others, as they are.
    """

    vectors: dict[str, Any]
    matrices: dict[str, Any]
    large: list[Any]


class Stacking:
    """Trees that hold things of the structure of `model`, such as the state of an optimizer, to stacks and back."""

    def __init__(self, model: Any):
        paths, _ = jax.tree_util.tree_flatten_with_path(model)
        self._structure: Any = jax.tree.structure(model)
        self._names = [
            jax.tree_util.keystr(tuple(key for key in path if not isinstance(key, SequenceKey)))
            if leaf.size <= SMALL
            else ""
            for path, leaf in paths
        ]

    def stack(self, tree: Tree) -> Tree:
        """The tree with `Stacks` in place of what has the structure of the model."""
        return jax.tree.map(lambda part: self._stack(part) if self._has_it(part) else part, tree, is_leaf=self._has_it)

    def split(self, tree: Tree) -> Tree:
        """The tree that became this one."""
        return jax.tree.map(lambda part: self._split(part) if _stacked(part) else part, tree, is_leaf=_stacked)

    def _has_it(self, part: Any) -> bool:
        return jax.tree.structure(part) == self._structure

    def _stack(self, part: Any) -> Stacks:
        alike: dict[str, list[Any]] = defaultdict(list)
        for name, leaf in zip(self._names, jax.tree.leaves(part), strict=True):
            alike[name].append(leaf)
        large = alike.pop("", [])
        stacks = {name: jnp.stack(leaves) for name, leaves in alike.items()}
        vectors = {name: stack for name, stack in stacks.items() if stack.ndim == 2}
        matrices = {name: stack for name, stack in stacks.items() if stack.ndim > 2}
        return Stacks(vectors, matrices, large)

    def _split(self, stacks: Stacks) -> Any:
        small = stacks.vectors | stacks.matrices
        parts: dict[str, Iterator[Any]] = {name: iter(jnp.unstack(stack)) for name, stack in small.items()}
        parts[""] = iter(stacks.large)
        return jax.tree.unflatten(self._structure, [next(parts[name]) for name in self._names])


def _stacked(part: Any) -> bool:
    return isinstance(part, Stacks)

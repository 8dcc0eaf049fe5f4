"""The one way through the layers of a model: full passes, training, prefill, steps, and one layer at a time.

A training pass at scale needs more than the layers one after the other: repeated layers by a scan, and a choice of what
the backward pass recomputes. Only the way is another: parameters stay where the model has them, and values are the
same.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from zamba2_jax.choices import Remat
from zamba2_jax.nn.cache import Cache, State
from zamba2_jax.nn.config import HybridPlan, LayerPlan, ModelConfig
from zamba2_jax.nn.context import Context
from zamba2_jax.parallel.mesh import constrain, gather_parameters
from zamba2_jax.parallel.sharded_ops import row_axes
from zamba2_jax.typing import Array, Bool, DTypeLike, Float, Int, cast_matrices

SUMS = ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up")
"""Taps of a layer or shared block at sums of matrix products: "matmuls" keeps these, and so not their terms."""
OBSERVED = ("attention.q", "attention.k")
"""Taps of a shared block whose values are in an `ObservedCall`."""

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class LayerOptions:
    """How layers are run, by default as inference runs them.

    Attributes:
        remat: what is kept for the backward pass.
        scan: runs the `groups` by a `jax.lax.scan`, and the layers of each by another, over stacked parameters, so
            that one layer and one shared block are compiled; else every one is compiled by itself. Without a cache.
        dtype: the compute dtype; by default that of the model. Gradients have the dtype of its parameters, and what
            several uses of one parameter add to its gradient is summed in that dtype.
        training: whether parameters are made whole along `fsdp` where they are used, and what shared blocks project of
            the embeddings is held in the compute dtype.
    """

    remat: Remat = "none"
    scan: bool = False
    dtype: DTypeLike | None = None
    training: bool = False


PLAIN = LayerOptions()


@runtime_checkable
class Stack(Protocol):
    """The layers, shared blocks and calls of a model: each a list, or those that are to be run by their numbers."""

    config: Any
    layers: Any
    shared: Any
    calls: Any


class ObservedCall(NamedTuple):
    """What flows at a call of a shared block.

    Attributes:
        residual: the stream that the call reads.
        output: what the call gives to its layer's mixer.
        q, k: of its attention, as they are multiplied.
        segment_ids: documents of the rows.
    """

    residual: Float[Array, "b t d"]
    output: Float[Array, "b t d"]
    q: Float[Array, "b t h p"]
    k: Float[Array, "b t kv p"]
    segment_ids: Int[Array, "b t"] | None


Observe = Callable[[ObservedCall], Any]
"""Numbers of one call, a tree of small arrays; no gradient flows through them."""


class LayersRun(NamedTuple):
    """What comes of running layers.

    Attributes:
        h: the residual stream after them.
        states, call_states: of the layers and of the calls, where a cache was given.
        tapped: values that the tap selected, by name.
        observed: what `observe` gives, stacked up over the calls: zeros where it is not to be known now, and None
            without it or without calls.
    """

    h: Float[Array, "b t d"]
    states: tuple[State, ...]
    call_states: tuple[State, ...]
    tapped: dict[str, Array]
    observed: Any


class Group(NamedTuple):
    """Layers in a row, of which none but the first may call a shared block.

    Attributes:
        layers: their indices.
        call: what the first layer calls.
    """

    layers: range
    call: HybridPlan | None


def groups(config: ModelConfig) -> list[Group]:
    """The layer plan in groups, so few that all but the first begin with a call."""
    starts = sorted({0, *config.hybrid_layers})
    ends = [*starts[1:], config.num_layers]
    return [Group(range(i, end), config.layer_plan[i].hybrid) for i, end in zip(starts, ends, strict=True)]


def are_alike(modules: Sequence[Any]) -> bool:
    """Whether they have the same parameters, of the same shapes and dtypes, so that a scan can run them."""
    kinds = {
        (jax.tree.structure(module), tuple((leaf.shape, jnp.dtype(leaf.dtype)) for leaf in jax.tree.leaves(module)))
        for module in modules
    }
    return len(kinds) == 1


def run_layers(
    stack: Stack,
    h: Float[Array, "b t d"],
    embedded: Float[Array, "b t d"],
    context: Context,
    cache: Cache | None = None,
    options: LayerOptions = PLAIN,
    observe: Observe | None = None,
    observed: Bool[Array, ""] | bool = True,
    layers: Sequence[LayerPlan] | None = None,
) -> LayersRun:
    """Layers, one after the other.

    Args:
        stack: a model, or those of its layers, blocks and calls that are to be run.
        h: the residual stream before them.
        embedded: the model's input embeddings.
        context: what all layers share.
        cache: where the rows stand.
        options: how they are run.
        observe: computes numbers of every call of a shared block.
        observed: whether they are wanted now; where not, nothing is computed for them.
        layers: rows of the layer plan; all by default.

    Raises:
        ValueError: `options.scan` with a tap, with a cache, or with layers that are not alike.
    """
    plan = stack.config.layer_plan if layers is None else layers
    functions = _Functions(options, row_axes(len(h), cached=cache is not None), observe, keep_states=cache is not None)
    blocks = {row.hybrid.block: stack.shared[row.hybrid.block] for row in plan if row.hybrid is not None}
    project = _checkpointed(functions.project, options.remat, in_scan=False)
    projected = {i: (blocks[i], project(context, blocks[i], embedded)) for i in sorted(blocks)}
    casted = cast_matrices({row.layer: stack.layers[row.layer] for row in plan}, options.dtype)
    whether = None if observe is None else jnp.asarray(observed)
    if options.scan:
        if context.tap.is_active:
            raise ValueError("scan=True with a tap: layers have no names in a scan, expected scan=False")
        if cache is not None:
            raise ValueError("scan=True with a cache: expected scan=False")
        if not are_alike(list(casted.values())):
            raise ValueError("scan=True: layers have other parameters than each other, expected scan=False")
        return _by_scan(stack, casted, list(projected.values()), h, embedded, context, whether, functions)

    states: list[Any] = []
    call_states: list[Any] = []
    observations: list[Any] = []
    tap = context.tap.fresh()
    call_kept = _checkpointed(functions.call, options.remat, in_scan=False)
    mix_kept = _checkpointed(functions.mix, options.remat, in_scan=False)
    for row in plan:
        name = f"layers.{row.layer}"
        here, at = context.scoped(name), tap.scoped(name)
        h, shared_output = at("input", h), None
        if row.hybrid is not None:
            call = stack.calls[row.hybrid.call]
            state = None if cache is None else cache.calls[row.hybrid.call]
            shared_output, state, tapped, of_call = call_kept(
                (here.scoped("shared"), whether), projected[row.hybrid.block], call, h, embedded, state
            )
            tap.values.update(tapped)
            call_states.append(state)
            observations.append(of_call)
        state = None if cache is None else cache.layers[row.layer]
        h, state, tapped = mix_kept(here, casted[row.layer], h, shared_output, state)
        tap.values.update(tapped)
        h = at("output", h)
        states.append(state)
    of_calls = _stacked(observations) if observations else None
    return LayersRun(h, tuple(states), tuple(call_states), tap.values, of_calls)


@dataclasses.dataclass(frozen=True)
class _Functions:
    """What runs at a layer: pure functions, so that `jax.checkpoint`, a branch or a scan may run them.

    `cast_matrices` of a block is inside of them, or a copy of it would be held; that of layers is outside, where it is
    one pass over all of them.
    """

    options: LayerOptions
    rows: tuple[str | None, str | None]
    observe: Observe | None
    keep_states: bool

    def project(self, context: Context, block: Any, embedded: Array) -> Any:
        """What a block has of the embeddings for all its calls."""
        block = self._used(cast_matrices(block, self.options.dtype))
        projected = block.project_embedded(embedded, context.backend)
        return jax.tree.map(lambda y: y.astype(embedded.dtype), projected) if self.options.training else projected

    def call(
        self,
        shared: tuple[Context, Array | None],
        block: tuple[Any, Any],
        call: Any,
        h: Array,
        embedded: Array,
        state: State | None,
    ) -> tuple[Array, State | None, dict[str, Array], Any]:
        """A call of a block: its output, its state after it, what the tap selected, and what is observed."""
        context, observed = shared
        module, call = (self._used(cast_matrices(part, self.options.dtype)) for part in (block[0], call))
        seen = dict[str, Array]()
        context = self._watched(context.fresh(), None if observed is None else seen)
        output, state = module(h, embedded, block[1], call, state, context)
        of_call = None
        if observed is not None and self.observe is not None:
            flows = ObservedCall(h, output, seen[OBSERVED[0]], seen[OBSERVED[1]], context.segment_ids)
            of_call = when(observed, self.observe, jax.lax.stop_gradient(flows))
        return output, state if self.keep_states else None, context.tap.values, of_call

    def mix(
        self, context: Context, layer: Any, h: Array, shared_output: Array | None, state: State | None
    ) -> tuple[Array, State | None, dict[str, Array]]:
        """A layer: the residual stream and its state after it, and what the tap selected."""
        context = self._watched(context.fresh(), None)
        h, state = self._used(layer)(h, shared_output, state, context)
        return constrain(h, *self.rows, None), state if self.keep_states else None, context.tap.values

    def _watched(self, context: Context, seen: dict[str, Array] | None) -> Context:
        """With a tap that also names `SUMS` for "matmuls", and, where they are to be seen, keeps `OBSERVED`."""
        tap, named = context.tap, self.options.remat == "matmuls"

        def edit(name: str, value: Array) -> Array:
            value = value if tap.edit is None else tap.edit(name, value)
            place = name.removeprefix(tap.scope)
            if seen is not None and place in OBSERVED:
                seen[place] = value
            return checkpoint_name(value, place) if named and place in SUMS else value

        return context.replace(tap=dataclasses.replace(tap, edit=edit)) if named or seen is not None else context

    def _used(self, module: Any) -> Any:
        return gather_parameters(module) if self.options.training else module


def when(condition: Bool[Array, ""], function: Callable[[Any], Tree], argument: Any) -> Tree:
    """`function` of the argument where the condition comes true, else zeros, for which nothing is computed."""
    return jax.lax.cond(condition, function, partial(_zeros, function), argument)


def _by_scan(
    stack: Stack,
    layers: Mapping[int, Any],
    blocks: Sequence[tuple[Any, Any]],
    h: Array,
    embedded: Array,
    context: Context,
    observed: Array | None,
    functions: _Functions,
) -> LayersRun:
    """All layers: a scan over the groups, and in it one over the layers of each, filled up to the longest group.

    Layers that only fill up a group, and the call that the first group may lack, are skipped at run time.
    """
    remat, plan = functions.options.remat, groups(stack.config)
    size = max(len(group.layers) for group in plan)

    def mix_one(at: tuple[Array, Context], layer: Any, h: Array, shared_output: Array | None) -> Array:
        # What a shared block gives is for the first layer of a group.
        given = None if shared_output is None else jnp.where(at[0] == 0, shared_output, 0)
        return functions.mix(at[1], layer, h, given, None)[0]

    mix_if = _conditional(mix_one, lambda at, layer, h, shared_output: h, remat)

    def in_layers(h: Array, shared_output: Array | None, layers: Any, length: Array) -> Array:
        def in_layer(h: Array, part: tuple[Any, Array]) -> tuple[Array, None]:
            layer, i = part
            return mix_if(i < length, (i, context), layer, h, shared_output), None

        return jax.lax.scan(in_layer, h, (layers, jnp.arange(size)))[0]

    def of_group(group: Group) -> tuple[Any, Array]:
        numbers = range(group.layers[0], group.layers[0] + size)
        return _stacked([layers[min(i, group.layers[-1])] for i in numbers]), jnp.asarray(len(group.layers))

    if not blocks:
        (group,) = plan
        return LayersRun(in_layers(h, None, *of_group(group)), (), (), {}, None)

    stacked = _stacked(blocks)

    def call_one(at: tuple[Array, tuple[Context, Array | None]], blocks: Any, call: Any, h: Array, e: Array) -> Any:
        output, _, _, of_call = functions.call(at[1], jax.tree.map(lambda leaf: leaf[at[0]], blocks), call, h, e, None)
        return output, of_call

    def call_none(*arguments: Any) -> Any:
        return _zeros(call_one, *arguments)

    call_if = _conditional(call_one, call_none, remat)
    shared = context.scoped("shared"), observed

    def in_group(h: Array, parts: tuple[Any, Array, Any, Array, Array]) -> tuple[Array, Any]:
        layers, length, call, block, calls = parts
        shared_output, of_call = call_if(calls, (block, shared), stacked, call, h, embedded)
        return in_layers(h, shared_output, layers, length), of_call

    each = [
        (
            *of_group(group),
            stack.calls[0 if group.call is None else group.call.call],
            jnp.asarray(0 if group.call is None else group.call.block),
            jnp.asarray(group.call is not None),
        )
        for group in plan
    ]
    h, of_groups = jax.lax.scan(in_group, h, _stacked(each))
    with_call = jnp.asarray([i for i, group in enumerate(plan) if group.call is not None])
    return LayersRun(h, (), (), {}, jax.tree.map(lambda numbers: numbers[with_call], of_groups))


def _conditional(function: Callable[..., Any], otherwise: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`function` of (integers, *trees of floats) where a condition comes true, else `otherwise`, in a scan.

    Where arguments are all that is kept its gradient is written out: forward again and back in one.
    """
    # docs/xla-notes.md: branches-in-scans
    if remat != "layer":
        kept = _checkpointed(function, remat, in_scan=True)
        return lambda condition, *arguments: jax.lax.cond(condition, kept, otherwise, *arguments)

    @jax.custom_vjp
    def choose(condition: Array, integers: Any, *trees: Any) -> Any:
        return jax.lax.cond(condition, function, otherwise, integers, *trees)

    def forward(*arguments: Any) -> tuple[Any, Any]:
        return choose(*arguments), arguments

    def backward(arguments: Any, cotangent: Any) -> tuple[Any, ...]:
        condition, integers, *trees = arguments

        def pulled(branch: Callable[..., Array]) -> Callable[..., Any]:
            return lambda cotangent, *trees: jax.vjp(partial(branch, integers), *trees)[1](cotangent)

        return None, None, *jax.lax.cond(condition, pulled(function), pulled(otherwise), cotangent, *trees)

    choose.defvjp(forward, backward)
    return choose


def _checkpointed(function: Callable[..., Tree], remat: Remat, *, in_scan: bool) -> Callable[..., Tree]:
    """The function, keeping no more than `remat` says; the compiler cannot undo it inside a scan."""
    if remat == "none":
        return function
    policies = jax.checkpoint_policies
    products, sums = policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(*SUMS)
    policy = policies.save_from_both_policies(products, sums) if remat == "matmuls" else None
    return jax.checkpoint(function, policy=policy, prevent_cse=not in_scan)


def _zeros(function: Callable[..., Tree], *arguments: Any) -> Tree:
    """Zeros in the shape of what the function gives."""
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(function, *arguments))


def _stacked(trees: Sequence[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

"""A full pass as a training step runs it: repeated layers by a scan, and a choice of what the backward pass recomputes.

Only the way is another: parameters stay where `Zamba2` has them, and values are those of `Zamba2.hidden_states`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from zamba2_jax.choices import Remat
from zamba2_jax.config import HybridPlan, Zamba2Config
from zamba2_jax.model.divided import embed
from zamba2_jax.model.mamba import MambaLayer
from zamba2_jax.model.shared import Projected, SharedBlock, SharedCall
from zamba2_jax.model.tap import no_tap
from zamba2_jax.model.zamba2 import Zamba2, default_positions
from zamba2_jax.ops.norm import rms_norm
from zamba2_jax.ops.ssd import Implementation
from zamba2_jax.sharding import constrain, gather_parameters
from zamba2_jax.typing import Array, Bool, DTypeLike, Float, Int, cast_matrices

SUMS = ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up")
"""Taps of a shared block at sums of matrix products: "matmuls" keeps these, and so not their terms."""

Tree = TypeVar("Tree")


class Documents(NamedTuple):
    """What is the same at every layer and has no gradient.

    Attributes:
        positions, segment_ids: where the tokens of packed rows belong; see `Zamba2.__call__`.
        observed: whether calls are observed; None where nothing observes them.
    """

    positions: Int[Array, "b t"]
    segment_ids: Int[Array, "b t"] | None
    observed: Bool[Array, ""] | None = None


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

Block = tuple[SharedBlock, Projected]
"""A shared block, and what it has projected of the embeddings."""
CallShared = Callable[[Documents, Block, SharedCall, Array, Array], tuple[Array, Any]]
Mix = Callable[[Documents, MambaLayer, Array, Array | None], Array]


class Group(NamedTuple):
    """Layers in a row, of which none but the first may call a shared block.

    Attributes:
        layers: their indices.
        call: what the first layer calls.
    """

    layers: range
    call: HybridPlan | None


def groups(config: Zamba2Config) -> list[Group]:
    """The layer plan in groups, so few that all but the first begin with a call."""
    starts = sorted({0, *config.hybrid_layer_ids})
    ends = [*starts[1:], config.num_layers]
    return [Group(range(i, end), config.layer_plan[i].hybrid) for i, end in zip(starts, ends, strict=True)]


def hidden_states(
    model: Zamba2,
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"] | None = None,
    *,
    remat: Remat = "none",
    scan: bool = False,
    dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
    observe: Observe | None = None,
    observed: Bool[Array, ""] | bool = True,
) -> tuple[Float[Array, "b t d"], Any]:
    """`Zamba2.hidden_states` of whole rows, with the memory and the compile time of training at scale.

    Args:
        model: the model. Gradients have the dtype of its parameters, and what several uses of one parameter add to
            its gradient is summed in that dtype.
        tokens: ids in [0, v).
        segment_ids: documents packed in a row; see `Zamba2.__call__`.
        remat: what is kept for the backward pass.
        scan: runs the `groups` by a `jax.lax.scan`, and the layers of each by another, over stacked parameters, so
            that one layer and one shared block are compiled; else every one is compiled by itself.
        dtype: the compute dtype; by default that of the model.
        implementation: of the scan of Mamba2; see `ops.ssd`.
        observe: what is to be known of every call of a shared block.
        observed: whether it is to be known now; where not, nothing is computed for it.

    Returns:
        The hidden states, and what `observe` gives, stacked up over the calls: zeros where it is not to be known now,
        and None without it or without calls.
    """
    embedded = embed(tokens, model.embed[...], cached=False).astype(dtype or model.dtype)
    h = embedded = constrain(embedded, "batch", "time", None)
    layers = cast_matrices(list(model.layers), dtype)
    documents = Documents(
        default_positions(embedded, segment_ids), segment_ids, None if observe is None else jnp.asarray(observed)
    )

    def call_shared(documents: Documents, block: Block, call: SharedCall, h: Array, embedded: Array) -> Any:
        shared = gather_parameters(cast_matrices(block[0], dtype))
        call = gather_parameters(cast_matrices(call, dtype))
        tap = _name_sums if remat == "matmuls" else no_tap
        if observe is None or documents.observed is None:
            return shared(h, embedded, block[1], call, *documents[:2], tap=tap)[0], None
        seen: dict[str, Array] = {}

        def see(name: str, value: Array) -> Array:
            value = tap(name, value)
            if name in ("attention.q", "attention.k"):
                seen[name] = value
            return value

        output = shared(h, embedded, block[1], call, *documents[:2], tap=see)[0]
        of_call = ObservedCall(h, output, seen["attention.q"], seen["attention.k"], documents.segment_ids)
        return output, when(documents.observed, observe, jax.lax.stop_gradient(of_call))

    def mix(documents: Documents, layer: MambaLayer, h: Array, given: Array | None) -> Array:
        layer = gather_parameters(layer)
        h = layer(h, given, None, documents.segment_ids, implementation=implementation)[0]
        return constrain(h, "batch", "time", None)

    def project(shared: SharedBlock, embedded: Array) -> Projected:
        shared = gather_parameters(cast_matrices(shared, dtype))
        # Held through the whole pass, so in the compute dtype.
        return [y.astype(embedded.dtype) for y in shared.project_embedded(embedded)]

    project = _checkpointed(project, remat, in_scan=False)
    blocks = [(shared, project(shared, embedded)) for shared in model.shared]
    if scan:
        h, of_calls = _by_scan(model, layers, blocks, embedded, documents, call_shared, mix, remat)
    else:
        of_each = []
        call_kept, mix_kept = (_checkpointed(function, remat, in_scan=False) for function in (call_shared, mix))
        for row, layer in zip(model.config.layer_plan, layers, strict=True):
            given = None
            if row.hybrid is not None:
                block, call = blocks[row.hybrid.block], model.calls[row.hybrid.call]
                given, of_call = call_kept(documents, block, call, h, embedded)
                of_each.append(of_call)
            h = mix_kept(documents, layer, h, given)
        of_calls = _stack(of_each) if of_each else None
    return rms_norm(h, model.norm[...], model.config.rms_norm_eps), of_calls


def when(condition: Bool[Array, ""], function: Callable[[Any], Tree], argument: Any) -> Tree:
    """`function` of the argument where the condition comes true, else zeros, for which nothing is computed."""
    return jax.lax.cond(condition, function, partial(_zeros, function), argument)


def _by_scan(
    model: Zamba2,
    layers: Sequence[MambaLayer],
    blocks: Sequence[Block],
    embedded: Array,
    documents: Documents,
    call_shared: CallShared,
    mix: Mix,
    remat: Remat,
) -> tuple[Array, Any]:
    """All layers, and what is observed of the calls.

    A scan over the groups, and in it one over the layers of each, filled up to the longest group.

    What fills up, and the call that the first group may lack, is passed over when it runs.
    """
    plan, stacked = groups(model.config), _stack(blocks)
    size = max(len(group.layers) for group in plan)

    def call_one(at: tuple[Array, Documents], blocks: Any, call: SharedCall, h: Array, embedded: Array) -> Any:
        return call_shared(at[1], jax.tree.map(lambda leaf: leaf[at[0]], blocks), call, h, embedded)

    def call_none(*arguments: Any) -> Any:
        return _zeros(call_one, *arguments)

    def mix_one(at: tuple[Array, Documents], layer: MambaLayer, h: Array, given: Array) -> Array:
        return mix(at[1], layer, h, jnp.where(at[0] == 0, given, 0))

    call_if = _conditional(call_one, call_none, remat)
    mix_if = _conditional(mix_one, lambda at, layer, h, given: h, remat)

    def in_group(h: Array, parts: tuple[MambaLayer, SharedCall, Array, Array, Array]) -> tuple[Array, Any]:
        layers, call, block, calls, length = parts
        given, of_call = call_if(calls, (block, documents), stacked, call, h, embedded)

        def in_layer(h: Array, part: tuple[MambaLayer, Array]) -> tuple[Array, None]:
            layer, i = part
            return mix_if(i < length, (i, documents), layer, h, given), None

        return jax.lax.scan(in_layer, h, (layers, jnp.arange(size)))[0], of_call

    each = [
        (
            _stack([layers[min(i, group.layers[-1])] for i in range(group.layers[0], group.layers[0] + size)]),
            model.calls[0 if group.call is None else group.call.call],
            jnp.asarray(0 if group.call is None else group.call.block),
            jnp.asarray(group.call is not None),
            jnp.asarray(len(group.layers)),
        )
        for group in plan
    ]
    h, of_groups = jax.lax.scan(in_group, embedded, _stack(each))
    with_call = [i for i, group in enumerate(plan) if group.call is not None]
    return h, jax.tree.map(lambda numbers: numbers[jnp.asarray(with_call)], of_groups) if with_call else None


def _conditional(function: Callable[..., Any], otherwise: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`function` of (integers, *trees of floats) where a condition comes true, else `otherwise`, in a scan.

    The derivative of `jax.lax.cond` has what a branch keeps among its results, and a scan stacks them up, even what all
    turns have in common. So where arguments are all that is kept it is written out here: forward again and back in one.
    """
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


def _name_sums(name: str, value: Array) -> Array:
    """The tap that shows `_checkpointed` the `SUMS`."""
    return checkpoint_name(value, name) if name in SUMS else value


def _zeros(function: Callable[..., Tree], *arguments: Any) -> Tree:
    """Zeros in the shape of what the function gives."""
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(function, *arguments))


def _stack(trees: Sequence[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

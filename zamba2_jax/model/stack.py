"""A full pass as a training step runs it: repeated layers by a scan, and a choice of what the backward pass recomputes.

Only the way is another: parameters stay where `Zamba2` has them, and values are those of `Zamba2.hidden_states`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from zamba2_jax.config import HybridPlan, Zamba2Config
from zamba2_jax.model.divided import embed
from zamba2_jax.model.mamba import MambaLayer
from zamba2_jax.model.shared import Projected, SharedBlock, SharedCall, project_embedded
from zamba2_jax.model.zamba2 import Zamba2, default_positions
from zamba2_jax.ops.norm import rms_norm
from zamba2_jax.ops.ssd import Implementation
from zamba2_jax.sharding import constrain, gather_parameters
from zamba2_jax.typing import Array, DTypeLike, Float, Int, cast_matrices

Remat = Literal["none", "layer", "matmuls"]
"""What the forward pass keeps for the backward one: all; the input of each layer; the results of its matrix products
too, all else being recomputed."""

Tree = TypeVar("Tree")


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
) -> Float[Array, "b t d"]:
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
    """
    embedded = embed(tokens, model.embed[...], cached=False).astype(dtype or model.dtype)
    h = constrain(embedded, "batch", "time", None)
    positions = default_positions(embedded, segment_ids)
    layers = cast_matrices(list(model.layers), dtype)
    checkpointed = _checkpointed(remat, in_scan=scan)

    @checkpointed
    def call_shared(
        shared: SharedBlock, call: SharedCall, h: Array, embedded: Array, projected: Projected | None = None
    ) -> Array:
        shared = gather_parameters(cast_matrices(shared, dtype))
        call = gather_parameters(cast_matrices(call, dtype))
        return shared(h, embedded, call, positions, segment_ids, None, projected)[0]

    @checkpointed
    def mix(layer: MambaLayer, h: Array, given: Array | None) -> Array:
        layer = gather_parameters(layer)
        return constrain(layer(h, given, None, segment_ids, implementation=implementation)[0], "batch", "time", None)

    if scan:
        h = _by_scan(model, layers, h, embedded, call_shared, mix)
    else:
        projected = project_embedded(model.config, cast_matrices(list(model.shared), dtype), embedded)
        for row, layer in zip(model.config.layer_plan, layers, strict=True):
            given = None
            if row.hybrid is not None:
                block, call = model.shared[row.hybrid.block], model.calls[row.hybrid.call]
                given = call_shared(block, call, h, embedded, projected[row.hybrid.block])
            h = mix(layer, h, given)
    return rms_norm(h, model.norm[...], model.config.rms_norm_eps)


def _by_scan(
    model: Zamba2,
    layers: Sequence[MambaLayer],
    h: Array,
    embedded: Array,
    call_shared: Callable[[SharedBlock, SharedCall, Array, Array], Array],
    mix: Callable[[MambaLayer, Array, Array | None], Array],
) -> Array:
    """All layers: a scan over the groups, and in it one over the layers of each, filled up to the longest group.

    What fills up, and the call that the first group may lack, is passed over when it runs.
    """
    plan = groups(model.config)
    size = max(len(group.layers) for group in plan)

    def in_group(h: Array, parts: tuple[MambaLayer, SharedCall, Array, Array, Array]) -> tuple[Array, None]:
        layers, call, block, calls, length = parts
        shared = jax.tree.map(lambda leaf: leaf[block], blocks)
        given = jax.lax.cond(
            calls, call_shared, lambda shared, call, h, embedded: jnp.zeros_like(h), shared, call, h, embedded
        )

        def in_layer(h: Array, part: tuple[MambaLayer, Array]) -> tuple[Array, None]:
            layer, i = part

            def run(layer: MambaLayer, h: Array, given: Array, i: Array) -> Array:
                return mix(layer, h, jnp.where(i == 0, given, 0))

            return jax.lax.cond(i < length, run, lambda layer, h, given, i: h, layer, h, given, i), None

        return jax.lax.scan(in_layer, h, (layers, jnp.arange(size)))[0], None

    blocks = _stack(model.shared)
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
    return jax.lax.scan(in_group, h, _stack(each))[0]


def _checkpointed(remat: Remat, *, in_scan: bool) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """What makes a function keep no more than `remat` says; the compiler cannot undo it inside a scan."""
    if remat == "none":
        return lambda function: function
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "matmuls" else None
    return partial(jax.checkpoint, policy=policy, prevent_cse=not in_scan)


def _stack(trees: Sequence[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

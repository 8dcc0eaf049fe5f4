"""A full pass as a training step runs it: repeated layers by a scan, and a choice of what the backward pass recomputes.

Only the way is another: parameters stay where `Zamba2` has them, and values are those of `Zamba2.hidden_states`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from zamba2_jax.config import Zamba2Config
from zamba2_jax.model.divided import embed
from zamba2_jax.model.mamba import MambaLayer
from zamba2_jax.model.shared import SharedBlock, SharedCall
from zamba2_jax.model.zamba2 import Zamba2, default_positions
from zamba2_jax.ops.norm import rms_norm
from zamba2_jax.ops.ssd import Implementation
from zamba2_jax.sharding import constrain, constrain_parameters
from zamba2_jax.typing import Array, DTypeLike, Float, Int, cast_matrices

Remat = Literal["none", "layer", "matmuls"]
"""What the forward pass keeps for the backward one: all; the input of each layer; the results of its matrix products
too, all else being recomputed."""

Tree = TypeVar("Tree")


class Stretch(NamedTuple):
    """Layers in a row that repeat one pattern: a hybrid layer or none, then plain ones.

    Attributes:
        hybrid: whether the pattern begins with a hybrid layer.
        plain: plain layers in the pattern.
        times: how often it stands there.
    """

    hybrid: bool
    plain: int
    times: int


def stretches(config: Zamba2Config) -> list[Stretch]:
    """The layer plan as the fewest stretches: what compiles once, and how often it runs."""
    starts = sorted({0, *config.hybrid_layer_ids})
    found: list[Stretch] = []
    for start, end in zip(starts, [*starts[1:], config.num_layers], strict=True):
        hybrid = config.layer_plan[start].hybrid is not None
        group = Stretch(hybrid, end - start - hybrid, 1)
        if found and found[-1][:2] == group[:2]:
            group = group._replace(times=found.pop().times + 1)
        found.append(group)
    return found


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
        scan: runs the repetitions of each of the `stretches` by one `jax.lax.scan` over their stacked parameters, so
            that the pattern compiles once; else every layer is compiled by itself.
        dtype: the compute dtype; by default that of the model.
        implementation: of the scan of Mamba2; see `ops.ssd`.
    """
    embedded = embed(tokens, model.embed[...], cached=False).astype(dtype or model.dtype)
    h = constrain(embedded, "batch", "time", None)
    positions = default_positions(embedded, segment_ids)
    at_once = _checkpointed(remat, in_scan=scan)

    @at_once
    def call_shared(block: SharedBlock, call: SharedCall, h: Array, embedded: Array) -> Array:
        block, call = (constrain_parameters(cast_matrices(part, dtype)) for part in (block, call))
        return block(h, embedded, call, positions, segment_ids)[0]

    @at_once
    def mix(layer: MambaLayer, h: Array, given: Array | None) -> Array:
        layer = constrain_parameters(layer)
        return constrain(layer(h, given, None, segment_ids, implementation=implementation)[0], "batch", "time", None)

    def plain(h: Array, layer: MambaLayer) -> tuple[Array, None]:
        return mix(layer, h, None), None

    def hybrid(h: Array, parts: tuple[MambaLayer, SharedCall, Array | int]) -> Array:
        layer, call, block = parts
        return mix(layer, h, call_shared(_pick(model.shared, block), call, h, embedded))

    if scan:
        h = _by_scan(model, h, plain, hybrid, dtype)
    else:
        for row, layer in zip(model.config.layer_plan, cast_matrices(model.layers, dtype), strict=True):
            if row.hybrid is None:
                h, _ = plain(h, layer)
            else:
                h = hybrid(h, (layer, model.calls[row.hybrid.call], row.hybrid.block))
    return rms_norm(h, model.norm[...], model.config.rms_norm_eps)


def _by_scan(
    model: Zamba2,
    h: Array,
    plain: Callable[[Array, MambaLayer], tuple[Array, None]],
    hybrid: Callable[[Array, tuple[MambaLayer, SharedCall, Array]], Array],
    dtype: DTypeLike | None,
) -> Array:
    """All layers, one scan for each stretch and in it one for its plain layers."""
    layers, calls = list(cast_matrices(model.layers, dtype)), list(model.calls)
    blocks = [row.hybrid.block for row in model.config.layer_plan if row.hybrid is not None]

    def group(h: Array, parts: tuple[tuple[MambaLayer, SharedCall, Array] | None, MambaLayer | None]):
        first, rest = parts
        if first is not None:
            h = hybrid(h, first)
        return (h if rest is None else jax.lax.scan(plain, h, rest)[0]), None

    for has_hybrid, size, times in stretches(model.config):
        taken = [_take(layers, has_hybrid + size) for _ in range(times)]
        first = rest = None
        if has_hybrid:
            heads = [own[0] for own in taken]
            first = _stack(heads), _stack(_take(calls, times)), jnp.asarray(_take(blocks, times))
        if size:
            rest = _stack([_stack(own[-size:]) for own in taken])
        h, _ = jax.lax.scan(group, h, (first, rest))
    return h


def _checkpointed(remat: Remat, *, in_scan: bool) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """What makes a function keep no more than `remat` says; the compiler cannot undo it inside a scan."""
    if remat == "none":
        return lambda function: function
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "matmuls" else None
    return partial(jax.checkpoint, policy=policy, prevent_cse=not in_scan)


def _pick(blocks: Sequence[SharedBlock], index: Array | int) -> SharedBlock:
    """A shared block by its index, known when compiling or not."""
    if isinstance(index, int):
        return blocks[index]
    return blocks[0] if len(blocks) == 1 else jax.tree.map(lambda leaf: leaf[index], _stack(blocks))


def _stack(trees: Sequence[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _take(items: list[Tree], count: int) -> list[Tree]:
    """Removes the first `count` items and returns them."""
    taken = items[:count]
    del items[:count]
    return taken

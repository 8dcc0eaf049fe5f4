"""Whether a run uses all parts of its model: numbers of a step, and what in them is wrong. See docs/health.md."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zamba2_jax.models.layers import ObservedCall
from zamba2_jax.ops.attention_entropy import attention_entropy
from zamba2_jax.train.metrics import CallHealth, GroupHealth, HealthRecord
from zamba2_jax.train.patterns import matches
from zamba2_jax.train.stacks import leaves_of
from zamba2_jax.typing import Array, Float, at_least_fp32

GROUPS = {
    "embed": "embedding",
    "layers.*.mlp*": "mlps",
    "layers.*": "mixers",
    "shared.*": "shared_blocks",
    "calls.*.linear": "linears",
    "calls.*": "adapters",
    "norm": "head",
    "head": "head",
}
"""Groups of parameters by the first of these patterns that a parameter's path matches: "linears" are the maps after
the shared blocks, "head" is the final norm and the output matrix, where it is not the embedding."""

DROWNS = 5.0
"""Rms of a shared output over that of the residual from which on it drowns the residual."""
IDLE = 0.02
"""The same below which a call is idle."""
UNIFORM = 0.98
"""Entropy of the head that looks least evenly, over that of uniform attention, from which on attention is uniform."""
STOPPED = 1e-3
"""Rms of a group's update over the learning rate below which the group has stopped moving; AdamW's is 0.1 to 1."""
IN_A_ROW = 3
"""Measurements in a row that a fault has to stay for before it is said."""
SETTLED = 0.1
"""Share of a run that it has to stay for besides, if a run may begin with it."""

PAGE = "docs/health.md"


@struct.dataclass
class CallSums:
    """Sums over the tokens of a batch, of one call of a shared block or, stacked up, of each.

    Attributes:
        output, residual: squares of the norms of the call's output and of the residual stream.
        share: of each token's mixer input, before its norm, the share that comes from the call: t (h + t) / |h + t|^2.
        tokens: without padding.
        entropy: of each head; see `ops.attention_entropy`.
        queries: over which it is summed.
    """

    output: Float[Array, "*calls"]
    residual: Float[Array, "*calls"]
    share: Float[Array, "*calls"]
    tokens: Float[Array, "*calls"]
    entropy: Float[Array, "*calls h"]
    queries: Float[Array, "*calls"]


@struct.dataclass
class Health:
    """The numbers of one step, as arrays.

    Attributes:
        calls: sums over the batch for each call of a shared block; None in a model without calls.
        gradients: norm of the gradient of each of `GROUPS`, before clipping.
        updates: norm of what the step adds to the parameters of each group, over that of the parameters.
        steps: rms of what the step adds to the parameters of each group.
    """

    calls: CallSums | None
    gradients: Mapping[str, Float[Array, ""]]
    updates: Mapping[str, Float[Array, ""]]
    steps: Mapping[str, Float[Array, ""]]


def call_sums(call: ObservedCall, scale: float) -> CallSums:
    """The sums of one call; `scale` is that of its attention's scores."""
    wide = at_least_fp32(call.residual.dtype)
    h, t = call.residual.astype(wide), call.output.astype(wide)
    real = jnp.ones(h.shape[:2], bool) if call.segment_ids is None else call.segment_ids != 0
    u = h + t
    share = jnp.sum(t * u, axis=-1) / jnp.maximum(jnp.sum(u * u, axis=-1), jnp.finfo(wide).tiny)
    entropy, queries = attention_entropy(call.q, call.k, scale, call.segment_ids)

    def over_tokens(of_token: Array) -> Array:
        return jnp.sum(of_token, where=real)

    return CallSums(
        output=over_tokens(jnp.sum(t * t, axis=-1)),
        residual=over_tokens(jnp.sum(h * h, axis=-1)),
        share=over_tokens(share),
        tokens=real.sum(dtype=wide),
        entropy=entropy,
        queries=queries,
    )


def group_sizes(gradient: Any, before: Any, after: Any) -> tuple[dict[str, Array], ...]:
    """The `gradients`, `updates` and `steps` of `Health`.

    Args:
        gradient: a tree of parameters, or of their `Stacks`.
        before, after: the parameters before and after the step, in the same form.
    """
    change = jax.tree.map(lambda new, old: new.astype(at_least_fp32(new.dtype)) - old, after, before)
    sizes: dict[str, int] = {}
    for group, array in _by_group(before):
        sizes[group] = sizes.get(group, 0) + array.size
    gradients, weights, changes = map(_norms, (gradient, before, change))
    updates = {group: changes[group] / jnp.maximum(weights[group], 1e-30) for group in sizes}
    return gradients, updates, {group: changes[group] / math.sqrt(sizes[group]) for group in sizes}


def group_of(name: str) -> str:
    """The group of a parameter, by its path; see `GROUPS`."""
    return next(group for pattern, group in GROUPS.items() if matches(name, pattern))


def _norms(tree: Any) -> dict[str, Array]:
    """Of each group."""
    squares: dict[str, Array] = {}
    for group, array in _by_group(tree):
        square = jnp.sum(jnp.square(array.astype(at_least_fp32(array.dtype))))
        squares[group] = squares[group] + square if group in squares else square
    return {group: jnp.sqrt(square) for group, square in squares.items()}


def _by_group(tree: Any) -> list[tuple[str, Array]]:
    """Every array with its group; a stack holds parameters that are alike, and so of one group."""
    leaves = jax.tree.leaves(leaves_of(tree))
    return [(group_of(leaf.names[0]), array) for leaf, array in zip(leaves, jax.tree.leaves(tree), strict=True)]


def health_record(health: Health, layers: Sequence[int], *, phase: str, step: int, rate: float) -> HealthRecord:
    """The numbers of a step.

    Args:
        health: as the step gives it.
        layers: that call a shared block, in their order.
        phase, step: for the record.
        rate: the learning rate of the step.
    """
    health = jax.device_get(health)
    calls = {}
    if health.calls is not None:
        sums = jax.tree.map(lambda array: np.asarray(array, np.float64), health.calls)
        with np.errstate(invalid="ignore", divide="ignore"):  # of batches without a token: NaN
            ratio, share = np.sqrt(sums.output / sums.residual), sums.share / sums.tokens
            entropy = sums.entropy / sums.queries[:, None]
        for call, layer in enumerate(layers):
            calls[f"layers.{layer}"] = CallHealth(
                ratio=float(ratio[call]), share=float(share[call]), entropy=tuple(map(float, entropy[call]))
            )
    groups = {
        group: GroupHealth(
            grad_norm=float(gradient),
            update=float(health.updates[group]),
            step=float(health.steps[group]) / rate if rate > 0 else math.nan,
        )
        for group, gradient in health.gradients.items()
    }
    return HealthRecord(phase=phase, step=step, calls=calls, groups=groups)


def worst(record: HealthRecord) -> str:
    """The worst on one line.

    That is the call furthest from the middle between idle and drowning, the call whose attention is the most uniform,
    and the group that moves least.
    """
    texts = []
    if record.calls:
        middle = math.sqrt(DROWNS * IDLE)
        layer = max(record.calls, key=lambda layer: abs(math.log(max(record.calls[layer].ratio, 1e-30) / middle)))
        texts.append(f"shared/residual {record.calls[layer].ratio:.3g} in {layer}")
        layer = max(record.calls, key=lambda layer: min(record.calls[layer].entropy))
        texts.append(f"attention {min(record.calls[layer].entropy):.2f} uniform in {layer}")
    group = min(record.groups, key=lambda group: record.groups[group].step)
    texts.append(f"{group} move {record.groups[group].step:.2g}")
    return ", ".join(texts)


class HealthWatch:
    """Finds what has gone wrong in a run, and says each fault of each part once."""

    def __init__(self, steps: int):
        """`steps` is the length of the run."""
        self._steps = steps
        self._lasting: dict[str, list[int]] = {}
        self._said: set[str] = set()

    def __call__(self, record: HealthRecord) -> list[str]:
        """What is to be said after one more measurement, a sentence each."""
        faults = dict(_faults(record))
        self._lasting = {key: [*self._lasting.get(key, []), record.step] for key in faults}
        due = [key for key, steps in self._lasting.items() if key not in self._said and self._is_due(key, steps)]
        self._said.update(due)
        return [f"{faults[key]} (step {record.step}; see {PAGE})" for key in due]

    def _is_due(self, key: str, steps: Sequence[int]) -> bool:
        """Whether a fault has lasted, having been measured at these steps."""
        settled = not key.startswith(_AS_AT_FIRST) or steps[-1] - steps[0] >= SETTLED * self._steps
        return len(steps) >= IN_A_ROW and settled


_AS_AT_FIRST = ("idle", "uniform", "stopped")
"""Faults that a model has at initialisation, or where the learning rate of a group is delayed."""


def _faults(record: HealthRecord) -> Iterator[tuple[str, str]]:
    """By kind and place, what is wrong."""
    for layer, call in record.calls.items():
        if call.ratio > DROWNS:
            yield (
                f"drowned {layer}",
                f"{layer}: the shared block drowns the residual stream, its output is {call.ratio:.3g} times as large, "
                "and the layer's mixer hardly sees its own input",
            )
        if call.ratio < IDLE:
            yield (
                f"idle {layer}",
                f"{layer}: the shared block is idle, its output is {call.ratio:.2g} times the residual stream",
            )
        if min(call.entropy) > UNIFORM:
            yield (
                f"uniform {layer}",
                f"{layer}: attention stays uniform, the head that looks least evenly has {min(call.entropy):.3f} of "
                "the entropy of a mean over all tokens",
            )
    for name, group in record.groups.items():
        if math.isfinite(group.grad_norm) and group.step < STOPPED:
            yield (
                f"stopped {name}",
                f"{name}: the parameters have stopped moving, a step changes them by {group.step:.1g} of the learning "
                "rate",
            )

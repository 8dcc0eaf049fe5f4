"""The model one layer at a time, forward and backward, in any precision: the float64 oracle, and models of any size."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct

from zamba2_jax.models.base import LanguageModel, default_positions
from zamba2_jax.models.layers import run_layers
from zamba2_jax.nn.config import HybridPlan, LayerPlan, ModelConfig
from zamba2_jax.nn.context import Context
from zamba2_jax.nn.parameter import named_parameters
from zamba2_jax.nn.tap import Tap
from zamba2_jax.ops.backend import Backend
from zamba2_jax.parity.case import Batch
from zamba2_jax.parity.evidence import Items
from zamba2_jax.parity.states import States
from zamba2_jax.typing import Array, at_least_fp32, cast_matrices


class Precision(NamedTuple):
    """How a side computes.

    Attributes:
        dtype: compute dtype; by name.
        backend: how ops are computed.
        matmul: precision of matrix products, as for `jax.default_matmul_precision`.
    """

    dtype: str
    backend: Backend
    matmul: str = "default"


ORACLE = Precision("float64", Backend.reference())
"""The definitions in plain jnp, with gradients of JAX's making."""

IN_LITTLE_MEMORY: dict[str, str | bool] = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
"""Has XLA order operations by the memory they hold. docs/xla-notes.md: memory-ordered-schedule"""


class Parts(struct.PyTreeNode):
    """The modules that run at one layer, each as number 0, whichever it is; block and call are missing at a plain one.

    Attributes:
        config: the architecture.
        layers, shared, calls: by number.
    """

    config: ModelConfig = struct.field(pytree_node=False)
    layers: dict[int, Any]
    shared: dict[int, Any]
    calls: dict[int, Any]


class Ends(NamedTuple):
    """The parameters before and after the layers; head is None where it is tied."""

    embed: Array
    norm: Array
    head: Array | None


def parts_of(model: LanguageModel) -> tuple[Ends, Callable[[LayerPlan], Parts]]:
    """A whole model as `evidence` takes it."""

    def parts(row: LayerPlan) -> Parts:
        if row.hybrid is None:
            return Parts(model.config, {0: model.layers[row.layer]}, {}, {})
        block, call = model.shared[row.hybrid.block], model.calls[row.hybrid.call]
        return Parts(model.config, {0: model.layers[row.layer]}, {0: block}, {0: call})

    return Ends(model.embed[...], model.norm[...], None if model.head is None else model.head[...]), parts


def with_settings(items: Iterator[Items], precision: Precision) -> Iterator[Items]:
    """Runs every step of a generator, and nothing between them, with the settings of JAX that a precision wants."""
    while True:
        with jax.enable_x64(precision.dtype == "float64"), jax.default_matmul_precision(precision.matmul):
            step = next(items, None)
        if step is None:
            return
        yield step
        del step  # or it would be held while the next one is computed


@cache
def compiler_options() -> dict[str, str | bool]:
    """`IN_LITTLE_MEMORY` on CPU, where this version of XLA knows it; else none."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=IN_LITTLE_MEMORY)()
    except jax.errors.JaxRuntimeError:
        return {}
    return IN_LITTLE_MEMORY


def evidence(
    config: ModelConfig,
    ends: Ends,
    parts: Callable[[LayerPlan], Parts],
    batch: Batch,
    states: States,
    precision: Precision,
    *,
    gradients: bool,
    sum_calls: bool,
) -> Iterator[Items]:
    """All that parity compares but the greedy continuation: forward layer by layer, then backward.

    A generator that wants `with_settings` around it.

    Args:
        config: the architecture.
        ends: the parameters outside the layers.
        parts: gives the modules of a layer; asked once on the way forth and once back.
        batch: the tokens.
        states: what a layer carries.
        precision: to compute in.
        gradients: whether to go backward at all.
        sum_calls: whether the gradient of what is used more than once is summed, and given at the end; else it is given
            use by use, and memory holds one at a time: a shared block's as "gradient.calls.i.block", in float32 as all
            of a layer's, that of tied embeddings as "gradient.embed" for the input and "gradient.head" for the output.
    """
    compiled = partial(jax.jit, compiler_options=compiler_options())
    forward = compiled(_forward, static_argnames=("precision", "taps"))
    backward = compiled(_backward, static_argnames=("precision", "kept"))
    head = compiled(_head, static_argnames=("eps", "precision", "gradients"))
    real = batch.real[..., None]
    segment_ids = None if batch.segment_ids is None else jnp.asarray(batch.segment_ids)
    tokens = jnp.asarray(batch.tokens)
    embedded = cast_matrices(ends.embed[tokens], precision.dtype)
    h = embedded.astype(at_least_fp32(embedded.dtype)) if config.residual_in_fp32 else embedded
    yield {"embed": np.asarray(embedded) * real}
    inputs = []
    for row in config.layer_plan:
        inputs.append(h)
        h, tapped = forward(parts(row), h, embedded, segment_ids, precision, states.taps)
        at, values = f"layers.{row.layer}", {name: np.asarray(value) for name, value in tapped.items()}
        named = states.from_taps(config, values, batch.real).items()
        yield {f"{at}.output": np.asarray(h) * real} | {f"{at}.{name}": state for name, state in named}

    loss, logits, back = head(config.rms_norm_eps, ends, h, tokens, segment_ids, precision, gradients)
    yield {"logits": np.asarray(logits) * real}
    if tokens.shape[1] == 1:
        return
    yield {"loss": np.asarray(loss)}
    if not gradients:
        return
    cotangent, d_norm, d_matrix = back
    yield {"gradient.norm": np.asarray(d_norm)}
    if ends.head is not None or not sum_calls:
        yield {"gradient.head": np.asarray(d_matrix)}
        d_matrix = None

    kept = precision.dtype if sum_calls else "float32"
    d_embedded = jnp.zeros_like(embedded)
    d_shared: dict[int, nnx.Module] = {}
    for row, h in zip(reversed(config.layer_plan), reversed(inputs), strict=True):
        d_parts, cotangent, d_e = backward(parts(row), h, embedded, segment_ids, cotangent, precision, kept)
        yield _gradients(f"layers.{row.layer}", d_parts.layers[0])
        if row.hybrid is None:
            continue
        d_embedded += d_e
        yield _gradients(f"calls.{row.hybrid.call}", d_parts.calls[0])
        b = row.hybrid.block
        if not sum_calls:
            yield _gradients(f"calls.{row.hybrid.call}.block", d_parts.shared[0])
        else:
            d_shared[b] = (
                d_parts.shared[0] if b not in d_shared else jax.tree.map(jnp.add, d_shared[b], d_parts.shared[0])
            )
        del d_parts  # or it would be held while the next ones are computed
    for b, d_block in d_shared.items():
        yield _gradients(f"shared.{b}", d_block)
    d_embedded += cotangent.astype(embedded.dtype)
    d_embed = jnp.zeros(ends.embed.shape, embedded.dtype).at[tokens].add(d_embedded)
    yield {"gradient.embed": np.asarray(d_embed if d_matrix is None else d_embed + d_matrix)}


def _forward(
    parts: Parts,
    h: Array,
    embedded: Array,
    segment_ids: Array | None,
    precision: Precision,
    taps: tuple[str, ...] = (),
) -> tuple[Array, dict[str, Array]]:
    """The layer's output, and the values inside of it at `taps`."""
    names = {f"layers.0.{tap}": tap for tap in taps}
    positions = default_positions(h, segment_ids)
    tap = Tap(select=lambda name: name in names)
    context = Context(positions, segment_ids, backend=precision.backend, tap=tap)
    row = LayerPlan(0, HybridPlan(0, 0) if parts.calls else None)
    run = run_layers(cast_matrices(parts, precision.dtype), h, embedded, context, layers=[row])
    return run.h, {tap: run.tapped[name] for name, tap in names.items()}


def _backward(
    parts: Parts,
    h: Array,
    embedded: Array,
    segment_ids: Array | None,
    cotangent: Array,
    precision: Precision,
    kept: str,
):
    """Gradients in the layer's parameters, rounded to `kept`, in h and in the embeddings."""

    def run(parts: Parts, h: Array, embedded: Array) -> Array:
        return _forward(parts, h, embedded, segment_ids, precision)[0]

    pull = jax.vjp(run, cast_matrices(parts, precision.dtype), h, embedded)[1]
    d_parts, d_h, d_e = pull(cotangent)
    return optax.tree.cast(d_parts, kept), d_h, d_e


def _head(
    eps: float,
    ends: Ends,
    h: Array,
    tokens: Array,
    segment_ids: Array | None,
    precision: Precision,
    gradients: bool,
):
    """The loss, the logits, and, with `gradients`, those of the loss in h, the final norm and the output matrix."""
    backend = precision.backend

    def run(h: Array, norm: Array, matrix: Array) -> tuple[Array, Array]:
        logits = backend.linear(backend.rms_norm(h, norm, eps).astype(matrix.dtype), matrix)
        log_p = jax.nn.log_softmax(logits[:, :-1].astype(jnp.promote_types(logits.dtype, jnp.float32)))
        predicted = jnp.ones(tokens[:, 1:].shape, bool)
        if segment_ids is not None:
            predicted = (segment_ids[:, 1:] != 0) & (segment_ids[:, :-1] != 0)
        picked = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(picked * predicted) / jnp.maximum(predicted.sum(), 1), logits

    matrix = ends.embed if ends.head is None else ends.head
    norm, matrix = cast_matrices((ends.norm, matrix), precision.dtype)
    if not gradients:
        return *run(h, norm, matrix), None
    (loss, logits), back = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)(h, norm, matrix)
    return loss, logits, back


def _gradients(prefix: str, module: nnx.Module) -> Items:
    named = named_parameters(module).items()
    return {f"gradient.{prefix}.{name}": np.asarray(parameter[...]) for name, parameter in named}

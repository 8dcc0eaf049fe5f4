"""The model one layer at a time, forward and backward, in any precision: the float64 oracle, and models of any size."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct

from zamba2_jax.choices import Implementation
from zamba2_jax.models.base import LanguageModel
from zamba2_jax.models.layers import run_layers
from zamba2_jax.nn.config import HybridPlan, LayerPlan, ModelConfig
from zamba2_jax.nn.context import Context
from zamba2_jax.nn.parameter import named_parameters
from zamba2_jax.nn.tap import Tap
from zamba2_jax.ops.backend import Backend
from zamba2_jax.ops.linear import linear
from zamba2_jax.ops.norm import rms_norm
from zamba2_jax.ops.segments import document_positions
from zamba2_jax.parity.case import Batch
from zamba2_jax.parity.evidence import Items
from zamba2_jax.typing import Array, cast_matrices


class Precision(NamedTuple):
    """How a side computes.

    Attributes:
        dtype: compute dtype; by name.
        scan: its implementation; see `ops.ssd`.
        matmul: precision of matrix products, as for `jax.default_matmul_precision`.
    """

    dtype: str
    scan: Implementation
    matmul: str = "default"


ORACLE = Precision("float64", "sequential")

STATES = ("conv_x_state", "conv_bc_state", "ssm_state")
"""Taps of a mixer's state after the last token."""
_SEE_STATES = Tap(select=lambda name: name.rsplit(".", 1)[-1] in STATES)

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
        precision: to compute in.
        gradients: whether to go backward at all.
        sum_calls: whether the gradient of what is used more than once is summed, and given at the end; else it is given
            use by use, and memory holds one at a time: a shared block's as "gradient.calls.i.block", in float32 as all
            of a layer's, that of tied embeddings as "gradient.embed" for the input and "gradient.head" for the output.
    """
    compiled = partial(jax.jit, compiler_options=compiler_options())
    forward = compiled(_forward, static_argnames="precision")
    backward = compiled(_backward, static_argnames=("precision", "kept"))
    head = compiled(_head, static_argnames=("eps", "precision"))
    real = batch.real[..., None]
    segment_ids = None if batch.segment_ids is None else jnp.asarray(batch.segment_ids)
    tokens = jnp.asarray(batch.tokens)
    h = embedded = cast_matrices(ends.embed[tokens], precision.dtype)
    yield {"embed": np.asarray(h) * real}
    inputs = []
    for row in config.layer_plan:
        inputs.append(h)
        h, state = forward(parts(row), h, embedded, segment_ids, precision)
        at, (conv_x, conv_bc, ssm) = f"layers.{row.layer}", (np.asarray(state[name]) for name in STATES)
        conv_state = np.concatenate([conv_x, conv_bc], axis=-1).swapaxes(1, 2)  # as PyTorch keeps it
        states = {f"{at}.conv_state": conv_state, f"{at}.ssm_state": ssm}
        yield {f"{at}.output": np.asarray(h) * real} | states

    loss, logits, (cotangent, d_norm, d_matrix) = head(config.rms_norm_eps, ends, h, tokens, segment_ids, precision)
    yield {"logits": np.asarray(logits) * real}
    if tokens.shape[1] == 1:
        return
    yield {"loss": np.asarray(loss)}
    if not gradients:
        return
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
    d_embed = jnp.zeros(ends.embed.shape, embedded.dtype).at[tokens].add(d_embedded + cotangent)
    yield {"gradient.embed": np.asarray(d_embed if d_matrix is None else d_embed + d_matrix)}


def _forward(
    parts: Parts, h: Array, embedded: Array, segment_ids: Array | None, precision: Precision
) -> tuple[Array, dict[str, Array]]:
    """The layer's output, and its state after the last token, by the names of `STATES`."""
    positions = jnp.arange(h.shape[1])[None] if segment_ids is None else document_positions(segment_ids)
    context = Context(
        jnp.broadcast_to(positions, h.shape[:2]), segment_ids, backend=Backend(scan=precision.scan), tap=_SEE_STATES
    )
    row = LayerPlan(0, HybridPlan(0, 0) if parts.calls else None)
    run = run_layers(cast_matrices(parts, precision.dtype), h, embedded, context, layers=[row])
    return run.h, {name: run.tapped[f"layers.0.mamba.{name}"] for name in STATES}


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


def _head(eps: float, ends: Ends, h: Array, tokens: Array, segment_ids: Array | None, precision: Precision):
    """The loss, the logits, and the loss's gradients in h, the final norm and the output matrix."""

    def run(h: Array, norm: Array, matrix: Array) -> tuple[Array, Array]:
        logits = linear(rms_norm(h, norm, eps), matrix)
        log_p = jax.nn.log_softmax(logits[:, :-1].astype(jnp.promote_types(logits.dtype, jnp.float32)))
        predicted = jnp.ones(tokens[:, 1:].shape, bool)
        if segment_ids is not None:
            predicted = (segment_ids[:, 1:] != 0) & (segment_ids[:, :-1] != 0)
        picked = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(picked * predicted) / jnp.maximum(predicted.sum(), 1), logits

    matrix = ends.embed if ends.head is None else ends.head
    norm, matrix = cast_matrices((ends.norm, matrix), precision.dtype)
    (loss, logits), gradients = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)(h, norm, matrix)
    return loss, logits, gradients


def _gradients(prefix: str, module: nnx.Module) -> Items:
    named = named_parameters(module).items()
    return {f"gradient.{prefix}.{name}": np.asarray(parameter[...]) for name, parameter in named}

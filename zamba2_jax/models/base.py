"""What every model is to the floors above: parameters, a full pass, a step, and one way through its layers."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import nnx

from zamba2_jax.models.layers import PLAIN, LayerOptions, Observe, run_layers
from zamba2_jax.nn.cache import Cache, State, placed
from zamba2_jax.nn.config import ModelConfig
from zamba2_jax.nn.context import Context
from zamba2_jax.nn.parameter import KeyStream, Rngs, describe, norm_scale, normal, param
from zamba2_jax.nn.tap import NO_TAP, Tap
from zamba2_jax.ops.backend import XLA, Backend, default_backend
from zamba2_jax.ops.segments import document_positions
from zamba2_jax.parallel.mesh import constrain
from zamba2_jax.parallel.sharded_ops import embed, row_axes
from zamba2_jax.typing import Array, Bool, DTypeLike, Float, Int, at_least_fp32


class Pass(NamedTuple):
    """What comes of running a model.

    Attributes:
        h: what the output head reads, the final norm's output.
        cache: after the tokens, where one was given.
        tapped: values that the tap selected, by name.
        observed: what was observed of the calls, stacked up over them; see `models.layers`.
    """

    h: Float[Array, "b t d"]
    cache: Cache | None
    tapped: dict[str, Array]
    observed: Any


class LanguageModel(nnx.Module):
    """A stack of layers, of which some may call shared blocks: a pytree of its parameters.

    It goes through `jax.jit`, `jax.grad` and `optax`. Where optax takes a tree or a function that makes one, as for the
    labels of `optax.multi_transform`, give it the function, `lambda model: labels`: a tree of labels made from a model
    is a model too, which optax would call.

    A family names the classes of a layer, and, if it has them, of a shared block and of what each call of one owns; all
    are made as `layer(config, rngs=, dtype=)`, and `make_layer` is there for a family whose layers differ. A layer is
    called as `layer(h, shared_output, state, context) -> (h, state)`, a block as `block(h, embedded, projected, call,
    state, context) -> (shared_output, state)`, `projected` being what its `project_embedded(embedded, backend)` gives.
    Whole rows and single tokens take the same way; `context.is_step` tells. What attends, a block or a layer, taps
    `attention.q`, and a block `attention.k` too, the config of whose family has the `attention_scale`: a run's health
    is measured by these.

    Attributes:
        config: the architecture.
        embed: the token embedding, [v, d].
        layers: one module per layer.
        shared: the shared blocks, each stored once; `config.layer_plan` says which layer calls which.
        calls: what each call of a shared block owns.
        norm: scale of the final norm.
        head: the output head, [v, d]; None where it is tied to `embed`.
    """

    config: Any
    layer: ClassVar[Callable[..., nnx.Module]]
    block: ClassVar[Callable[..., nnx.Module]]
    call: ClassVar[Callable[..., nnx.Module]]
    mixer_outputs: ClassVar[tuple[str, ...]] = ()
    """Taps inside of a layer at what its sequence mixer adds to the residual stream.

    Besides that a layer adds at most the output of an MLP, tapped as `mlp.output`; see `evaluate.necessity`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        """A model with fresh parameters of compute dtype `dtype`, on the mesh that is set, if one is.

        Make it outside of `jax.jit`, in which it takes minutes to compile (docs/xla-notes.md: programs-by-shape).
        `jax.eval_shape(lambda: init_model(config, rngs=nnx.Rngs(0)))` gives the same pytree of shapes, without memory.
        """
        v, d, matrix = config.vocab_size, config.hidden_size, normal(config.initializer_range)
        keys = KeyStream(rngs.params())

        family = type(self)
        self.config = config
        self.embed = param(keys, matrix, (v, d), ("vocab", "d_model"), dtype)
        layers = range(config.num_layers)
        self.layers = nnx.List([family.make_layer(config, i, rngs=keys, dtype=dtype) for i in layers])
        self.shared = nnx.List([family.block(config, rngs=keys, dtype=dtype) for _ in range(config.num_blocks)])
        self.calls = nnx.List([family.call(config, rngs=keys, dtype=dtype) for _ in range(config.num_calls)])
        self.norm = norm_scale(keys, d, dtype)
        self.head = None if config.tie_embeddings else param(keys, matrix, (v, d), ("vocab", "d_model"), dtype)

    @classmethod
    def make_layer(cls, config: Any, layer: int, *, rngs: Rngs, dtype: DTypeLike) -> nnx.Module:
        """The layer of that number, with fresh parameters."""
        return cls.layer(config, rngs=rngs, dtype=dtype)

    @classmethod
    def layer_state(cls, config: Any, layer: int, batch: int, capacity: int, dtype: DTypeLike) -> State:
        """What a layer carries before the first token of `batch` rows of at most `capacity`."""
        raise NotImplementedError(f"{cls.__name__} has no layer_state: expected a method of the family")

    @classmethod
    def call_state(cls, config: Any, call: int, batch: int, capacity: int, dtype: DTypeLike) -> State:
        """The same of a call of a shared block."""
        raise NotImplementedError(f"{cls.__name__} has no call_state: expected a method of the family")

    def __repr__(self) -> str:
        """On a page: the architecture, and a line for each kind of parameter."""
        return "\n".join([f"{type(self).__name__}({self.config},", *(f"  {line}" for line in describe(self)), ")"])

    __str__ = __repr__

    def __call__(
        self,
        tokens: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        *,
        inputs_embeds: Float[Array, "b t d"] | None = None,
        tap: Tap = NO_TAP,
        backend: Backend | None = None,
    ) -> Float[Array, "b t v"]:
        """Logits of the next token, at every token.

        Args:
            tokens: ids in [0, v).
            segment_ids: documents packed in a row, 0 for padding at either end; see `ops.segments`. A document's
                logits are those it has alone in its row.
            positions: for the rotary embedding; counted from 0 in each document by default.
            inputs_embeds: in place of tokens, what they are embedded as.
            tap: may change every named value inside; see `nn.tap`, and `interpret.taps.capture` to see them.
            backend: how ops are computed; `default_backend` by default.

        Raises:
            ValueError: both or neither of tokens and inputs_embeds are given, or the tap selects values.
        """
        backend = default_backend(self.dtype) if backend is None else backend
        run = self.run(tokens, segment_ids, positions, inputs_embeds=inputs_embeds, tap=tap, backend=backend)
        return tap.edits()("logits", self.logits(run.h, backend=backend))

    def step(
        self, tokens: Int[Array, " b"], cache: Cache, *, tap: Tap = NO_TAP, backend: Backend | None = None
    ) -> tuple[Float[Array, "b v"], Cache]:
        """Logits after one more token in every row, and the cache with it; the rest as in `__call__`."""
        backend = default_backend(self.dtype) if backend is None else backend
        run = self.run(tokens[:, None], cache=cache, is_step=True, tap=tap, backend=backend)
        assert run.cache is not None
        return tap.edits()("logits", self.logits(run.h[:, 0], backend=backend)), run.cache

    def run(
        self,
        tokens: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        *,
        inputs_embeds: Float[Array, "b t d"] | None = None,
        cache: Cache | None = None,
        is_step: bool = False,
        tap: Tap = NO_TAP,
        backend: Backend | None = None,
        options: LayerOptions = PLAIN,
        observe: Observe | None = None,
        observed: Bool[Array, ""] | bool = True,
    ) -> Pass:
        """The model up to its output head: what every other way to run it goes through.

        Arguments as in `__call__`, and these. With a cache the rows go on where it stands: segment_ids then marks
        padding at the end of a row (0) and nothing else, and positions follow from the cache.

        Args:
            cache: where the rows stand.
            is_step: whether there is one token in each row, with a cache.
            options: how the layers are run; see `models.layers`. With another compute dtype backend is for that.
            observe: computes numbers of every call of a shared block; see `models.layers`.
            observed: whether these numbers are wanted now.

        Raises:
            ValueError: as in `__call__` and `run_layers`, or a step is not of one token with a cache.
        """
        dtype = jnp.dtype(options.dtype or self.dtype)
        if tokens is not None and inputs_embeds is None:
            embedded = embed(tokens, self.embed[...], cached=cache is not None).astype(dtype)
        elif tokens is None and inputs_embeds is not None:
            embedded = inputs_embeds.astype(dtype)
        else:
            raise ValueError("expected either tokens or inputs_embeds, and not both")
        if is_step and (cache is None or embedded.shape[1] != 1):
            raise ValueError(f"is_step with {embedded.shape[1]} tokens in a row: expected a cache and one token")
        tap = tap.fresh()
        embedded = tap("embed", embedded)
        if cache is not None:
            positions = cache.lengths[:, None] + jnp.arange(embedded.shape[1])
        elif positions is None:
            positions = default_positions(embedded, segment_ids)
        backend = default_backend(dtype) if backend is None else backend
        context = Context(positions, segment_ids, backend=backend, tap=tap, is_step=is_step)
        embedded = constrain(embedded, *row_axes(len(embedded), cached=cache is not None), None)
        h = embedded.astype(at_least_fp32(embedded.dtype)) if self.config.residual_in_fp32 else embedded
        run = run_layers(self, h, embedded, context, cache, options, observe, observed)
        h = backend.rms_norm(run.h, self.norm[...], self.config.rms_norm_eps).astype(embedded.dtype)
        h = tap("final_norm", h)
        if cache is not None:
            added = embedded.shape[1] if segment_ids is None else (segment_ids != 0).sum(axis=1, dtype=jnp.int32)
            cache = placed(Cache(run.states, run.call_states, cache.lengths + added))
        return Pass(h, cache, tap.values | run.tapped, run.observed)

    def logits(
        self, h: Float[Array, "*batch d"], *, dtype: DTypeLike | None = None, backend: Backend = XLA
    ) -> Float[Array, "*batch v"]:
        """The output head on the final norm's output; in `dtype`, by default that of h."""
        return backend.linear(h, self.output_matrix, dtype=dtype)

    @property
    def output_matrix(self) -> Float[Array, "v d"]:
        """The matrix of the output head, tied or not."""
        return (self.embed if self.head is None else self.head)[...]

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype: that of the weight matrices."""
        return self.embed.dtype


def default_positions(embedded: Float[Array, "b t d"], segment_ids: Int[Array, "b t"] | None) -> Int[Array, "b t"]:
    """Positions of the tokens, counted from 0 in each document."""
    if segment_ids is None:
        return jnp.broadcast_to(jnp.arange(embedded.shape[1]), embedded.shape[:2])
    return document_positions(constrain(segment_ids, "batch", None))
